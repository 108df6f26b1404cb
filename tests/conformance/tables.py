"""The two tables of ``docs/conformance.md``, and where each has its results and reasons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from conformance import ddp_reasons, reasons


@dataclass(frozen=True)
class Table:
    """``mark``: the page has the table between comments with this word."""

    name: str
    mark: str
    file: Path
    reasons: dict[str, str]


_HERE = Path(__file__).parent

BACKEND = Table("backend", "results", _HERE / "results.json", reasons.REASONS)
DDP = Table("ddp", "DistributedDataParallel", _HERE / "ddp_results.json", ddp_reasons.REASONS)

TABLES = {table.name: table for table in (BACKEND, DDP)}
