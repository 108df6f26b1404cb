"""How much the batch at hand counts: set by a loader or by ``weigh``, read by whoever averages.

A cell per process rather than an argument, because the loader that knows and the module that
needs to know meet only in the user's loop, which should not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mpizero.engine import Weight

_UNIT = Weight()
_of_loaders: list[float] = []  # innermost loop last
_stated: Weight | None = None


@contextmanager
def loop() -> Iterator[None]:
    """A loop over a sharded loader, perhaps inside another one (an evaluation in an epoch)."""
    _of_loaders.append(1.0)
    depth = len(_of_loaders)
    try:
        yield
    finally:
        del _of_loaders[depth - 1 :]


def set_relative(weight: float) -> None:
    """The innermost loop's batch weighs ``weight`` (1 = the mean over ranks)."""
    _of_loaders[-1] = weight


def state(weight: Weight | None) -> None:
    """Remember the weight that was stated for the pass under way (None: it is over)."""
    global _stated
    _stated = weight


def current(stated: Weight | None = None) -> Weight:
    """The weight of the batch at hand: the stated one, else the loader's, else 1.

    A rank that its loader has left idle weighs nothing, whatever is stated for its filler batch.
    """
    relative = _of_loaders[-1] if _of_loaders else 1.0
    if stated is not None:
        return stated if relative > 0 else Weight(0.0, stated=True)
    return _UNIT if relative == 1.0 else Weight(relative)


def of_pass() -> float:
    """What the loss of the pass under way counts, for those who average inside it."""
    return current(_stated).value


def fed(values: Any, stated: Weight | None) -> tuple[Weight, Any]:
    """What a module is fed, and what it weighs."""
    return current(stated), values


@contextmanager
def under_way(weight: Weight) -> Iterator[None]:
    """A forward of a batch of this weight."""
    state(weight if weight.stated else None)
    yield


def doubt() -> str | None:
    """Why the weight of a batch that did not come through a wrapper's forward is unknown."""
    weight = current().value
    return None if weight == 1.0 else f"a batch that weighs {weight} is at hand"
