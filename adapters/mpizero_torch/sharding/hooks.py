"""Gradients under sharding: from ``.grad`` into segments, and from segments to the shards."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from mpizero.engine import Filling, GradientSharder, Merge
from mpizero_torch import slices, tensors
from mpizero_torch.hooks import BackwardHooks, LocalPass, Owner, check_dense, times
from mpizero_torch.replica_hooks import AfterAverage
from mpizero_torch.sharding.mean_gradients import MeanGradients
from mpizero_torch.sharding.schedule import UnitSchedule
from mpizero_torch.sharding.stand_in import HeldGradient, values_of

Fill = Callable[[tuple[int, int], Sequence[Filling]], Sequence[int]]
Left = Callable[[], Sequence[int]]
Has = Callable[[], Sequence[bool]]
_Target = tuple[int, slice | None, torch.Tensor]


class ShardHooks(BackwardHooks):
    """Has a GradientSharder reduce the gradients of ``named`` parameters.

    Gradients that stay on this rank (under ``no_sync``) lie where autograd puts them, in
    ``.grad``; with ``hold`` they go to the memory that it gives for a parameter's number, where
    they are added up.
    """

    _reducer: GradientSharder

    def __init__(
        self,
        owner: Owner,
        named: Sequence[tuple[str, nn.Parameter]],
        make_sharder: Callable[[Fill, Left, Has], GradientSharder],
        hold: Callable[[int], torch.Tensor] | None,
        on_reduced: Callable[[list[bool]], None],
        before_pass: Callable[[], None],
        schedule: UnitSchedule | None,
        gradients: MeanGradients,
    ) -> None:
        self._after: dict[int, AfterAverage] = {}  # of parameters that others have hooks on
        self._own_hooks: dict[int, int] = {}  # of parameters that announce their gradients
        self._handles: list[Any] = []
        self._names = [name for name, _ in named]
        self._all = [parameter for _, parameter in named]
        self._targets: dict[tuple[int, int], list[_Target]] = {}
        self._hold, self._held = hold, dict[int, torch.Tensor]()
        self._merge = Merge()
        self._aside: dict[int, torch.Tensor] = {}  # what was kept in ``.grad``, apart from a pass's
        self._unscaled: set[int] = set()  # of what is held: not yet what the merge keeps of it
        self._here = False  # has a pass left gradients on this rank, not averaged?
        self._gradients = gradients
        self._on_reduced, self._before_pass = on_reduced, before_pass
        self._schedule = schedule
        self._any_cut = any(slices.is_slice(p) for p in self._all)
        self._came: set[int] = set()
        self._came_late = False  # in a pass that takes place at its end
        # Gradients on their way, and the segments that they have yet to be put into.
        self._leaving: dict[int, tuple[torch.Tensor, set[int]]] = {}
        super().__init__(owner, make_sharder(self._fill, self.left, self._has_gradient))

    def watch(
        self,
        parameters: Sequence[tuple[int, nn.Parameter]],
        announcing: Collection[int] | None = None,
    ) -> None:
        super().watch(parameters, announcing)
        indices = (i for i, _ in parameters if announcing is None or i in announcing)
        self._own_hooks = {
            index: handle.id for index, handle in zip(indices, self._handles, strict=True)
        }
        for index, after in self._after.items():
            after.take(self._own_hooks.get(index))

    def remove(self) -> None:
        super().remove()
        for after in self._after.values():
            after.take(None)
        self._own_hooks = {}

    def inherit(self, before: ShardHooks) -> None:
        """Go on in the place of hooks that have been removed."""
        self._after, before._after = before._after, {}

    def __del__(self) -> None:
        self.remove()
        for after in self._after.values():
            after.give_back()  # the parameters' other hooks are called by torch again

    @property
    def sharder(self) -> GradientSharder:
        return self._reducer

    def left(self) -> list[int]:
        """The parameters with a gradient that has not been put into all of its segments."""
        return [
            index
            for index in range(len(self._all))
            if any(self._reducer.pieces[number].trained for number in self._to_be_put(index))
        ]

    def _to_be_put(self, index: int) -> Collection[int]:
        """The segments that have yet to get a parameter's gradient."""
        if index in self._leaving:  # others have been sent with their part
            return self._leaving[index][1]
        if values_of(self._all[index]) is None:  # also if there is none
            return ()
        return self._reducer.segments_of(index)

    @property
    def announced(self) -> Collection[int]:
        """The parameters that must announce their gradients."""
        aside = self._hold is not None and not self._owner._synchronise
        if aside or self._schedule is not None:
            return range(len(self._all))
        return self._reducer.awaited

    def forget(self, members: Collection[int]) -> None:
        """Drop the gradients of these parameters that are still on this rank."""
        for index in members:
            self._held.pop(index, None)
            self._leaving.pop(index, None)
            self._all[index].grad = None

    def zero(self, members: Collection[int]) -> None:
        """Let those of these parameters be zero that are still on this rank."""
        for index in set(members).intersection(self.here()):
            gradient = self._all[index].grad
            if gradient is not None:
                gradient.detach_() if gradient.grad_fn is not None else None
                gradient.zero_()

    def here(self) -> Collection[int]:
        """Between passes: the parameters with a gradient that no pass has averaged yet."""
        if not self._here:
            return ()
        for index, held in list(self._held.items()):
            shown = self._all[index].grad
            if not isinstance(shown, HeldGradient) or vars(shown)["held"] is not held:
                del self._held[index]  # the program has forgotten it, or set another
        found = {*self._held, *self.left()}
        self._here = bool(found)
        return found

    @property
    def held_bytes(self) -> int:
        return sum(each.nbytes for each in self._held.values())

    def _announce(self, weight: float) -> None:
        if self._pass is None:
            self._prepare()
        super()._announce(weight)

    def _begin_unannounced(self) -> None:
        self._prepare(came=True)
        super()._begin_unannounced()

    def _prepare(self, came: bool = False) -> None:
        self._gradients.follow(came)
        self._before_pass()
        self._came.clear()
        self._gradients.give_way()
        own = self._own_hooks
        for index, parameter in enumerate(self._all):
            hooks: Any = parameter._post_accumulate_grad_hooks
            if hooks and len(hooks) > (index in own):
                self._after[index] = AfterAverage({}, parameter, hooks)
                self._after[index].take(own.get(index))
                parameter._post_accumulate_grad_hooks = self._after[index]

    def come_unannounced(self) -> None:
        """A gradient is about to come to a parameter that has one in the shards."""
        if self._pass is None:
            self._begin_unannounced()

    def average_kept(self) -> None:
        self._prepare()
        super().average_kept()

    def kept(self, parameter: torch.Tensor) -> torch.Tensor | None:
        for index, held in self._held.items():
            if self._all[index] is parameter:
                return held
        return None if values_of(parameter) is None else slices.local_gradient(parameter)

    def shadow(self) -> bool:
        self._held.clear()
        self._leaving.clear()
        self._prepare()
        taking_part = super().shadow()
        if not taking_part:
            self._gradients.show()
        return taking_part

    def _on_accumulated(self, index: int) -> Callable[[torch.Tensor], None]:
        announce = super()._on_accumulated(index)
        if self._hold is None and self._schedule is None:
            return announce
        found = weakref.ref(self)

        def accumulated(parameter: torch.Tensor) -> None:
            hooks = found()
            if hooks is None:
                return
            schedule = hooks._schedule
            if schedule is not None:
                schedule.gradient_came(index)
            if schedule is None or hooks._pass is None or not schedule.reduces_at_the_end:
                announce(parameter)
            else:
                hooks._came_late = True
            if not hooks._owner._synchronise:
                hooks._hold_gradient(index)

        return accumulated

    def _is_empty(self, under_way: LocalPass) -> bool:
        came, self._came_late = self._came_late, False
        return came or super()._is_empty(under_way)

    def _hold_gradient(self, index: int) -> None:
        """Add a gradient that stays here to those before it, in memory that is there for it."""
        if self._all[index].grad is None or self._hold is None:
            return
        gradient, held = self._take(index), self._held_until_now(index)
        if gradient is None:
            return
        if held is None:
            held = self._held[index] = self._hold(index)
            held.copy_(gradient)
        else:
            held.add_(gradient)

    def _held_until_now(self, index: int) -> torch.Tensor | None:
        """What is held of a parameter's gradient, as this pass keeps it."""
        if index in self._unscaled:
            self._unscaled.remove(index)
            if self._merge.keep == 0.0:
                del self._held[index]
            else:
                self._held[index].mul_(self._merge.keep)
        return self._held.get(index)

    def _put_aside(self, merge: Merge) -> None:
        self._merge, self._unscaled = merge, set(self._held)
        for index, parameter in enumerate(self._all):
            if parameter.grad is not None:
                self._aside[index] = parameter.grad
                parameter.grad = None

    def _bring_back(self) -> None:
        for index, gradient in self._aside.items():
            self._all[index].grad = gradient
        self._show_held()
        self._gradients.show()
        self._forget_merge()

    def _forget_merge(self) -> None:
        self._merge = Merge()
        self._aside.clear()
        self._unscaled.clear()

    def _keep(self) -> None:
        for index in list(self._unscaled):
            self._held_until_now(index)
        if not self._merge.is_plain:
            for index in [*self._aside, *range(len(self._all))]:
                if index in self._aside or values_of(self._all[index]) is not None:
                    self._all[index].grad = self._take(index)
        self._forget_merge()
        self._show_held()
        self._here = True
        self._gradients.left_here()

    def _show_held(self) -> None:
        for index, held in self._held.items():
            self._gradients.stand_in(index, HeldGradient.of(self._all[index], held))

    def _any_kept(self) -> bool:
        return bool(self._held) or any(p.grad is not None and bool(p.grad.any()) for p in self._all)

    def _has_gradient(self) -> list[bool]:
        return [
            index in self._came
            or index in self._held
            or index in self._aside
            or values_of(parameter) is not None
            for index, parameter in enumerate(self._all)
        ]

    def _take_over(self, anywhere: list[bool]) -> None:
        self._held.clear()
        self._forget_merge()
        self._here = False
        if not self._reducer.keeps and self._gradients.marks:
            self._gradients.clear_all()  # shadowing: the others have forgotten theirs since
        self._on_reduced(anywhere)
        self._gradients.placed(anywhere)
        for index, after in sorted(self._after.items()):
            if anywhere[index]:
                after.call(self._all[index])

    def _fill(self, key: tuple[int, int], fillings: Sequence[Filling]) -> list[int]:
        """Copy the gradients of a segment's parameters to it, all in one call.

        A gradient goes as soon as the last segment that it is part of has its part.
        """
        if key not in self._targets:
            self._targets[key] = [_target(filling) for filling in fillings]
        memory: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        missing: list[int] = []
        for at, (index, elements, target) in enumerate(self._targets[key]):
            parameter = self._all[index]
            gradient = parameter.grad
            is_simple = elements is None and not self._held and index not in self._leaving
            is_simple = is_simple and self._merge.is_plain
            if is_simple and gradient is not None:
                if gradient.is_sparse or gradient.requires_grad:
                    check_dense(gradient, self._names[index])
                if self._any_cut:
                    gradient = slices.local_gradient(parameter)
                self._came.add(index)
                parameter.grad = None
            else:
                gradient = self._leave(index, key[0])
            if gradient is None:
                missing.append(at)
                continue
            if elements is not None:
                gradient = gradient.reshape(-1)[elements]
            if self._hold is None or gradient.data_ptr() != target.data_ptr():
                memory.append(target)
                gradients.append(gradient)
        if memory:
            torch._foreach_copy_(memory, gradients)
        return missing

    def _take(self, index: int) -> torch.Tensor | None:
        """Take a parameter's gradient from it: this rank's part, as the pass adds it to others."""
        parameter = self._all[index]
        found = times(self._local_gradient(index), self._merge.new)
        parameter.grad = self._aside.pop(index, None)
        kept = times(self._local_gradient(index), self._merge.keep)
        parameter.grad = None
        if found is not None and kept is not None:
            return found + kept
        return kept if found is None else found

    def _local_gradient(self, index: int) -> torch.Tensor | None:
        gradient = self._all[index].grad
        if gradient is not None and (gradient.is_sparse or gradient.requires_grad):
            check_dense(gradient, self._names[index])
        return slices.local_gradient(self._all[index])

    def _leave(self, index: int, segment: int) -> torch.Tensor | None:
        """A gradient of several segments, or one put aside: taken once, kept until all have it."""
        if index not in self._leaving:
            held = self._held_until_now(index)
            self._held.pop(index, None)
            gradient = self._take(index)
            if gradient is not None:
                held = gradient if held is None else held.add_(gradient)
            if held is None:
                return None
            self._came.add(index)
            self._leaving[index] = held, set(self._reducer.segments_of(index))
        found, remaining = self._leaving[index]
        if segment not in remaining:
            return None
        remaining.remove(segment)
        if not remaining:
            del self._leaving[index]
        return found


def _target(filling: Filling) -> _Target:
    memory = tensors.as_tensor(filling.memory)
    if filling.elements is None:
        memory = memory.view(filling.shape)
    return filling.index, filling.elements, memory
