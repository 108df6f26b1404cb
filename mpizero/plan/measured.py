"""Speeds and sizes that have been measured here: the tables of ``mpizero bench`` and ``tune``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpizero.collectives.tuning import BUILT_IN, Tuning, find
from mpizero.errors import ArgumentError, MpizeroError


def link_of(file: Path) -> tuple[float, float]:
    """Bytes a second that a node sends, and the latency of a message in seconds.

    ``file``: what ``mpizero bench --json FILE`` has written with one rank on each node. There an
    all-reduce of b bytes by a ring over m nodes takes 2 (m-1) (alpha + b/m beta) (Thakur,
    Rabenseifner, Gropp 2005, section 4.4): beta from the largest size, the better of what "auto"
    and the MPI library's own call make of the link; alpha from that call's smallest, for which it
    takes 2 log2 m messages at most. Raises ArgumentError for another file.
    """
    try:
        rows: list[dict[str, Any]] = json.loads(file.read_text())
        rows = [row for row in rows if row["algorithm"] in ("auto", "MPI")]
        largest = max(rows, key=lambda row: (int(row["bytes"]), float(row["bus_bandwidth"])))
        calls = [row for row in rows if row["algorithm"] == "MPI"]
        smallest = min(calls, key=lambda row: int(row["bytes"]))
        share = largest["bus_bandwidth"] / largest["algorithm_bandwidth"]  # 2 (m-1)/m
        nodes = round(2 / (2 - share))
        messages = 2 * (nodes - 1).bit_length()
        return largest["bus_bandwidth"] * 1e9, smallest["microseconds"] * 1e-6 / messages
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ArgumentError(
            "plan", "measured", f"{file} ({type(error).__name__}: {error})",
            "a file of `mpizero bench --json FILE`, run with one rank on each of several nodes",
        ) from None  # fmt: skip


def tuned(ranks_per_node: int, nodes: int) -> Tuning:
    """The table of ``mpizero tune`` for such a job; the built-in one without it, or without MPI."""
    try:
        return find(ranks_per_node, nodes)
    except MpizeroError:  # planning needs no MPI
        return BUILT_IN
