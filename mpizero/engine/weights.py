"""How much a rank's gradients count.

One mechanism for uneven batches, token normalisation, idle ranks and ranks that have run out of
data: what comes out of a reduction is

    sum over ranks and micro-steps of (weight x gradient)  /  divisor.

*Stated* weights (tokens, samples) are divided by their sum over ranks and accumulated
micro-steps. *Relative* weights, which a sharded loader sets and which are 1 unless it says
otherwise, average 1 over the ranks in each micro-step, so that they are divided by the number of
ranks alone: gradients then add up over micro-steps, as in one process, and equal weights need
neither a multiplication nor a message.
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


class WeightLedger:
    """The stated weight that the gradients lying in this rank's buckets carry together."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._local = 0.0
        self._reduced = 0.0  # of gradients that are a finished mean: its divisor

    def open(self, weight: Weight, gradients_kept: bool) -> float:
        """Enter a backward pass; return the factor for gradients kept from before it.

        A finished mean over total weight W counts W in a later one: each rank's copy counts W/n.
        """
        factor = 1.0
        if not gradients_kept:
            self._local = self._reduced = 0.0
        elif self._reduced:
            factor = self._local = self._reduced / self._ranks
            self._reduced = 0.0
        if weight.stated:
            self._local += weight.value
        elif self._local:
            raise ArgumentError(
                "backward()",
                "weight",
                "not stated for this pass, but for earlier ones whose gradients are accumulated",
                "weigh() before each of the passes that are accumulated, or before none",
            )
        return factor

    @property
    def reduced(self) -> float:
        """The total weight of kept gradients that are a finished mean (0: none, or not stated)."""
        return self._reduced

    @property
    def local(self) -> float:
        """The stated weight in this rank's gradients."""
        return self._local

    def close(self, total: float) -> None:
        """The gradients have become a mean with divisor ``total`` (0: no weights were stated)."""
        self._local, self._reduced = 0.0, total
