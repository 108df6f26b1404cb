"""Lanes: each of several reducers has an order of its own for what it sends.

In one backward pass the gradients of several models may come, on each rank in another order (a
parameter that only some ranks use is enough). If all were submitted to one queue, ranks would send
different things to each other. So the first reducer of a World has the World itself, and each
further one, as long as it lives, a sub-world of the same ranks.
"""

from __future__ import annotations

import itertools
import weakref

from mpizero.api import World

_made = itertools.count()


class Lane:
    """The ``number``-th lane of a World; free again when nobody holds it any more.

    ``order``: lanes were made in this order on all ranks that share them. Who has to finish with
    several does so in that order.
    """

    def __init__(self, number: int, world: World) -> None:
        self.number, self.world = number, world
        self.order = next(_made)


_taken: weakref.WeakKeyDictionary[World, weakref.WeakValueDictionary[int, Lane]] = (
    weakref.WeakKeyDictionary()
)


def take_lane(world: World) -> Lane:
    """The first lane of ``world`` that no rank uses. Collective.

    Ranks let go of a lane at different times, whenever Python collects what held it. All lanes but
    the first carry out what they are given on a thread, where MPI allows it, so that a rank which
    waits for one does not keep the others from moving.
    """
    taken = _taken.setdefault(world, weakref.WeakValueDictionary())
    everyones = world.gather_objects(sorted(taken)) if world.size > 1 else [sorted(taken)]
    in_use = set[int]().union(*everyones)
    number = next(n for n in itertools.count() if n not in in_use)
    of = world if number == 0 else world.part(f"lane {number}", 0, threaded=True)
    lane = taken[number] = Lane(number, of)
    return lane
