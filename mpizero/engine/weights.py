"""How much a rank's gradients count.

One mechanism for uneven batches, token normalisation, idle ranks and ranks that have run out of
data: what comes out of a reduction is

    sum over ranks and micro-steps of (weight x gradient)  /  divisor.

*Stated* weights (tokens, samples) are divided by their sum over ranks and accumulated
micro-steps. *Relative* weights, which a sharded loader sets and which are 1 unless it says
otherwise, average 1 over the ranks in each micro-step, so that they are divided by the number of
ranks alone: gradients then add up over micro-steps, as in one process, and equal weights need
neither a multiplication nor a message.

Gradients lie in memory as they have come, and a *factor* is kept beside them: what they are to be
multiplied by when they are reduced. A weight of some thousand tokens would carry 16-bit gradients
out of their range; factors are brought to 1 or less before anything is multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from mpizero.errors import ArgumentError


@dataclass(frozen=True)
class Weight:
    """The weight of one backward pass on this rank."""

    value: float = 1.0
    stated: bool = False

    def __post_init__(self) -> None:
        if not (isfinite(self.value) and self.value >= 0):
            raise ArgumentError("weigh()", "weight", str(self.value), "a finite number >= 0")


@dataclass(frozen=True)
class Merge:
    """How a pass's gradients are added to those that lie there: ``keep x old + new x gradient``.

    ``factor``: what the result is to be multiplied by. ``here``: the stated weight that it
    carries; ``announced``: with this rank's part of a mean that is kept elsewhere.
    """

    keep: float = 1.0
    new: float = 1.0
    factor: float = 1.0
    stated: bool = False
    here: float = 0.0
    announced: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Is it a sum, as autograd makes it?"""
        return self.keep == 1.0 and self.new == 1.0


class WeightLedger:
    """What the gradients that lie on this rank are to be multiplied by, and what they weigh.

    A finished mean over total weight W counts W when more is added to it: each of n ranks' copies
    counts W/n. ``apart``: means are kept elsewhere (in shards), not where gradients come.
    """

    def __init__(self, ranks: int, apart: bool) -> None:
        self._ranks, self._apart = ranks, apart
        self._lying = Merge()
        self._mean = 0.0  # the total weight of a mean that is kept apart
        self._mean_is_stated = False

    @property
    def is_plain(self) -> bool:
        """Does what lies here count as it is, and without a stated weight?"""
        return self._lying.factor == 1.0 and not self._lying.stated and not self._mean_is_stated

    @property
    def mean_weight(self) -> float:
        """The total weight of the mean that is kept apart (0: none was stated)."""
        return self._mean

    def plan(self, weight: Weight, kept: bool, kept_apart: bool = False) -> Merge:
        """A pass of ``weight`` begins. Changes nothing: ``commit`` does.

        ``kept``: there are gradients, not all zero, to which it adds; ``kept_apart``: a mean.
        """
        share = self._mean / self._ranks if kept_apart else 0.0
        stated_before = (kept and self._lying.stated) or (kept_apart and self._mean_is_stated)
        if stated_before and not weight.stated:
            raise ArgumentError(
                "backward()",
                "weight",
                "not stated for this pass, but for earlier ones whose gradients are accumulated",
                "weigh() before each of the passes that are accumulated, or before none",
            )
        if weight.stated and (kept or kept_apart) and not stated_before:
            raise ArgumentError(
                "backward()",
                "weight",
                "stated for this pass, but not for earlier ones whose gradients are accumulated",
                "weigh() before each of the passes that are accumulated, or before none",
            )
        keep, new, factor = _combined(self._lying.factor if kept else None, weight.value)
        here = (self._lying.here if kept else 0.0) + (weight.value if weight.stated else 0.0)
        return Merge(keep, new, factor, weight.stated, here, here + share)

    def plan_kept(self, kept_apart: bool = False) -> Merge:
        """What lies here is to be averaged as it is, without a pass of its own."""
        share = self._mean / self._ranks if kept_apart else 0.0
        lying = self._lying
        return Merge(1.0, 1.0, lying.factor, lying.stated, lying.here, lying.here + share)

    def commit(self, merge: Merge) -> None:
        """The planned pass takes place."""
        self._lying = merge

    def close(self, stated: bool, total: float) -> None:
        """The gradients have become a mean, with the ``total`` of all weights as its divisor."""
        if self._apart:
            self._mean, self._mean_is_stated = (total if stated else 0.0), stated
            self._lying = Merge()
            return
        each = total / self._ranks if stated else 1.0
        here = each if stated else 0.0
        self._lying = Merge(1.0, 1.0, each, stated, here, here)


def _combined(old: float | None, new: float) -> tuple[float, float, float]:
    """(what is kept x, what comes x, the factor of their sum), with no product above 1."""
    if old is None or old == new:
        return 1.0, 1.0, new
    if new == 0.0:  # zero times NaN would be NaN: it is left out
        return 1.0, 0.0, old
    if old == 0.0:
        return 0.0, 1.0, new
    factor = max(old, new)
    return old / factor, new / factor, factor
