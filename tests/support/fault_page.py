"""The fault table of docs/reliability.md, made of what a campaign has measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from support.fault_table import FAULTS
from support.faults import ENDS, MPICH, OPEN_MPI
from support.launch import ROOT

PAGE = ROOT / "docs" / "reliability.md"
FILES = {
    MPICH: ROOT / "docs" / "figures" / "faults-mpich.json",
    OPEN_MPI: ROOT / "docs" / "figures" / "faults-openmpi.json",
}
BEGIN, END = "<!-- the fault table: written by tests/fault_campaign.py -->", "<!-- its end -->"

_LONGEST = 110  # characters of what was printed


def measured() -> dict[str, dict[str, dict[str, Any]]]:
    """By MPI and fault: the last verdicts that were written down."""
    found = {}
    for mpi, path in FILES.items():
        verdicts = json.loads(path.read_text()) if path.exists() else []
        found[mpi] = {each["fault"]: each for each in verdicts}
    return found


def record(mpi: str, verdicts: Mapping[str, Mapping[str, Any]]) -> None:
    """Write verdicts down, in place of older ones of the same faults, and the page anew."""
    kept = {**measured()[mpi], **verdicts}
    ordered = [kept[fault.name] for fault in FAULTS if fault.name in kept]
    FILES[mpi].write_text(json.dumps(ordered, indent=1) + "\n")
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n{END}{after}")


def table() -> str:
    """One row for each fault and MPI."""
    found = measured()
    lines = [
        "| what happens | where | MPI | promised | seconds | printed | left behind |",
        "|---|---|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        for mpi in (MPICH, OPEN_MPI):
            if fault.name not in found[mpi]:
                continue
            verdict = found[mpi][fault.name]
            promised = f"{fault.promise}, status {verdict['status']}"
            if fault.promise != ENDS:
                promised = fault.promise
            cells = [
                fault.name, fault.where, mpi, promised, f"{verdict['seconds']:.1f}",
                _printed(verdict["said"]), "; ".join(verdict["left"]) or "nothing",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _printed(line: str) -> str:
    if not line:
        return "nothing"
    line = re.sub(r"\b(PID|pid) \d+", r"\1 …", re.sub(r"\s+", " ", line))
    line = re.sub(r"\b(partial-|process id )\w+", r"\1…", line).replace("`", "'")
    if len(line) > _LONGEST:
        line = line[:_LONGEST].rstrip() + " …"
    return f"`{line}`".replace("|", "\\|")
