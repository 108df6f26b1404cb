"""How a test went: on one rank, and on all together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Outcome:
    """``verdict``: one of the above. ``reason``: one line, "" if passed. ``details``: all of it."""

    verdict: str
    reason: str = ""
    seconds: float = 0.0
    details: str = ""

    def as_json(self) -> dict[str, Any]:
        """What is kept."""
        kept = {"verdict": self.verdict, "seconds": round(self.seconds, 2)}
        return {**kept, "reason": self.reason} if self.reason else kept

    @staticmethod
    def from_json(kept: dict[str, Any]) -> Outcome:
        """The reverse of ``as_json``."""
        return Outcome(**kept)

    def as_dict(self) -> dict[str, Any]:
        """Everything."""
        return asdict(self)


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """The ranks' outcomes as one: one that fails fails all, and all have to skip together."""
    seconds = max(outcome.seconds for outcome in outcomes)
    for rank, outcome in enumerate(outcomes):
        if outcome.verdict == FAILED:
            details = f"rank {rank}: {outcome.details or outcome.reason}"
            return Outcome(FAILED, f"rank {rank}: {outcome.reason}", seconds, details)
    verdicts = {outcome.verdict for outcome in outcomes}
    if len(verdicts) > 1:
        said = ", ".join(f"rank {rank} {o.verdict}" for rank, o in enumerate(outcomes))
        return Outcome(FAILED, f"the ranks disagree: {said}", seconds)
    return Outcome(outcomes[0].verdict, outcomes[0].reason, seconds)
