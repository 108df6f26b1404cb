"""How a schedule hears of a module: when its forward begins and ends, and what is taken from it.

A copy of the module has nothing to do with the schedule: it gets plain dicts, and no hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

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
    def __call__(self, module: nn.Module, args: Any) -> None:
        self._schedule.begin(module, self._own)


class _End(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self._schedule.end(module)
