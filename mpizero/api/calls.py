"""What the calls of a ``World`` have in common: arrays opened and checked, room for results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mpizero.api.describe import check_form
from mpizero.errors import ArgumentError
from mpizero.memory.arrays import OpenArray, empty_like, open_array, overlap, same_place
from mpizero.world import Group


class Calls(Group):
    """A group whose ranks make calls together. ``World`` is put together from kinds of them."""

    _caller: Any

    @contextmanager
    def telling(self) -> Iterator[None]:
        """What precedes a collective call: if it fails on this rank, the others are told.

        They get a MismatchError that quotes it from the blocking call that they make next. So there
        must be one, on the other ranks; where there may be none, see ``together``.
        """
        with self._caller.telling():
            yield

    def settle(self, error: BaseException) -> None:
        """All ranks have been told of ``error`` in another way: ``telling`` lets it pass."""
        self._caller.settle(error)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """What all ranks do, or none: if it fails on one rank in here, it does on all. Collective.

        The others get a MismatchError that quotes the error: from the next blocking call that they
        make in here, or in the end, when all agree that ``what`` is done.
        """
        with self.telling():
            yield
        self._caller.agree(f"{what}: done")

    def _open(self, x: Any, function: str, argument: str, *, writable: bool) -> OpenArray:
        opened = open_array(x, function, argument, writable=writable)
        self.device.check(opened.array, function, argument)
        return opened

    def _check_rank(self, function: str, argument: str, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ArgumentError(function, argument, str(rank), f"0 to {self.size - 1}")

    def _part_shape(self, function: str, source: OpenArray) -> tuple[int, ...]:
        if not source.shape or source.shape[0] % self.size:
            raise ArgumentError(
                function,
                "x",
                f"an array of shape {source.shape}",
                f"one whose first axis is a multiple of the {self.size} ranks",
                "Pad it, or use allreduce().",
            )
        return (source.shape[0] // self.size, *source.shape[1:])

    def _target(
        self,
        function: str,
        source: OpenArray,
        out: Any,
        shape: tuple[int, ...],
        own_part: bool = False,
    ) -> OpenArray:
        """``out``, or a new array. ``own_part``: the source may be this rank's part of it."""
        if out is None:
            out = empty_like(source.array, shape)
        target = self._open(out, function, "out", writable=True)
        check_form(function, target, shape, source.dtype, source)
        if self.size > 1 and source.flat.size and overlap(source.flat, target.flat):
            own = slice(self.rank * source.flat.size, (self.rank + 1) * source.flat.size)
            if own_part and same_place(source.flat, target.flat[own]):
                return target
            raise ArgumentError(function, "out", "memory of x", "memory of its own")
        return target
