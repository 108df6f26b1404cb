"""Traces of several ranks, as profilers write them in Chrome's format, put together as one.

The format: "Trace Event Format" (Google, 2016). What PyTorch's profiler adds: ``distributedInfo``
has the rank, and times count from ``baseTimeNanoseconds`` of the machine's clock.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpizero.errors import ArgumentError

_CALL = "trace merge"


def merge_traces(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The events of all files, each rank's processes by its number; times from the first event on.

    A rank is the one that its file tells of, or else the last number in its name. The clocks of
    nodes are taken as they are. ArgumentError for a file that is no trace, and for two of a rank.
    """
    traces: dict[int, tuple[Path, dict[str, Any]]] = {}
    for file in files:
        found = _read(file)
        rank = _rank(file, found)
        if rank in traces:
            raise ArgumentError(
                _CALL, "files", f"'{traces[rank][0]}' and '{file}', both of rank {rank}",
                "one of each rank",
            )  # fmt: skip
        traces[rank] = file, found
    based = {"baseTimeNanoseconds" in found for _, found in traces.values()}
    if len(based) > 1:
        raise ArgumentError(_CALL, "files", "traces of several profilers", "those of one")
    processes: dict[tuple[int, Any], int] = {}
    events = [
        event
        for rank, (_, found) in sorted(traces.items())
        for event in _of_rank(rank, found, processes)
    ]
    origin = min((event["ts"] for event in events if event.get("ph") != "M"), default=0.0)
    for event in events:
        event["ts"] = max(0.0, event["ts"] - origin)
    return events


def _read(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    try:
        found = json.loads(gzip.decompress(data) if file.suffix == ".gz" else data)
        if isinstance(found, list):
            found = {"traceEvents": found}
        if all(isinstance(event, dict) for event in found["traceEvents"]):
            return dict(found)
    except (ValueError, KeyError, TypeError, OSError, EOFError, zlib.error):
        pass
    raise ArgumentError(
        _CALL, "files", f"'{file}'", "traces in Chrome's format (JSON)",
        "PyTorch's profiler writes one by prof.export_chrome_trace(f'trace-{rank}.json').",
    )  # fmt: skip


def _rank(file: Path, found: dict[str, Any]) -> int:
    job = found.get("distributedInfo")
    told = job.get("rank") if isinstance(job, dict) else None
    if isinstance(told, int):
        return told
    numbers = re.findall(r"\d+", file.name.removesuffix(".gz").removesuffix(".json"))
    if not numbers:
        raise ArgumentError(
            _CALL, "files", f"'{file}', which does not tell of which rank it is",
            "files with the rank in their names",
        )  # fmt: skip
    return int(numbers[-1])


def _of_rank(
    rank: int, found: dict[str, Any], processes: dict[tuple[int, Any], int]
) -> list[dict[str, Any]]:
    """Its events, with numbers of their own for processes, and arrows within the rank."""
    base = found.get("baseTimeNanoseconds", 0) / 1e3
    events = []
    for given in found["traceEvents"]:
        event = dict(given)
        event["pid"] = processes.setdefault((rank, event.get("pid")), len(processes))
        event["ts"] = event.get("ts", 0.0) + base
        if "id" in event:
            event["id"] = f"{rank}.{event['id']}"
        if event.get("name") == "process_name":
            event["args"] = {"name": f"rank {rank}: {event.get('args', {}).get('name', '')}"}
        if event.get("name") == "process_sort_index":
            event["args"] = {"sort_index": event["pid"]}
        events.append(event)
    return events
