"""``Opening``: what the ranks tell each other when a reduced backward pass begins.

One small all-reduce ahead of the gradients, in the same lane: whoever reduces a piece of them knows
already how much each rank counts, and whether anybody trains what is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mpizero.api import World
from mpizero.engine.weights import Merge
from mpizero.memory.order import on_host
from mpizero.reduction.operation import SUM, operation

# Below this a mark's square, summed over the ranks, is exact in float64.
MARKS = 1 << 20


class News(NamedTuple):
    """One rank's numbers; the sum over the ranks is what all get to know."""

    active: float = 0.0  # is it a pass of its own, not one that it takes part in for the others?
    stated: float = 0.0  # was its weight stated?
    weight: float = 0.0  # the stated weight in its gradients
    uneven: float = 0.0  # is the factor of its gradients another than 1?
    changed: float = 0.0  # have its module's buffers changed?
    late: float = 0.0  # how many parameters does it train that have no place yet?
    keeps: float = 0.0  # does the pass add to a mean that is kept?
    over_all: float = 0.0  # is the mean over all ranks, those without a pass of their own too?
    marks: float = 0.0  # a number for what was done since the last pass: equal if the same was
    squared_marks: float = 0.0
    updates: float = 0.0  # is it no pass, but an update of sharded parameters?

    @property
    def marks_differ(self) -> bool:
        """Of sums over the ranks: have those with a pass of their own not all the same number?"""
        return self.squared_marks * self.active != self.marks**2


_COUNT = len(News())


class Opening:
    """Sends this rank's ``News``, and says what the ranks' sums are.

    ``trained``: for each piece, does this rank train anything in it? ``merge``: how its gradients
    lie there.
    """

    def __init__(
        self, world: World, news: News, trained: Sequence[bool] = (), merge: Merge | None = None
    ) -> None:
        self._world, self._own = world, news
        self._factor = merge.factor if merge is not None else 1.0
        self._sums = np.array([*news, *trained], np.float64)
        self._largest = np.array([self._factor])
        self._checked = False
        sums, largest = self._sums, self._largest
        uneven = News._fields.index("uneven")

        def exchange(run: Any, parts: Any) -> None:
            run.all_reduce(sums, SUM)
            if sums[uneven]:
                run.all_reduce(largest, operation("max", largest.dtype, world.size, "backward()"))

        touched = on_host(sums, largest)
        self._handle = world.submit("the opening of a backward pass", exchange, touched)

    def wait(self) -> News:
        """The sums over the ranks."""
        self._handle.wait()
        return News(*self._sums[:_COUNT].tolist())

    def trained(self, piece: int) -> bool:
        """Does any rank train something in this piece?"""
        self._handle.wait()
        return _COUNT + piece >= self._sums.size or bool(self._sums[_COUNT + piece])

    @property
    def scale(self) -> float:
        """What this rank's gradients are multiplied by before they are summed: 1 or less."""
        self.wait()
        largest = float(self._largest[0])
        return self._factor / largest if largest else 0.0

    @property
    def divisor(self) -> float:
        """What the sum of what has been scaled is divided by."""
        sums = self.wait()
        ranks = float(self._world.size) if sums.over_all else sums.active
        whole = sums.weight if sums.stated else ranks
        largest = float(self._largest[0]) if sums.uneven else 1.0
        return whole / largest if whole and largest else 1.0

    def check(self) -> News:
        """The sums; MismatchError if only some ranks have stated a weight. Collective then."""
        sums = self.wait()
        if sums.stated and sums.stated != sums.active and not self._checked:
            self._checked = True
            mine = "stated a weight with weigh()" if self._own.stated else "stated no weight"
            self._world.agree([mine], "the weights of this step")
        return sums
