"""What training loops do by hand, done on all ranks as in one process: a part of ``verify``.

A loop writes to parameters, forgets gradients, halves them, adds others to them, and clips them.
Plain training would not notice if that were lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpizero.engine import WHOLE
from mpizero_torch.clip import clip_grad_norm_
from mpizero_torch.sharding.access import full_gradient, full_parameter
from mpizero_torch.sharding.gathering import gathered
from mpizero_torch.sharding.module import ShardedModule

# Beside a gradient that is shorter than this part of all gradients together, rounding is not small.
SHORT = 1e-2

Gradients = Mapping[str, torch.Tensor | None]


@dataclass(frozen=True)
class ByHand:
    """What came of it: gradients of two passes, the first halved, their norm, and all clipped."""

    added: Gradients
    norm: float
    clipped: Gradients
    parameters: Mapping[str, torch.Tensor]  # after a step


def do_by_hand(
    model: nn.Module,
    named: Mapping[str, nn.Parameter],
    optimizers: Sequence[Any],
    loss: Callable[..., torch.Tensor],
    batch: Sequence[Any],
    norm: float | None = None,
) -> ByHand:
    """Do it with ``model``, whose parameters are ``named``. Collective where it is distributed.

    ``norm``: to half of which gradients are clipped; None: to half of what it is.
    """
    _halve(model, named.values())
    while True:
        for parameter in named.values():
            parameter.grad = None
        loss(model, *batch).backward()
        for parameter in named.values():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)
        loss(model, *batch).backward()
        added = gradients_of(named)
        found = float(clip_grad_norm_(model, math.inf)) if norm is None else norm
        own = float(clip_grad_norm_(model, found / 2))
        clipped = gradients_of(named)
        for each in optimizers:
            each.step()
        if not any(getattr(each, "step_was_skipped", False) for each in optimizers):
            values = {name: full_parameter(p) for name, p in named.items()}
            return ByHand(added, own, clipped, values)


@torch.no_grad()
def _halve(model: nn.Module, parameters: Any) -> None:
    """Write to the parameters, in the way in which a program may."""
    chosen = [p for p in parameters if p.requires_grad]
    if isinstance(model, ShardedModule) and model.state.sharding.how != WHOLE:
        with gathered(model, modify=True):
            for parameter in chosen:
                parameter.mul_(0.5)
        return
    for parameter in chosen:
        parameter.mul_(0.5)


def gradients_of(named: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor | None]:
    """Copies of the gradients, whole. Collective where they are sharded."""
    return {name: full_gradient(parameter) for name, parameter in named.items()}


def differences(found: ByHand, should: ByHand, gradient: float, parameter: float) -> list[str]:
    """Where two differ by more than these bounds, in words."""
    said = []
    for what, mine, its in (
        ("gradients that were halved and added to", found.added, should.added),
        ("clipped gradients", found.clipped, should.clipped),
        # All together: a single one may be almost zero.
        ("parameters that were written to", _as_one(found), _as_one(should)),
    ):
        bound = parameter if what.startswith("parameters") else gradient
        name, by = largest_difference(mine, its)
        if not by <= bound:
            said.append(f"{what} by {by:.3g}{f' (of {name!r})' if name else ''}")
    by = abs(found.norm - should.norm) / max(abs(should.norm), 1e-30)
    if not by <= gradient:
        said.append(f"the norm of gradients by {by:.3g}")
    return said


def _as_one(found: ByHand) -> Gradients:
    return {"": torch.cat([each.reshape(-1).double() for each in found.parameters.values()])}


def largest_difference(found: Gradients, expected: Gradients) -> tuple[str | None, float]:
    """Of which one differs most, and by how much beside its length."""
    whole = length([each for each in expected.values() if each is not None])
    worst: tuple[str | None, float] = (None, 0.0)
    for name, should in expected.items():
        mine = found[name]
        if should is None and mine is None:
            continue
        # None here, and zero there: both are no gradient.
        wanted = torch.zeros_like(mine) if should is None and mine is not None else should
        given = torch.zeros_like(wanted) if mine is None and wanted is not None else mine
        assert given is not None and wanted is not None  # one of them was
        short = max(length([wanted]), SHORT * whole, 1e-30)
        by = length([given.to(wanted.device).double() - wanted.double()]) / short
        if not by <= worst[1]:
            worst = name, by
    return worst


def length(tensors: Sequence[torch.Tensor]) -> float:
    """Of all of them as one vector."""
    return math.sqrt(sum(float(each.abs().double().pow(2).sum()) for each in tensors))
