"""How a schedule hears of a module: when its forward begins and ends, and what is taken from it.

A copy of the module has nothing to do with the schedule: it gets plain dicts, and no hooks.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from mpizero import ArgumentError
from mpizero_torch import compiling
from mpizero_torch.compiling import as_it_is
from mpizero_torch.outputs import tensors_in
from mpizero_torch.tensors import can_have_gradient

if TYPE_CHECKING:
    from mpizero_torch.sharding.schedule import UnitSchedule
    from mpizero_torch.sharding.units import Unit


class WatchedParameters(dict):  # type: ignore[type-arg]
    """A module's parameters by name, which tells when one is taken."""

    def __init__(self, parameters: Any, schedule: UnitSchedule) -> None:
        super().__init__(parameters)
        self._schedule = schedule

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        self._schedule.taken(found)
        return found

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(dict(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)


def watch_calls(part: nn.Module, schedule: UnitSchedule, own: Sequence[Unit]) -> list[Any]:
    """Tell the schedule when ``part``, which has parameters of the units ``own``, runs.

    Returns the handles of hooks.
    """
    return [
        part.register_forward_pre_hook(_Begin(schedule, own)),
        part.register_forward_hook(_End(schedule), always_call=True),
    ]


def _nothing(*_: Any) -> None:
    """The hook of a copy."""


def _hook_of_a_copy() -> Any:
    return _nothing


class _Hook:
    def __init__(self, schedule: UnitSchedule, own: Sequence[Unit] = ()) -> None:
        self._schedule, self._own = schedule, own

    def __deepcopy__(self, memo: Any) -> Any:
        return _nothing

    def __reduce__(self) -> Any:
        return _hook_of_a_copy, ()


class _Begin(_Hook):
    # Not recursive: then what it calls can still tell that something is being compiled.
    @functools.partial(as_it_is, recursive=False)
    def __call__(self, module: nn.Module, args: Any) -> None:
        if compiling.is_under_way():
            raise ArgumentError(
                "torch.compile()", "model",
                f"a {type(module).__name__} of a model at stage 3 without shared parameters",
                "models at stages 0 to 2, or with shared parameters",
                "Its parameters come and go while it runs, which a compiled graph does not know.",
            )  # fmt: skip
        self._schedule.begin(module, self._own)


class _End(_Hook):
    @as_it_is
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._schedule.end(module, output)


def when_backward_comes(output: Any, come: Callable[[], None]) -> Any:
    """Call ``come`` when a gradient comes to a module's output; returns it, or one instead.

    What needs no gradient here, as nothing was called that is trained, may need one on other ranks:
    it becomes something that does.
    """

    def watched(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not can_have_gradient(value):
            return value
        if not value.requires_grad:
            value = value + torch.zeros_like(value, requires_grad=True)
        value.register_hook(lambda _: come())
        return value

    replaced = tree_map(watched, output)
    for each in tensors_in(replaced):  # in objects that torch cannot rebuild
        if each.requires_grad and not each.is_leaf and not each._backward_hooks:
            each.register_hook(lambda _: come())
    return replaced
