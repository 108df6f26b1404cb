"""What a batch counts: handed out with it by loaders, asked for by whoever averages.

A batch that may weigh other than 1 carries its weight (see ``weighed_tensor``): so it is known
what a module is fed with, in whatever order batches are drawn, kept and used. A tensor without a
mark was not computed from such a batch and weighs 1; unless content of one has gone where it could
not be followed: then nobody can know, and it has to be stated.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from mpizero import ArgumentError
from mpizero.engine import Weight
from mpizero_torch.weighed_batches import handed_on, marked, marks_in, stripped
from mpizero_torch.weighed_tensor import (
    Mark,
    Outlet,
    doubtful,
    following,
    joint,
    live,
    outlets,
    weighs,
)

IDLE = Weight(0.0, stated=True)  # of the filler batch of an idle rank, whatever is stated
_UNIT = Weight()
_REMEDY = (
    "State it: model.weigh(loader.weight) before each forward, on all ranks; or deal out even "
    "batches (drop_last=True); or let go of the iterator and the loader, if they are done with."
)


class Loop:
    """A loop over what a loader hands out: open from its first batch to its end.

    ``uneven``: some of its batches may weigh other than 1. As long as there is such a loop, or one
    of its batches, all batches carry their weight, those of other loops too: so what is mixed of
    several is not taken for one of them.
    """

    def __init__(self, outlet: Outlet, uneven: bool) -> None:
        self.weight = 1.0  # of the batch at hand
        self.mark: Mark | None = None
        self._outlet, self._has_begun = outlet, False
        if uneven:
            with _lock:
                _uneven.add(self)

    @property
    def outlet(self) -> Outlet:
        """Its loader's."""
        return self._outlet

    def hand_out(self, batch: Any, weight: float) -> Any:
        """The next batch, which is at hand from now on."""
        self.weight, self.mark = weight, None
        if not self._has_begun:
            self._has_begun = True
            self._forget()
        with _lock:
            _open.add(self)
        if weight != 1.0 or _uneven or live:
            self.mark = Mark(weight, self._outlet)
            return marked(batch, self.mark)
        return batch

    def _forget(self) -> None:
        """What numbers there are of earlier loops: sums are of the last one, or of open ones."""
        self._outlet.has_numbers = False
        self._outlet.fillers.clear()
        with _lock:
            for each in () if _open else outlets:
                each.fillers.clear()

    def end(self) -> None:
        """No batch is at hand any more."""
        self.weight, self.mark = 1.0, None
        with _lock:
            _open.discard(self)
            _uneven.discard(self)


_open: weakref.WeakSet[Loop] = weakref.WeakSet()
_uneven: weakref.WeakSet[Loop] = weakref.WeakSet()
_lock = threading.Lock()


class _Pass(threading.local):
    """The forward under way in this thread, and what was fed last."""

    weight: Weight | None = None
    mark: Mark | None = None


_pass = _Pass()
_last_fed: weakref.ref[Mark] | None = None


@dataclass(frozen=True)
class _Unknown(Weight):
    """Stands for a weight where none is needed, as nothing is to be averaged; until it is."""

    why: str = ""


def hand_out(batch: Any, weight: float) -> Any:
    """The batch, which carries its weight where that is not 1."""
    return batch if weight == 1.0 else marked(batch, Mark(weight))


def fed(values: Any, stated: Weight | None) -> tuple[Weight, Any]:
    """What a module is fed with weighs, and the same with plain tensors.

    A stated weight holds, but for the filler batch of an idle rank it is IDLE. Raises ArgumentError
    where it cannot be known.
    """
    global _last_fed
    _pass.mark, _last_fed = None, None
    if not live:
        return stated or _UNIT, values
    marks = marks_in(values)
    plain = stripped(values) if marks else values
    if marks:
        _pass.mark = mark = joint(marks)
        _last_fed = weakref.ref(mark)
    return _weight_of(marks, stated), plain


def _weight_of(marks: list[Mark], stated: Weight | None) -> Weight:
    if stated is None and not marks and _pass.weight is not None:
        return _pass.weight  # a module within another one, whose forward is under way
    if stated is not None:
        idle = bool(marks) and all(mark.weight == 0.0 for mark in marks)
        return IDLE if idle else stated
    if not marks:
        why = doubt()
    else:
        mark = joint(marks)
        if mark.weight is not None:
            return _UNIT if mark.weight == 1.0 else Weight(mark.weight)
        why = _several(mark)
    if why is None:
        return _UNIT
    if torch.is_grad_enabled():
        raise _unknown("forward()", "input", why)
    return _Unknown(why=why)


def fed_on(output: Any) -> Any:
    """What a module has made of what it was last ``fed``, in this thread: it weighs the same."""
    mark, _pass.mark = _pass.mark, None
    return output if mark is None else handed_on(output, mark)


@contextmanager
def under_way(weight: Weight) -> Iterator[None]:
    """A forward of what weighs so much."""
    before = _pass.weight, _pass.mark, following.pass_weight
    _pass.weight = weight
    checked = not weight.stated and not isinstance(weight, _Unknown)
    following.pass_weight = weight.value if checked else None
    mark = None
    try:
        yield
        mark = before[1]
    finally:
        _pass.weight, following.pass_weight = before[0], before[2]
        _pass.mark = mark  # not that of a forward that has failed: nobody would forget it


def of_pass() -> float:
    """What the forward under way in this thread counts; 1 outside of one."""
    weight = _pass.weight
    if isinstance(weight, _Unknown):
        raise _unknown("forward()", "input", weight.why)
    return 1.0 if weight is None else weight.value


def of_input(x: torch.Tensor) -> tuple[float, torch.Tensor]:
    """What a layer's input counts, and the input as a plain tensor; ``fed_on`` what it returns."""
    weight, plain = fed(x, None)
    if isinstance(weight, _Unknown):
        raise _unknown("forward()", "input", weight.why)
    return weight.value, plain


def of_value(value: Any) -> float:
    """What a value counts that was computed from a batch: of a number, from the one at hand."""
    marks = marks_in(value) if live else []
    if marks:
        mark = joint(marks)
        if mark.weight is None:
            raise _unknown("mean()", "value", _several(mark), _STATE_IT)
        return mark.weight
    with _lock:
        loops = [*_open]
    if len({loop.weight for loop in loops}) > 1:
        found = ", ".join(f"{loop.weight:g}" for loop in loops)
        why = f"a number, while batches of {len(loops)} loops are at hand that weigh {found}"
        raise _unknown("mean()", "value", why, _STATE_IT)
    if not loops:
        _check_after(lambda outlet: outlet.has_numbers, "mean()")
        return 1.0
    _check_at_hand(loops)
    return loops[0].weight


def _check_at_hand(loops: list[Loop]) -> None:
    """Was it the batch at hand that a module was last fed, or one of the same loop before it?"""
    mark = None if _last_fed is None else _last_fed()
    if mark is None or mark.outlet not in [loop.outlet for loop in loops]:
        return
    if mark.weight != loops[0].weight:
        why = (
            f"a number, while the batch at hand weighs {loops[0].weight:g} and the one that a "
            f"module was last fed {weighs(mark)}"
        )
        raise _unknown("mean()", "value", why, _STATE_IT)


def counted(value: Any) -> bool:
    """False for a value of a filler batch, which no sum is to count.

    Raises ArgumentError for what may be partly of one.
    """
    marks = marks_in(value) if live else []
    if marks:
        mark = joint(marks)
        if mark.weight is None and any(each.weight == 0.0 for each in mark.of):
            raise _unknown("sum()", "value", _several(mark), _COUNT_IT)
        return mark.weight != 0.0
    kinds = {"int"}
    for each in map(torch.as_tensor, tree_leaves(value)):
        if each.any():  # zeros are of nothing
            kinds.add("float" if each.is_floating_point() else "size")
    if len(kinds) == 1:
        return True
    _check_after(lambda outlet: not kinds.isdisjoint(outlet.fillers), "sum()")
    return True


def _check_after(is_of_it: Callable[[Outlet], bool], function: str) -> None:
    """May a number be of batches that weigh other than 1, which are not at hand any more?"""
    with _lock:
        found = [outlet for outlet in outlets if is_of_it(outlet)]
    if not found:
        return
    if function == "sum()":
        why = "a number, while a filler, which a rank without samples got, has been counted"
        raise _unknown(function, "value", f"{why}: this may be of it, or it may not", _COUNT_IT)
    why = (
        "a number after a loop whose batches, which were uneven, have been looked at as numbers: "
        "it may be of them, or it may not"
    )
    raise _unknown(function, "value", why, f"{_STATE_IT} That is 1 for what is of no batch.")


_COUNT_IT = (
    "To evaluate, each sample once: mz.shard(loader, evaluation=True). Else let 0 stand for what "
    "is of a batch with loader.weight == 0, and state that: mz.sum(value, weight=1)."
)
_STATE_IT = "Give the value as the tensor that was computed, or state its weight=."


def doubt() -> str | None:
    """Why a tensor without a mark may nevertheless be of a batch that weighs other than 1."""
    if not doubtful:
        return None
    with _lock:
        found = [*doubtful]
    if not found:
        return None
    mark = found[0]
    return (
        f"without a weight, while content of a batch that {weighs(mark)} has gone where it cannot "
        f"be followed ({mark.escaped}): this may be it, or it may not"
    )


def _several(mark: Mark) -> str:
    weights = [f"{each.weight:g}" for each in mark.of if each.weight is not None]
    return f"of several batches that weigh {', '.join(weights)}" if weights else "of unknown weight"


def _unknown(function: str, argument: str, why: str, remedy: str = _REMEDY) -> ArgumentError:
    return ArgumentError(function, argument, why, "what is known to be of one weight", remedy)
