"""Results that have been kept: a file for each table of the page, which is made from it.

A column for each backend and MPI, by what has become of the tests. Reasons stand beside those that
failed; those that are skipped are sorted by theirs.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from conformance.outcomes import FAILED, PASSED, SKIPPED, Outcome

GLOO, MPICH, OPENMPI = "gloo", "mpizero (MPICH)", "mpizero (Open MPI)"
COLUMNS = (GLOO, MPICH, OPENMPI)

Outcomes = dict[str, Outcome]


def read(file: Path) -> tuple[dict[str, Any], dict[str, Outcomes]]:
    """What the tests were run with, and the outcomes of each column."""
    if not file.exists():
        return {}, {}
    kept = json.loads(file.read_text())
    return kept["with"], {name: _unfold(column) for name, column in kept["results"].items()}


def write(made_with: dict[str, Any], columns: dict[str, Outcomes], file: Path) -> None:
    """Keep them."""
    results = {name: _fold(columns[name]) for name in COLUMNS if name in columns}
    file.write_text(json.dumps({"with": made_with, "results": results}, indent=1) + "\n")


def count(outcomes: Iterable[Outcome], verdict: str) -> int:
    """How many there are of a verdict."""
    return sum(outcome.verdict == verdict for outcome in outcomes)


def _fold(outcomes: Outcomes) -> dict[str, Any]:
    skipped = defaultdict(list)
    for name, outcome in outcomes.items():
        if outcome.verdict == SKIPPED:
            skipped[outcome.reason].append(name)
    return {
        PASSED: [name for name, outcome in outcomes.items() if outcome.verdict == PASSED],
        FAILED: {n: outcome.reason for n, outcome in outcomes.items() if outcome.verdict == FAILED},
        SKIPPED: skipped,
    }


def _unfold(column: dict[str, Any]) -> Outcomes:
    outcomes = {name: Outcome(PASSED) for name in column[PASSED]}
    outcomes |= {name: Outcome(FAILED, reason) for name, reason in column[FAILED].items()}
    for reason, names in column[SKIPPED].items():
        outcomes |= {name: Outcome(SKIPPED, reason) for name in names}
    return dict(sorted(outcomes.items()))
