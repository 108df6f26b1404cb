"""What ranks hold together they give back together, once each of them has let go of it.

To free a communicator or a shared window is a call that all of its ranks make (MPI 4.1, sections
7.4.3 and 12.2.6). But nobody lets go together: Python drops what nothing refers to any more when it
comes to it, on each rank at a time of its own; a group may be destroyed on some ranks only. So to
let go is only noted. Where ranks come together anyway, to make something new, they tell each other
what they have let go of, and give back what all of its ranks have, in one order. Nobody waits for a
rank that need not come, and who makes things again and again gives as many back.

One book for the process, since a sub-world may outlive the World that it was made from.
"""

from __future__ import annotations

import gc
import itertools
import os
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

# The same on all ranks that hold the thing, and of no other thing of theirs.
Name = tuple[int, ...]

# From so many on, what is held may be what Python's collector of cycles has not come to.
_MANY = 64


class Hold:
    """This rank holds the thing of this ``name`` for as long as somebody refers to this object."""

    def __init__(self, name: Name) -> None:
        self.name = name
        # A finalizer may run at any moment, on any thread: it does no more than this.
        weakref.finalize(self, _noted.append, name).atexit = False


@dataclass(frozen=True)
class _Thing:
    ranks: frozenset[int]  # their numbers in the job
    count: int  # of them: those of another job, which may be among them, have no number
    give_back: Callable[[], None]


_things: dict[Name, _Thing] = {}
_noted: deque[Name] = deque()  # let go of, as finalizers say it
_let_go: set[Name] = set()
_lock = threading.RLock()
_own = int.from_bytes(os.urandom(7), "little")  # of this process, among all that it may meet
_numbers = itertools.count()
_many, _kept = _MANY, 0  # when to look for cycles; how many things are new since then


def new_name(comm: MPI.Intracomm) -> Name:
    """A name for a thing of the ranks of ``comm``. Collective."""
    name: Name = comm.bcast((_own, next(_numbers)))
    return name


def hold(name: Name, ranks: Iterable[int], give_back: Callable[[], None]) -> Hold:
    """Hold a thing that ``give_back`` frees, which all of its ``ranks`` call at a time.

    ``ranks``: their numbers in the job. What ``give_back`` refers to must not refer to the Hold.
    """
    keep(name, ranks, give_back)
    return Hold(name)


def keep(name: Name, ranks: Iterable[int], give_back: Callable[[], None]) -> None:
    """``hold`` for who says ``let_go`` in the end."""
    global _kept
    _kept += 1
    listed = tuple(ranks)
    _things[name] = _Thing(frozenset(listed), len(listed), give_back)


def let_go(name: Name) -> None:
    """This rank needs the thing no more. May be called at any moment, by a finalizer too."""
    _noted.append(name)


def give_back(name: Name) -> None:
    """Give it back now, as all of its ranks do: for what ends together. Twice does nothing."""
    with _lock:
        thing = _things.pop(name, None)
        _let_go.discard(name)
    if thing is not None:
        thing.give_back()


def settle(comm: MPI.Intracomm, ranks: Iterable[int], *, thoroughly: bool = False) -> None:
    """Give back what the ranks of ``comm`` hold and have all let go of. Collective over it.

    ``ranks``: their numbers in the job. ``thoroughly``: also what Python has only to look for.
    """
    _collect_cycles(thoroughly)
    with _offered(frozenset(ranks)) as mine:
        said = Counter(itertools.chain.from_iterable(comm.allgather(mine)))
        agreed = [name for name in mine if said[name] == _things[name].count]
        # All of them, also where one fails: the other ranks go on to the next.
        errors: list[Exception] = []
        for name in agreed:
            try:
                give_back(name)
            except Exception as error:
                errors.append(error)
    if errors:
        raise errors[0]


def forget_all() -> None:
    """A rank has died: what it held, too, nobody can give back."""
    with _lock:
        _things.clear()
        _let_go.clear()


def held() -> int:
    """How many things have not been given back."""
    return len(_things)


@contextmanager
def _offered(present: frozenset[int]) -> Iterator[list[Name]]:
    """What this rank has let go of, and only ``present`` ranks hold, in an order all have.

    Meanwhile no other thread offers it, which may be making something with other ranks.
    """
    with _lock:
        while _noted:
            _let_go.add(_noted.popleft())
        _let_go.intersection_update(_things)
        mine = sorted(name for name in _let_go if _things[name].ranks <= present)
        _let_go.difference_update(mine)
    try:
        yield mine
    finally:
        with _lock:
            _let_go.update(name for name in mine if name in _things)


def _collect_cycles(thoroughly: bool) -> None:
    """Let Python look for cycles that hold things: by itself it might come too late, or never."""
    global _many, _kept
    if _in_use() >= _many or (thoroughly and _kept):
        gc.collect()
        _many, _kept = max(_MANY, 2 * _in_use()), 0


def _in_use() -> int:
    return len(_things) - len(_let_go) - len(_noted)
