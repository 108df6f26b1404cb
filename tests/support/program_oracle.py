"""The oracle of random programs: all ranks in one process.

It knows nothing of what it checks: it keeps a plain copy of the modules for each rank, does with
each what that rank's program does, and after each backward pass takes the mean by hand.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from support.program_sides import After, Before, Joined, Saved, Side


@dataclass
class Lying:
    """What one model's gradients lie as on one rank: times ``factor``, weighing ``weight``."""

    stated: bool = False
    factor: float = 1.0
    weight: float = 0.0
    stash: list[torch.Tensor | None] | None = None
    new: float | None = None
    mixed: bool = False  # with gradients of the other kind


class RefusalExpectedError(Exception):
    """What the program asks for has no meaning, so it is to be refused."""


class Oracle:
    """All ranks' modules in one process."""

    def __init__(self, sides: list[Side], hooks: list[dict[nn.Parameter, Any]]) -> None:
        self.sides = sides
        self.hooks = hooks  # for each side: what is called with averaged gradients
        self.active = list(range(len(sides)))
        count = len(sides[0].models)
        self.lying = [[Lying() for _ in sides] for _ in range(count)]
        self.unreduced: list[set[int]] = [set() for _ in range(count)]
        self._came: set[int] = set()  # in this pass
        self._since: set[int] = set()  # since the last average
        for side in sides:
            for model in range(count):
                for parameter in side.parameters(model):
                    parameter.register_post_accumulate_grad_hook(lambda each: self._note(each))

    def _note(self, parameter: torch.Tensor) -> None:
        self._came.add(id(parameter))
        self._since.add(id(parameter))

    def comparable(self, model: int) -> bool:
        """Is it said anywhere what ``.grad`` is now? Not while weighted ones wait for the rest."""
        return (
            not any(each.stated and each.factor == 1.0 for each in self.lying[model])
            or not (self.unreduced[model])
        )

    def equal(self, model: int) -> bool:
        """Have all ranks the same gradients, so that a step may be taken?"""
        if not self.comparable(model):
            return False
        for each in zip(*(side.parameters(model) for side in self.sides), strict=True):
            grads = [p.grad for p in each]
            if any((g is None) != (grads[0] is None) for g in grads):
                return False
            if grads[0] is not None and not all(torch.equal(g, grads[0]) for g in grads):
                return False
        return True

    def before(self, events: list[Before]) -> None:
        self._came.clear()
        for model in events[0].chain:
            for side, event in zip(self._active_sides(), events, strict=True):
                self._one_before(model, side, event)

    def _one_before(self, model: int, side: Side, event: Before) -> None:
        lying, parameters = self.lying[model][side.rank], side.parameters(model)
        kept = any(p.grad is not None and bool(p.grad.any()) for p in parameters)
        if not kept:
            lying = self.lying[model][side.rank] = Lying()
        lying.mixed = kept and lying.stated != (event.weight is not None)
        lying.stash, lying.new = None, event.weight
        if event.weight is None:
            return
        lying.stash = [None if p.grad is None else p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None

    def after(self, event: After) -> None:
        for model in event.chain:
            sides = self._active_sides()
            came = any(id(p) in self._came for side in sides for p in side.parameters(model))
            trains = any(p.requires_grad for p in sides[0].parameters(model))
            takes_place = came or (event.full and trains)
            if takes_place and any(self.lying[model][side.rank].mixed for side in sides):
                raise RefusalExpectedError("stated and other weights are accumulated")
            for side in sides:
                self._combine(model, side, takes_place)
            if takes_place and event.sync:
                self._average(model, sides)
            elif takes_place:
                self.unreduced[model].update(
                    index
                    for side in sides
                    for index, each in enumerate(side.parameters(model))
                    if each.grad is not None
                    and (each.requires_grad or index in self.unreduced[model])
                )

    def _combine(self, model: int, side: Side, takes_place: bool) -> None:
        """Add what has come to what was there, as they weigh."""
        lying = self.lying[model][side.rank]
        if lying.new is None or lying.stash is None:
            return
        pairs = list(zip(side.parameters(model), lying.stash, strict=True))
        if not takes_place:
            for parameter, old in pairs:
                parameter.grad = old
            return
        for index, (parameter, old) in enumerate(pairs):
            if not parameter.requires_grad and index not in self.unreduced[model]:
                parameter.grad = old
                continue
            terms = [(old, lying.factor), (parameter.grad, lying.new)]
            found = [g * w for g, w in terms if g is not None]
            parameter.grad = sum(found[1:], found[0]) if found else None
        lying.stated, lying.factor, lying.weight = True, 1.0, lying.weight + lying.new
        lying.stash = None

    @torch.no_grad()
    def _average(self, model: int, sides: list[Side]) -> None:
        lying = [self.lying[model][side.rank] for side in sides]
        stated = lying[0].stated
        whole = sum(each.weight for each in lying) if stated else float(len(sides))
        for index, each in enumerate(zip(*(side.parameters(model) for side in sides), strict=True)):
            if not each[0].requires_grad and index not in self.unreduced[model]:
                continue
            found = [p.grad for p in each if p.grad is not None]
            if not found:
                continue
            total = sum(found[1:], found[0].clone())
            mean = total / whole if whole else torch.zeros_like(total)
            for parameter in each:
                if parameter.grad is None:
                    parameter.grad = mean.clone()
                else:
                    parameter.grad.copy_(mean)
        self.unreduced[model].clear()
        if stated:
            share = whole / len(sides)
            for one in lying:
                one.factor, one.weight = share, share
        self._share_buffers(model, sides)
        self._call_hooks(model, sides)

    def joined(self, events: list[Joined]) -> None:
        """The uneven steps, each with those ranks that have it; then all are as one with most."""
        model, steps = events[0].model, events[0].steps
        self.unreduced[model].clear()
        for step in range(max(steps)):
            self.active = [rank for rank in range(len(self.sides)) if steps[rank] > step]
            for rank in self.active:
                self.sides[rank].models[model].zero_grad()
            losses = [events[rank].passes(step) for rank in self.active]
            while True:
                found = [next(each, None) for each in losses]
                if found[0] is None:
                    break
                self.before([Before((model,))] * len(self.active))
                for loss in found:
                    loss.backward()
                self.after(After((model,)))
            for rank in self.active:
                self.sides[rank].step(model)
        self.active = list(range(len(self.sides)))
        root = self.sides[steps.index(max(steps))]
        for side in self.sides:
            side.models[model].zero_grad()
            if side is not root:
                side.models[model].load_state_dict(root.models[model].state_dict())
                state = copy.deepcopy(root.optimizers[model].state_dict())
                side.optimizers[model].load_state_dict(state)

    def saved(self, event: Saved) -> None:
        self._share_buffers(event.model, self.sides)

    def _share_buffers(self, model: int, sides: list[Side]) -> None:
        root = sides[0].inner[model]
        for side in sides[1:]:
            for mine, first in zip(side.inner[model].buffers(), root.buffers(), strict=True):
                mine.data.copy_(first)

    def _call_hooks(self, model: int, sides: list[Side]) -> None:
        for each in zip(*(side.parameters(model) for side in sides), strict=True):
            if any(id(p) in self._since for p in each):
                self._since.difference_update(map(id, each))
                for side, parameter in zip(sides, each, strict=True):
                    hook = self.hooks[side.rank].get(parameter)
                    if hook is not None and parameter.grad is not None:
                        hook(parameter)

    def _active_sides(self) -> list[Side]:
        return [self.sides[rank] for rank in self.active]


def difference(mine: torch.Tensor | None, wanted: torch.Tensor | None, bound: float) -> str:
    """How far two tensors are apart, in words; nothing if they are the same to ``bound``."""
    if (mine is None) != (wanted is None):
        return f"is {'None' if mine is None else 'a tensor'}, not {_short(wanted)}"
    if mine is None or wanted is None:
        return ""
    if mine.dtype != wanted.dtype or mine.shape != wanted.shape:
        return f"is {mine.dtype} {tuple(mine.shape)}, not {wanted.dtype} {tuple(wanted.shape)}"
    if not mine.numel():
        return ""
    worst = float((mine.double() - wanted.double()).abs().max())
    scale = max(1.0, float(wanted.double().abs().max()))
    if math.isfinite(worst) and worst <= bound * scale:
        return ""
    return f"differs by {worst:.3g} (largest {float(wanted.abs().max()):.3g})"


def _short(tensor: torch.Tensor | None) -> str:
    return "None" if tensor is None else f"a tensor up to {float(tensor.abs().max()):.3g}"


def compare(side: Side, oracle: Oracle, bound: float) -> list[str]:
    """What is another value on this rank than the oracle's."""
    wanted = oracle.sides[side.rank]
    found = []
    for model, (mine, its) in enumerate(zip(side.inner, wanted.inner, strict=True)):
        its_parameters = dict(its.named_parameters())
        for name, parameter in mine.named_parameters():
            other = its_parameters[name]
            found.append((f"m{model}.{name}", difference(parameter.data, other.data, bound)))
            if oracle.comparable(model):
                said = difference(parameter.grad, other.grad, bound)
                found.append((f"m{model}.{name}.grad", said))
        its_buffers = dict(its.named_buffers())
        for name, buffer in mine.named_buffers():
            found.append((f"m{model}.{name}", difference(buffer, its_buffers[name], bound)))
    for number, (kept, its_kept) in enumerate(zip(side.kept, wanted.kept, strict=True)):
        found.append((f"kept gradient {number}", difference(kept, its_kept, bound)))
    for number, (got, its_got) in enumerate(zip(side.results, wanted.results, strict=True)):
        found.append((f"result {number}", difference(got, its_got, bound)))
    return [f"{name} {said}" for name, said in found if said]
