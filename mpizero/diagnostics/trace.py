"""A timeline of each rank, in the format that Perfetto and chrome://tracing read.

One file a rank, an event a line: a job that is killed leaves what it had written, which is a trace
by itself (the format's JSON array may lack its end). A call is one slice, with another inside it
for the time that it waited for other ranks to come.
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import threading
from pathlib import Path
from typing import Any, TextIO

from mpizero.diagnostics.recorder import Ended
from mpizero.errors import ArgumentError

_EVENTS_AT_ONCE = 512

# What a kind of call is drawn as: the threads of a rank in the timeline.
_ROWS = {"program": 0, "blocking": 1, "waiting": 1, "asynchronous": 2}


# How a file of ours begins: by this an earlier one is known, and may be written anew.
_BEGINNING = re.compile(
    rb'\[\n\{"ph": "M", "name": "process_name", "pid": \d+, "args": \{"name": "rank '
)


def open_file(folder: Path, rank: int) -> TextIO:
    """The file of a rank, as it is: empty, or an earlier trace.

    Raises ArgumentError if it cannot be written, and for a file that no trace has written.
    """
    path = folder / f"trace-rank-{rank:04d}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise ArgumentError(
            "trace()", "folder", f"{str(folder)!r} ({error.strerror})", "one to be written"
        ) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode) or not _is_ours(os.pread(handle, 200, 0)):
        os.close(handle)
        raise ArgumentError(
            "trace()", "folder", f"{str(folder)!r}, where {path.name} is no trace of ours",
            "a new folder, or one of earlier traces",
        )  # fmt: skip
    return os.fdopen(handle, "r+")


def _is_ours(beginning: bytes) -> bool:
    return not beginning or _BEGINNING.match(beginning) is not None


class Tracer:
    """Writes this rank's events into a file (see ``open_file``); a listener of the recorder's.

    ``offset``: what to add to this rank's clock to get rank 0's, in ns; ``origin``: when the trace
    begins, on rank 0's clock.
    """

    def __init__(self, file: TextIO, rank: int, size: int, offset: int, origin: int) -> None:
        self._file = file
        file.truncate(0)
        self._rank, self._shift = rank, offset - origin
        self._lock = threading.Lock()
        self._waiting: list[dict[str, Any]] = []
        self._file.write("[\n")
        name = f"rank {rank} of {size} on {socket.gethostname()}"
        self._put({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name}})
        for kind in ("program", "blocking", "asynchronous"):
            row = {"ph": "M", "name": "thread_name", "pid": rank, "tid": _ROWS[kind]}
            self._put({**row, "args": {"name": kind}})
        self._flush()

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
