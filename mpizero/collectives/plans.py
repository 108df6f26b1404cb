"""Blocking all-reduces within a node, by plans: what was worked out about a call is kept.

Training repeats its calls, and what a small one costs is Python's time more than the memory's. So
the description of a call, its fingerprint and its algorithm are worked out once for each *form*
(dtype, shape, operation, algorithm): ``benchmarks/allreduce.py`` shows what that leaves of a call,
beside mpi4py's own.

Where the sum is formed in shared memory, the data travels with the agreement: a small array takes
one step, in which every rank combines everything; the chunks of a larger one take two.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from mpizero.collectives.agreement import Agreement, fingerprint
from mpizero.collectives.interface import Algorithm
from mpizero.collectives.native import Native
from mpizero.collectives.node_shared import NodeShared
from mpizero.collectives.transport import cut_evenly
from mpizero.memory.board import PAGES, Board
from mpizero.memory.dtypes import is_half
from mpizero.memory.node_shared import NOWHERE, NodeMemory
from mpizero.reduction import Operation, quietly

_MOST_PLANS = 1024

# Up to so many 16-bit numbers are widened by numpy's casts.
_SHORT_HALF = 4096

Form = tuple[Any, ...]  # dtype, shape, name of the operation, algorithm

Rows = Sequence[Any]  # every rank's array, in rank order


@dataclass(frozen=True)
class OneStep:
    """How a small all-reduce goes.

    ``rows[p]``: where the ranks' arrays lie on the board's page p, in the form's shape.
    """

    description: str
    fingerprint: int
    rows: tuple[Rows, ...]
    reduce: Callable[[Rows, Any], None]


@dataclass(frozen=True)
class BySpot:
    """How a larger all-reduce goes: in one of two ways, by where the array lies.

    Where it lies is looked up once: numpy's way to tell an array's address takes as long as an
    exchange. ``seen``: by the array's id, a reference to it, its spot, and the slices of all ranks'
    counterparts that this rank combines.
    """

    description: str
    fingerprint: int
    op: Operation
    shared: Algorithm
    private_one: Algorithm
    private: Callable[[Any], None]  # prepared, by that one
    seen: dict[int, tuple[weakref.ref[Any], int, list[Any]]] = field(default_factory=dict)


Plan = OneStep | BySpot


class Plans:
    """Plans for all-reduces of host arrays over a node's ``board``.

    Every rank must take the same steps, so a plan depends on the form alone, and every such
    all-reduce goes by its plan. Belongs to one thread at a time, like the board.
    """

    def __init__(
        self, board: Board, agreement: Agreement, memory: NodeMemory, node: NodeShared
    ) -> None:
        self._board = board
        self._agreement = agreement
        self._memory = memory
        self._node = node
        self._plans: dict[Form, Plan] = {}
        self.last_algorithm = ""  # as Dispatch.last_algorithm

    def find(self, array: Any, op: Any, algorithm: Any) -> Plan | None:
        """The plan for such an all-reduce, if there has been one."""
        try:
            return self._plans.get((array.dtype, array.shape, op, algorithm))
        except TypeError:  # not hashable: some argument is not what it should be
            return None

    def make(
        self,
        array: Any,
        algorithm: str,
        op: Operation,
        description: str,
        shared: Algorithm,
        private: Algorithm,
    ) -> Plan:
        """Keep a plan for a form that has been found to be right."""
        mine = fingerprint(description)
        plan: Plan
        if private is self._node and self._node.is_small(array):
            plan = OneStep(description, mine, self._rows(array), _reduction_of(array, op))
        else:
            if isinstance(private, Native):
                run = private.prepared(array, op)
            else:
                run = partial(private.all_reduce, op=op)
            plan = BySpot(description, mine, op, shared, private, run)
        if len(self._plans) >= _MOST_PLANS:  # a program without habits: start over
            self._plans.clear()
        self._plans[array.dtype, array.shape, op.name, algorithm] = plan
        return plan

    def carry_out(self, plan: Plan, array: Any) -> None:
        """All-reduce the contiguous ``array``, of the plan's size, in place."""
        if isinstance(plan, OneStep):
            self.last_algorithm = NodeShared.name
            self._take_one_step(plan, array)
        else:
            self._go_by_spot(plan, array)

    def _take_one_step(self, plan: OneStep, array: Any) -> None:
        board = self._board
        rows = plan.rows[board.count % PAGES]
        array = array.reshape(rows[0].shape)  # contiguous: a view
        rows[board.rank][...] = array
        mine = plan.fingerprint
        for note in board.exchange(mine).notes:
            if note[1] != mine:
                self._agreement.explain(plan.description)
        plan.reduce(rows, array)

    def _go_by_spot(self, plan: BySpot, array: Any) -> None:
        known = plan.seen.get(id(array))
        if known is None or known[0]() is not array:
            known = self._look_up(plan, array)
        _, spot, slices = known
        staged = plan.private_one is self._node  # before the agreement, which is the barrier then
        if staged and spot == NOWHERE:
            self._node.stages.stage(array.reshape(-1))
        common = self._agreement.compare(plan.fingerprint, spot, plan.description)
        lies_shared = common is not None and common != NOWHERE
        self.last_algorithm = (plan.shared if lies_shared else plan.private_one).name
        if staged and common == NOWHERE:
            self._node.stages.all_reduce(array.reshape(-1), plan.op)
        elif not lies_shared:
            plan.private(array.reshape(-1))
        elif plan.shared is self._node:
            self._node.all_reduce_slices(slices, plan.op)
        else:
            plan.shared.all_reduce(array.reshape(-1), plan.op)

    def _rows(self, array: Any) -> tuple[Rows, ...]:
        """Where arrays of this form lie on each page, for every rank."""
        nbytes, dtype, shape = array.nbytes, array.dtype, array.shape
        return tuple(
            tuple(payload[:nbytes].view(dtype).reshape(shape) for payload in page.payloads)
            for page in self._board.pages
        )

    def _look_up(self, plan: BySpot, array: Any) -> tuple[weakref.ref[Any], int, list[Any]]:
        flat = array.reshape(-1)
        spot = self._memory.spot(flat)
        slices = []
        if spot != NOWHERE:
            own = cut_evenly(flat.size, self._board.size)[self._board.rank]
            slices = [part[own] for part in self._memory.counterparts(flat, spot)]
        number, seen = id(array), plan.seen
        known = weakref.ref(array, lambda _: seen.pop(number, None)), spot, slices
        seen[number] = known
        return known


def _reduction_of(array: Any, op: Operation) -> Callable[[Rows, Any], None]:
    if not is_half(array.dtype):
        return _reduction(op)
    return _by_numpys_casts(op) if array.size <= _SHORT_HALF else _by_blocks(op)


def _reduction(op: Operation) -> Callable[[Rows, Any], None]:
    run, function, divisor = quietly(), op.function, op.divisor
    if function in (np.maximum, np.minimum):  # the others take ``out`` by place, which is quicker
        function = _with_out(function)

    def reduce(rows: Rows, target: Any) -> None:
        run(function, rows[0], rows[1], target)
        for row in rows[2:]:
            run(function, target, row, target)
        if divisor is not None:
            run(np.divide, target, divisor(), target)

    return reduce


def _by_numpys_casts(op: Operation) -> Callable[[Rows, Any], None]:
    """16-bit rows, widened and rounded by numpy: for short ones its calls cost least."""
    reduce, run = _reduction(op), quietly()

    def reduce_and_round(rows: Rows, target: Any) -> None:
        total = np.empty(target.shape, np.float32)
        reduce(tuple(row.astype(np.float32) for row in rows), total)
        run(np.copyto, target, total, "same_kind")

    return reduce_and_round


def _by_blocks(op: Operation) -> Callable[[Rows, Any], None]:
    def reduce(rows: Rows, target: Any) -> None:
        op.reduce_rows([row.reshape(-1) for row in rows], target.reshape(-1))

    return reduce


def _with_out(function: Any) -> Callable[[Any, Any, Any], None]:
    return lambda first, second, out: function(first, second, out=out)
