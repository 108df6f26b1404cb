"""One line of the doctor's report: a topic, a verdict, what was found, and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# look: it works, but slower or other than one may think. wrong: it fails, trains wrongly, or is
# many times slower than it need be.
Verdict = Literal["ok", "look", "wrong"]


@dataclass(frozen=True)
class Finding:
    """``remedy`` stands behind every "look" and "wrong", and nowhere else."""

    topic: str
    verdict: Verdict
    text: str
    remedy: str = ""


def ok(topic: str, text: str) -> Finding:
    """All is well, and this is what there is."""
    return Finding(topic, "ok", text)


def look(topic: str, text: str, remedy: str) -> Finding:
    """It works, but a person should look at it."""
    return Finding(topic, "look", text, remedy)


def wrong(topic: str, text: str, remedy: str) -> Finding:
    """It should be set right before anything is trained."""
    return Finding(topic, "wrong", text, remedy)
