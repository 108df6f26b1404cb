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
    is_guess: bool = False  # made of what is left, not told

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
    failed = [rank for rank, outcome in enumerate(outcomes) if outcome.verdict == FAILED]
    if failed:
        rank = min(failed, key=lambda rank: outcomes[rank].is_guess)
        details = "\n".join(f"rank {r}: {outcomes[r].details}" for r in failed)
        return Outcome(FAILED, f"rank {rank}: {outcomes[rank].reason}", seconds, details)
    verdicts = {outcome.verdict for outcome in outcomes}
    if len(verdicts) > 1:
        said = ", ".join(f"rank {rank} {o.verdict}" for rank, o in enumerate(outcomes))
        return Outcome(FAILED, f"the ranks disagree: {said}", seconds)
    return Outcome(outcomes[0].verdict, outcomes[0].reason, seconds)
