"""Where a backend's results differ from gloo's, and why."""

from __future__ import annotations

from dataclasses import dataclass

from conformance.outcomes import PASSED
from conformance.stored import GLOO, Outcomes


@dataclass(frozen=True)
class Difference:
    """A test that does not go with ``column`` as with gloo. ``reason`` is "" if none is known."""

    name: str
    column: str
    ours: str
    gloos: str
    reason: str

    @property
    def falls_short(self) -> bool:
        """Does gloo pass, and this backend not?"""
        return self.gloos == PASSED


def differences(columns: dict[str, Outcomes], reasons: dict[str, str]) -> list[Difference]:
    """All differences from gloo, by test."""
    gloos = columns.get(GLOO, {})
    return [
        Difference(name, column, outcomes[name].verdict, gloos[name].verdict, reasons.get(name, ""))
        for name in sorted(gloos)
        for column, outcomes in columns.items()
        if column != GLOO and name in outcomes and outcomes[name].verdict != gloos[name].verdict
    ]


def unexplained(columns: dict[str, Outcomes], reasons: dict[str, str]) -> list[str]:
    """What nobody has given a reason for; and reasons for what is no difference, which mislead."""
    found = differences(columns, reasons)
    missing = [f"{d.name} ({d.column}): no reason" for d in found if not d.reason]
    names = {each.name for each in found}
    return missing + [
        f"{name}: a reason, but no difference" for name in sorted(set(reasons) - names)
    ]
