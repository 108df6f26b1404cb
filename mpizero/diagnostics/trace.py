"""A timeline of each rank, in the format that Perfetto and chrome://tracing read.

One file a rank, an event a line: a job that is killed leaves what it had written, which is a trace
by itself (the format's JSON array may lack its end). A call is one slice, with another inside it
for the time that it waited for other ranks to come.
"""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any, TextIO

from mpizero.diagnostics.recorder import Ended
from mpizero.errors import ArgumentError

_EVENTS_AT_ONCE = 512

# What a kind of call is drawn as: the threads of a rank in the timeline.
_ROWS = {"program": 0, "blocking": 1, "waiting": 1, "asynchronous": 2}


class Tracer:
    """Writes this rank's events into ``folder``; a listener of the recorder's.

    ``offset``: what to add to this rank's clock to get rank 0's, in ns; ``origin``: when the trace
    begins, on rank 0's clock. Raises ArgumentError for a folder that cannot be written.
    """

    def __init__(self, folder: Path, rank: int, size: int, offset: int, origin: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = (folder / f"trace-rank-{rank:04d}.json").open("w")
        except OSError as error:
            raise ArgumentError(
                "trace()", "folder", f"{str(folder)!r} ({error.strerror})", "one to be written"
            ) from error
        self._rank, self._shift = rank, offset - origin
        self._lock = threading.Lock()
        self._waiting: list[dict[str, Any]] = []
        self._file.write("[\n")
        name = f"rank {rank} of {size} on {socket.gethostname()}"
        self._put({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name}})
        for kind in ("program", "blocking", "asynchronous"):
            row = {"ph": "M", "name": "thread_name", "pid": rank, "tid": _ROWS[kind]}
            self._put({**row, "args": {"name": kind}})

    def call(self, call: Ended) -> None:
        ranks, _, kind = call.lane.rpartition(" ")
        row = _ROWS.get(kind, 1)
        arguments = {
            "call": call.what, "ranks": ranks, "sequence": call.sequence, "bytes": call.nbytes,
            "line": call.line,
        }  # fmt: skip
        if call.algorithm:
            arguments["algorithm"] = call.algorithm
        self._slice(call.what.split("(")[0], kind, row, call.begun, call.ended, arguments)
        if call.agreed:
            self._slice("waiting for others", "wait", row, call.begun, call.agreed)

    def span(self, name: str, begun: int, ended: int) -> None:
        self._slice(name, "program", 0, begun, ended)

    def close(self) -> None:
        with self._lock:
            self._flush()
            self._file.write("{}]\n")
            self._file.close()

    def _slice(
        self, name: str, kind: str, row: int, begun: int, ended: int, arguments: Any = None
    ) -> None:
        event = {
            "ph": "X", "name": name, "cat": kind, "pid": self._rank, "tid": row,
            "ts": (begun + self._shift) / 1e3, "dur": (ended - begun) / 1e3,
        }  # fmt: skip
        if arguments is not None:
            event["args"] = arguments
        self._put(event)

    def _put(self, event: dict[str, Any]) -> None:
        with self._lock:
            self._waiting.append(event)
            if len(self._waiting) >= _EVENTS_AT_ONCE:
                self._flush()

    def _flush(self) -> None:
        self._file.writelines(json.dumps(event) + ",\n" for event in self._waiting)
        self._file.flush()
        self._waiting.clear()
