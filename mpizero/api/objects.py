"""Picklable objects between the ranks. What fails on one of them is told to the others.

An object can fail to be pickled on the rank that has it, and to be unpickled on one that gets it:
the code that does it is the user's. So it is pickled before the ranks agree, and where unpickling
runs any code of a class, they agree once more that all have done it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from mpizero.api.call import Call
from mpizero.api.calls import Calls
from mpizero.collectives.dispatch import Dispatch, Parts

# For more than this a rank may lack the memory.
_SMALL_BYTES = 1 << 20


class ObjectCalls(Calls):
    """``gather_objects`` and ``broadcast_object``."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's picklable ``value``, in rank order, on every rank. For small things.

        What cannot be pickled, or unpickled, raises its own error there, and MismatchError on the
        other ranks.
        """
        function = "gather_objects()"

        def prepare() -> Call:
            own = _Pickle(value)

            def work(run: Dispatch, parts: Parts) -> Any:
                heads = np.empty((self.size, 2), np.int64)
                run.comm.Allgather(own.head, heads)
                ends = [0, *accumulate(heads[:, 0].tolist())]
                places = [slice(a, b) for a, b in pairwise(ends)]
                data = _room(run, function, ends[-1])
                data[places[self.rank]] = own.data
                run.gather_blocks(data, places, None)
                is_plain = bool(heads[:, 1].all())
                return _unpickled(run, function, [data[place] for place in places], is_plain)

            return Call(function, work)

        found: list[Any] = self._caller.perform(prepare, False)
        return found

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """The ``root``'s picklable ``value`` on every rank. For small things.

        Errors as ``gather_objects``'s.
        """
        function = "broadcast_object()"

        def prepare() -> Call:
            self._check_rank(function, "root", root)
            own = _Pickle(value) if self.rank == root else None

            def work(run: Dispatch, parts: Parts) -> Any:
                head = np.empty(2, np.int64) if own is None else own.head
                run.comm.Bcast(head, root)
                nbytes, is_plain = head.tolist()
                data = _room(run, function, nbytes)
                if own is not None:
                    data[...] = own.data
                run.broadcast(data, root)
                [found] = _unpickled(run, function, [data], bool(is_plain))
                return found

            return Call(f"broadcast_object(root={root})", work)

        return self._caller.perform(prepare, False)


class _Pickle:
    """A pickled object: ``head`` says how long it is, and if it is of Python's own types alone."""

    def __init__(self, value: Any) -> None:
        stream = io.BytesIO()
        pickler = _Pickler(stream, pickle.HIGHEST_PROTOCOL)
        pickler.dump(value)
        self.data = np.frombuffer(stream.getbuffer(), np.uint8)
        self.head = np.array((self.data.size, pickler.is_plain), np.int64)


class _Pickler(pickle.Pickler):
    is_plain = True

    def reducer_override(self, value: Any) -> Any:
        """Asked about everything but numbers, strings and Python's own containers."""
        self.is_plain = False
        return NotImplemented


def _room(run: Dispatch, function: str, nbytes: int) -> Any:
    if nbytes <= _SMALL_BYTES:
        return np.empty(nbytes, np.uint8)
    with run.together(f"{function}: there is room for {nbytes} bytes"):
        return np.empty(nbytes, np.uint8)


def _unpickled(run: Dispatch, function: str, pickles: Sequence[Any], is_plain: bool) -> list[Any]:
    if is_plain:  # runs no code that could fail
        return [pickle.loads(each) for each in pickles]
    with run.together(f"{function}: all has been unpickled"):
        return [pickle.loads(each) for each in pickles]
