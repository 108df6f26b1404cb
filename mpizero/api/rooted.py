"""Collectives with a root: what only one rank gets, or gives."""

from __future__ import annotations

from typing import Any

from mpizero.api.call import Call
from mpizero.api.calls import Calls
from mpizero.api.describe import describe
from mpizero.collectives.dispatch import Dispatch, Parts
from mpizero.errors import ArgumentError
from mpizero.memory.arrays import on_device
from mpizero.memory.order import opened
from mpizero.reduction import operation


class RootedCalls(Calls):
    """``reduce``, ``gather`` and ``scatter``."""

    def reduce(self, x: Any, root: int = 0, op: str = "sum", *, asynchronous: bool = False) -> Any:
        """Combine ``x`` over all ranks, element by element, for the ``root``; returns ``x``.

        The root's ``x`` holds the result afterwards, the other ranks' stay as they are. ``op`` and
        how 16-bit floats are summed: as in ``allreduce``. Raises ArgumentError and MismatchError.
        """

        def prepare() -> Call:
            self._check_rank("reduce()", "root", root)
            is_root = self.rank == root
            target = self._open(x, "reduce()", "x", writable=is_root)
            combine = operation(op, target.dtype, self.size, "reduce()")

            def work(run: Dispatch, parts: Parts) -> Any:
                run.reduce(target.flat, root, combine, parts)
                return target.commit() if is_root else target.original

            return Call(describe("reduce", target, op, root), work, opened(target))

        return self._caller.perform(prepare, asynchronous)

    def gather(self, x: Any, root: int = 0, *, out: Any = None, asynchronous: bool = False) -> Any:
        """Put the ranks' arrays behind one another along the first axis, on the ``root``.

        ``x``: shape (k, ...), any dtype. Returns a new array, or ``out``, of shape
        (size * k, ...) on the root ((size,) for a zero-dimensional ``x``), and None elsewhere.
        """

        def prepare() -> Call:
            self._check_rank("gather()", "root", root)
            source = self._open(x, "gather()", "x", writable=False)
            first, *rest = source.shape or (1,)
            shape = (self.size * first, *rest)
            target = self._target("gather()", source, out, shape) if self.rank == root else None

            def work(run: Dispatch, parts: Parts) -> Any:
                run.gather(source.flat, None if target is None else target.flat, root)
                return None if target is None else target.commit()

            return Call(describe("gather", source, root), work, opened(source, target))

        return self._caller.perform(prepare, asynchronous)

    def scatter(self, x: Any, root: int = 0, *, out: Any, asynchronous: bool = False) -> Any:
        """Give rank r the r-th part of the first axis of the ``root``'s ``x``, in ``out``.

        ``x``: shape (size * k, ...) on the root; not looked at elsewhere. ``out``: shape (k, ...),
        or () where k is 1 and ``x`` has one axis; returned.
        """

        def prepare() -> Call:
            self._check_rank("scatter()", "root", root)
            target = self._open(out, "scatter()", "out", writable=True)
            source = None
            if self.rank == root:
                source = self._open(x, "scatter()", "x", writable=False)
                first, *rest = target.shape or (1,)
                wanted = (self.size * first, *rest)
                moved = on_device(source.array) != on_device(target.array)
                if source.shape != wanted or source.dtype != target.dtype or moved:
                    raise ArgumentError(
                        "scatter()", "x", f"an array of {source.dtype}, shape {source.shape}",
                        f"an array of {target.dtype}, shape {wanted}, where out lies",
                    )  # fmt: skip

            def work(run: Dispatch, parts: Parts) -> Any:
                run.scatter(None if source is None else source.flat, target.flat, root)
                return target.commit()

            return Call(describe("scatter", target, root), work, opened(target, source))

        return self._caller.perform(prepare, asynchronous)
