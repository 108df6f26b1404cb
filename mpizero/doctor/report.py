"""The doctor's findings as a table on a terminal, as plain lines elsewhere, or as data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mpizero.doctor.facts import Facts
from mpizero.doctor.findings import Finding
from mpizero.doctor.judge import ranks_of, worst

_COLORS = {"ok": "green", "look": "yellow", "wrong": "bold red"}
_MOST_RANKS = 64  # that are listed one by one


def show(facts: Facts, findings: Sequence[Finding]) -> None:
    """Print the findings: with rich on a terminal if it is installed, else as plain lines."""
    lines = ranks_of(facts) if len(facts.ranks) > 1 else []
    if len(lines) > _MOST_RANKS:
        lines[_MOST_RANKS:] = [f"... and {len(lines) - _MOST_RANKS} more (--json has all)"]
    # Some launchers give ranks a terminal of their own, 80 wide, whatever stands behind it.
    if not (facts.launcher.alone and sys.stdout.isatty() and _show_table(findings)):
        for line in plain(findings):
            print(line)
    print("\n".join([*lines, closing(findings)]))


def plain(findings: Sequence[Finding]) -> list[str]:
    """A line for each finding, and one below it for the remedy."""
    width = max((len(finding.topic) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:<5}  {finding.topic:<{width}}  {finding.text}")
        if finding.remedy:
            lines.append(f"{'':<7}{'':<{width}}  -> {finding.remedy}")
    return lines


def closing(findings: Sequence[Finding]) -> str:
    """How many of each."""
    counts = {each: [f.verdict for f in findings].count(each) for each in ("wrong", "look")}
    if worst(findings) == "ok":
        return "all is well"
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def as_document(facts: Facts, findings: Sequence[Finding]) -> dict[str, Any]:
    """The same for programs: verdict, findings, and the facts that they rest on."""
    return {
        "verdict": worst(findings),
        "findings": [asdict(finding) for finding in findings],
        "facts": asdict(facts),
    }


def _show_table(findings: Sequence[Finding]) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in findings:
        told = Text(finding.text)
        if finding.remedy:
            told.append(f"\n-> {finding.remedy}", "italic")
        table.add_row(Text(finding.verdict, _COLORS[finding.verdict]), Text(finding.topic), told)
    Console(highlight=False).print(table)
    return True
