"""What is decided, drawn and said once in a job: ``agree``, ``seed``, ``print0``."""

from __future__ import annotations

from typing import Any

from mpizero import ArgumentError, World
from mpizero_torch.random_state import derive, seed_all
from mpizero_torch.runtime import init
from mpizero_torch.weighed_batches import stripped


def agree(value: Any, *, root: int = 0, world: World | None = None) -> Any:
    """What rank ``root`` has decided, on every rank: its picklable ``value``. Collective.

    For decisions that must not differ, as when to stop: each rank may take it for itself, from
    numbers or clocks of its own, and all act on one. Raises ArgumentError for a rank that there is
    not; what cannot be pickled raises its own error there and MismatchError on the others.
    """
    world = world if world is not None else init()
    return world.broadcast_object(stripped(value), root)


def seed(number: int, *, alike: bool = False, world: World | None = None) -> None:
    """Seed Python's, numpy's and torch's generators, on each rank differently. Sends nothing.

    Rank 0 gets ``number`` itself, as one process would; the others what follows from ``number`` and
    their rank: so dropout, noise and augmentations differ between the ranks. Weights do not:
    ``DistributedDataParallel`` and ``zero`` take rank 0's, which are those of one process with the
    same seed. ``alike``: the same on all ranks, for models that each rank builds a part of (in
    ``deferred()``, tensor or pipeline parallel); seed once more, without it, when they are built.

    Samples are dealt by the ``seed`` of ``shard``, not by this. ``number``: 0 to 2^63 - 1; others
    raise ArgumentError.
    """
    if type(number) is not int or not 0 <= number < 2**63:
        raise ArgumentError("seed()", "number", repr(number), "an integer, 0 to 2^63 - 1")
    world = world if world is not None else init()
    seed_all(number if alike or world.rank == 0 else derive(number, world.rank))


def print0(*values: Any, world: World | None = None, **options: Any) -> None:
    """``print``, on rank 0 only, and at once (``flush=True``). Takes print's options."""
    world = world if world is not None else init()
    if world.rank == 0:
        print(*values, **{"flush": True, **options})
