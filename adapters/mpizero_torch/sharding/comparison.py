"""Have all ranks done the same? One small message, unless they have not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpizero import World
from mpizero.memory.order import on_host
from mpizero.reduction.operation import SUM

# Below 2^20 a number's square, summed over the ranks, is exact in float64.
_WORD_BITS, _WORDS = 20, 3


def compare(world: World, digests: Sequence[int], description: str, where: str, sure: bool) -> None:
    """Raise MismatchError, with the ranks' descriptions, unless all have the same. Collective.

    ``where``: in which call; ``sure``: that all ranks are in it (see ``World.submit``).
    """
    if world.size == 1:
        return
    words = [
        digest >> (_WORD_BITS * at) & ((1 << _WORD_BITS) - 1)
        for digest in digests
        for at in range(_WORDS)
    ]
    sums = np.array([*words, *(word * word for word in words)], np.float64)
    world.submit(
        f"{where}: comparing gradients and parameters",
        lambda run, parts: run.all_reduce(sums, SUM),
        on_host(sums),
        sure=sure,
    ).wait()
    values, squares = sums.reshape(2, -1)
    if (squares * world.size != values**2).any():
        world.agree([description, *map(hex, digests)], f"{where}: gradients or parameters")
