"""Collectives in which all ranks have equal parts."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from mpizero.api.call import Call
from mpizero.api.calls import Calls
from mpizero.api.describe import check_form, describe
from mpizero.collectives.dispatch import Dispatch, Parts
from mpizero.collectives.plans import Plan, Plans
from mpizero.collectives.transport import cut_evenly
from mpizero.diagnostics import Lanes
from mpizero.errors import ArgumentError
from mpizero.memory.arrays import overlap
from mpizero.memory.order import opened
from mpizero.progress import Handle, Worker
from mpizero.reduction import operation


class EvenCalls(Calls):
    """``allreduce``, ``reduce_scatter``, ``allgather``, ``broadcast``, ``all_to_all``, ..."""

    _lanes: Lanes
    _worker: Worker
    _plans: Plans | None
    _in_order: bool

    def allreduce(
        self,
        x: Any,
        op: str = "sum",
        *,
        out: Any = None,
        asynchronous: bool = False,
        algorithm: str = "auto",
    ) -> Any:
        """Combine ``x`` over all ranks, element by element; every rank gets the same bits.

        In place: ``x`` holds the result and is returned; with ``out`` (same shape and dtype),
        ``x`` stays as it is. A Python or numpy scalar is returned as a new scalar.

        ``op``: "sum", "mean", "max", "min", "product", and of bits "band", "bor", "bxor". float16
        and bfloat16 are summed in float32 in a fixed order and rounded once; max and min pass NaN
        on. "mean" wants floating or complex numbers, those of bits integers or booleans. Raises
        ArgumentError and MismatchError.
        """
        # Where the two kinds of calls have one order, they must go alike.
        plans = None if asynchronous and not self._in_order else self._plans
        if plans is not None and not asynchronous and type(x) is np.ndarray and out is None:
            plan = plans.find(x, op, algorithm)
            if plan is not None and x.flags.carray:  # contiguous, aligned and writable
                if not self._in_order:
                    self._repeat(plans, plan, x)
                    return x
                if self._worker.take_turn():
                    try:
                        self._repeat(plans, plan, x)
                    finally:
                        self._worker.give_turn()
                    return x
        if isinstance(x, (numbers.Number, np.generic)):
            return self._reduce_scalar(x, op, asynchronous, algorithm)

        def prepare() -> Call:
            source = self._open(x, "allreduce()", "x", writable=out is None)
            target = source if out is None else self._open(out, "allreduce()", "out", writable=True)
            check_form("allreduce()", target, source.shape, source.dtype, source)
            self._caller.check_algorithm(algorithm, "all_reduce", source.array)
            combine = operation(op, source.dtype, self.size, "allreduce()")
            what = describe("allreduce", source, op, algorithm)
            plan = self._caller.plan(source.array, combine, algorithm, what) if plans else None

            def fill() -> None:
                target.flat[...] = source.flat

            def work(run: Dispatch, parts: Parts) -> Any:
                if plans is not None and plan is not None:
                    plans.carry_out(plan, target.flat)
                    run.last_algorithm = plans.last_algorithm
                else:
                    run.all_reduce(target.flat, combine, algorithm, parts)
                return target.commit()

            return Call(
                what,
                work,
                opened(target, source),
                agrees_itself=plan is not None,
                fill=None if target is source else fill,
            )

        return self._caller.perform(prepare, asynchronous)

    def _repeat(self, plans: Plans, plan: Plan, x: Any) -> None:
        """An all-reduce like one that came before: all has been looked up."""
        lane, one_thread = self._lanes.blocking, self._caller.one_thread
        entered = one_thread.enter(plan.description)
        try:
            at = lane.begin(plan.description, x.nbytes, lane.recorder.here())
            try:
                plans.carry_out(plan, x)
            except Exception as error:
                self._caller.settle(error)
                raise
            finally:
                lane.end(at, plans.last_algorithm)
        finally:
            if entered:
                one_thread.leave()

    def reduce_scatter(
        self,
        x: Any,
        op: str = "sum",
        *,
        out: Any = None,
        asynchronous: bool = False,
        algorithm: str = "auto",
    ) -> Any:
        """Combine ``x`` over all ranks; rank r gets the r-th part of the result's first axis.

        ``x``: shape (size * k, ...), left as it is. Returns a new array, or ``out``, of shape
        (k, ...). ``op`` as in ``allreduce``. Raises ArgumentError if the first axis is no
        multiple of the number of ranks.
        """

        def prepare() -> Call:
            source = self._open(x, "reduce_scatter()", "x", writable=False)
            shape = self._part_shape("reduce_scatter()", source)
            target = self._target("reduce_scatter()", source, out, shape)
            self._caller.check_algorithm(algorithm, "reduce_scatter", source.array)
            combine = operation(op, source.dtype, self.size, "reduce_scatter()")

            def work(run: Dispatch, parts: Parts) -> Any:
                run.reduce_scatter(source.flat, target.flat, combine, algorithm, parts)
                return target.commit()

            what = describe("reduce_scatter", source, op, algorithm)
            return Call(what, work, opened(source, target))

        return self._caller.perform(prepare, asynchronous)

    def allgather(
        self, x: Any, *, out: Any = None, asynchronous: bool = False, algorithm: str = "auto"
    ) -> Any:
        """Put the ranks' arrays behind one another along the first axis, on every rank.

        ``x``: shape (k, ...), any dtype. Returns a new array, or ``out``, of shape
        (size * k, ...); (size,) for a zero-dimensional ``x``. ``x`` may be this rank's own part of
        ``out``, where its values are to be.
        """

        def prepare() -> Call:
            source = self._open(x, "allgather()", "x", writable=False)
            first, *rest = source.shape or (1,)
            shape = (self.size * first, *rest)
            target = self._target("allgather()", source, out, shape, own_part=True)
            self._caller.check_algorithm(algorithm, "all_gather", source.array)

            in_place = self.size > 1 and overlap(source.flat, target.flat)
            blocks = cut_evenly(target.flat.size, self.size)

            def work(run: Dispatch, parts: Parts) -> Any:
                if in_place:
                    run.gather_blocks(target.flat, blocks, parts)
                else:
                    run.all_gather(source.flat, target.flat, algorithm)
                return target.commit()

            what = describe("allgather", source, algorithm, *(["in place"] if in_place else []))
            both = (target, source) if in_place else (source, target)
            return Call(what, work, opened(*both))

        return self._caller.perform(prepare, asynchronous)

    def broadcast(
        self, x: Any, root: int = 0, *, asynchronous: bool = False, algorithm: str = "auto"
    ) -> Any:
        """Give every rank the ``root``'s ``x``, in place (any shape and dtype); returns ``x``."""

        def prepare() -> Call:
            self._check_rank("broadcast()", "root", root)
            target = self._open(x, "broadcast()", "x", writable=self.rank != root)
            self._caller.check_algorithm(algorithm, "broadcast", target.array)

            def work(run: Dispatch, parts: Parts) -> Any:
                run.broadcast(target.flat, root, algorithm)
                return target.original if self.rank == root else target.commit()

            return Call(describe("broadcast", target, root, algorithm), work, opened(target))

        return self._caller.perform(prepare, asynchronous)

    def all_to_all(
        self, x: Any, *, out: Any = None, asynchronous: bool = False, algorithm: str = "auto"
    ) -> Any:
        """Send the r-th part of ``x``'s first axis to rank r, for all r.

        ``x``: shape (size * k, ...), any dtype. Returns a new array, or ``out``, of that shape
        whose s-th part came from rank s.
        """

        def prepare() -> Call:
            source = self._open(x, "all_to_all()", "x", writable=False)
            self._part_shape("all_to_all()", source)
            target = self._target("all_to_all()", source, out, source.shape)
            self._caller.check_algorithm(algorithm, "all_to_all", source.array)

            def work(run: Dispatch, parts: Parts) -> Any:
                run.all_to_all(source.flat, target.flat, algorithm)
                return target.commit()

            return Call(describe("all_to_all", source, algorithm), work, opened(source, target))

        return self._caller.perform(prepare, asynchronous)

    def barrier(self, *, asynchronous: bool = False) -> Handle | None:
        """Wait until every rank has come here; ``asynchronous``: with a handle's ``wait``."""
        # The agreement that precedes every call is a barrier by itself.
        found: Handle | None = self._caller.perform(
            lambda: Call("barrier()", lambda run, parts: None), asynchronous
        )
        return found

    def _reduce_scalar(self, x: Any, op: str, asynchronous: bool, algorithm: str) -> Any:
        if asynchronous:

            def refuse() -> Call:
                raise ArgumentError(
                    "allreduce()",
                    "x",
                    "a scalar with asynchronous=True",
                    "an array",
                    "np.asarray(x)",
                )

            return self._caller.perform(refuse, True)
        # A Python integer on one rank and a float on another would be different dtypes; the
        # agreement says so.
        with self.telling():
            array = np.array(x)
        result = self.allreduce(array, op, algorithm=algorithm)[()]
        return result if isinstance(x, np.generic) else result.item()
