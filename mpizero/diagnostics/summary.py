"""What a folder of traces says: where the time went, and who waited for whom."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpizero.errors import ArgumentError

Interval = tuple[float, float]


@dataclass(frozen=True)
class RankSummary:
    """One rank's time, in seconds.

    ``spans``: by name ("forward", "backward", ...). ``exposed``: in which the program stood still
    for communication; ``overlapped``: in which communication ran beside it. ``waiting``: of all
    communication, for other ranks to come; the rest moved data. ``caused``: what other ranks
    waited for this one as the last.
    """

    rank: int
    total: float
    spans: dict[str, float]
    exposed: float
    overlapped: float
    waiting: float
    moving: float
    nbytes: int
    caused: float


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All events of a folder's traces. Raises ArgumentError if there are none."""
    events: list[dict[str, Any]] = []
    for file in sorted(folder.glob("trace-rank-*.json")):
        for line in file.read_text().splitlines():
            text = line.strip().rstrip(",")
            if text.startswith('{"'):
                try:
                    events.append(json.loads(text))
                except ValueError:  # the last line of a rank that was killed
                    continue
    if not events:
        raise ArgumentError(
            "trace", "folder", repr(str(folder)), "one with files trace-rank-*.json",
            "MPIZERO_TRACE=folder makes a job write them.",
        )  # fmt: skip
    return events


def summarise(events: Sequence[dict[str, Any]]) -> list[RankSummary]:
    """One summary a rank."""
    slices = [event for event in events if event.get("ph") == "X"]
    caused = _caused(slices)
    by_rank: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in slices:
        by_rank[event["pid"]].append(event)
    return [_of_rank(rank, by_rank[rank], caused[rank]) for rank in sorted(by_rank)]


def _of_rank(rank: int, slices: list[dict[str, Any]], caused: float) -> RankSummary:
    spans: dict[str, float] = defaultdict(float)
    for event in slices:
        if event["cat"] == "program":
            spans[event["name"]] += event["dur"] / 1e6
    standing = union(_interval(e) for e in slices if e["cat"] in ("blocking", "waiting"))
    calls = [e for e in slices if e["cat"] in ("blocking", "asynchronous")]
    communicating = union(_interval(e) for e in calls)
    waiting = union(_interval(e) for e in slices if e["cat"] == "wait")
    busy = length(communicating)
    everything = [_interval(e) for e in slices]
    total = max(end for _, end in everything) - min(start for start, _ in everything)
    return RankSummary(
        rank,
        total / 1e6,
        dict(spans),
        length(standing) / 1e6,
        (busy - length(common(communicating, standing))) / 1e6,
        length(waiting) / 1e6,
        (busy - length(waiting)) / 1e6,
        sum(event.get("args", {}).get("bytes", 0) for event in calls),
        caused,
    )


def _caused(slices: Iterable[dict[str, Any]]) -> dict[int, float]:
    """Seconds that the others of each call waited for the rank that came last."""
    calls: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for event in slices:
        if event["cat"] in ("blocking", "asynchronous"):
            told = event["args"]
            calls[told["ranks"], event["cat"], told["sequence"]].append(event)
    caused: dict[int, float] = defaultdict(float)
    for events in calls.values():
        last = max(events, key=lambda event: event["ts"])
        caused[last["pid"]] += sum(last["ts"] - event["ts"] for event in events) / 1e6
    return caused


def _interval(event: dict[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time as disjoint intervals, in order."""
    found: list[list[float]] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([start, end])
    return [(start, end) for start, end in found]


def common(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """The time that is in both; each disjoint and in order."""
    found, at = [], 0
    for start, end in one:
        while at < len(other) and other[at][1] <= start:
            at += 1
        here = at
        while here < len(other) and other[here][0] < end:
            found.append((max(start, other[here][0]), min(end, other[here][1])))
            here += 1
    return found


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
