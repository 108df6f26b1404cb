"""All-reduce of small arrays in one step: the data travels with the agreement.

Training is full of them (losses, norms, counts), and what they cost is Python's time more than the
memory's. So what can be known from the form of a call is worked out once and kept as a ``Plan``:
``benchmarks/allreduce.py`` shows what that leaves of a call, beside mpi4py's own.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpizero.collectives.agreement import Agreement, fingerprint
from mpizero.memory.board import Board
from mpizero.memory.dtypes import is_half
from mpizero.reduction import Operation

Form = tuple[Any, ...]  # dtype, shape, name of the operation, algorithm

Rows = tuple[Any, ...]  # every rank's array, in rank order


@dataclass(frozen=True)
class Plan:
    """How an all-reduce of one form goes.

    ``rows[p]``: where the ranks' arrays lie on the board's page p, in the form's shape.
    """

    description: str
    fingerprint: int
    rows: tuple[Rows, ...]
    reduce: Callable[[Rows, Any], None]


class SmallAllReduce:
    """Small all-reduces over a node's ``board``. Belongs to one thread at a time, like the board.

    Every rank must take this way for a form, or none: so it depends on the form alone.
    """

    def __init__(self, board: Board, agreement: Agreement) -> None:
        self._board = board
        self._agreement = agreement
        self._plans: dict[Form, Plan] = {}

    def find(self, form: Form) -> Plan | None:
        """The plan for a form, if it has been made."""
        try:
            return self._plans.get(form)
        except TypeError:  # not hashable: some argument is not what it should be
            return None

    def make(self, form: Form, description: str, op: Operation) -> Plan:
        """The plan for a form that has been found to be right."""
        found = self._plans.get(form)
        if found is None:
            dtype, shape, *_ = form
            nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            rows = tuple(
                tuple(payload[:nbytes].view(dtype).reshape(shape) for payload in page.payloads)
                for page in self._board.pages
            )
            reduce = _widened_reduction(op) if is_half(dtype) else _reduction(op)
            found = self._plans[form] = Plan(description, fingerprint(description), rows, reduce)
        return found

    def run(self, plan: Plan, source: Any, target: Any) -> None:
        """Combine every rank's ``source`` into ``target`` (any strides; may be the same array)."""
        board = self._board
        rows = plan.rows[board.count & 1]
        rows[board.rank][...] = source
        mine = plan.fingerprint
        for note in board.exchange(mine).notes:
            if note[1] != mine:
                self._agreement.explain(plan.description)
        plan.reduce(rows, target)


def _reduction(op: Operation) -> Callable[[Rows, Any], None]:
    # NaN and overflow are the user's to see in the result. Numpy's error state is a context
    # variable: a context that ignores them is entered in a fifth of the time of np.errstate.
    quietly = contextvars.copy_context()
    quietly.run(np.seterr, all="ignore")
    function, divisor = op.function, op.divisor
    if function in (np.maximum, np.minimum):  # the others take ``out`` by place, which is quicker
        function = _with_out(function)

    def reduce(rows: Rows, target: Any) -> None:
        quietly.run(function, rows[0], rows[1], target)
        for row in rows[2:]:
            quietly.run(function, target, row, target)
        if divisor is not None:
            quietly.run(np.divide, target, divisor(), target)

    return reduce


def _with_out(function: Any) -> Callable[[Any, Any, Any], None]:
    return lambda first, second, out: function(first, second, out=out)


def _widened_reduction(op: Operation) -> Callable[[Rows, Any], None]:
    def reduce(rows: Rows, target: Any) -> None:
        flat = [row.reshape(-1) for row in rows]
        total = np.empty_like(flat[0])
        op.reduce_rows(flat, total)
        target[...] = total.reshape(target.shape)

    return reduce
