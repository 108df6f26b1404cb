"""``verify``: does a model train the same at every stage as in one process?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError, World
from mpizero_torch.names import named_parameters
from mpizero_torch.runtime import init
from mpizero_torch.sharding.module import ShardedModule
from mpizero_torch.sharding.precision import as_policy
from mpizero_torch.sharding.zero import zero

Build = Callable[[], tuple[nn.Module, Any, Callable[..., torch.Tensor]]]

# Relative to the loss. Sums over ranks are rounded in another order than sums within one batch, and
# a few steps of an optimizer amplify that: some hundred units in the last place.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
_TOLERANCE_16_BITS = 2e-2

# An optimizer that divides by the root of a squared gradient makes much of rounding where a
# gradient is almost zero: parameters may differ by more than losses, beside the largest of them.
# So may gradients, which are differences of what is larger.
_LOOSER = 1e3

# The length of a difference beside the length of what there should be. Sixteen bits leave gradients
# right to some hundredths; one that is twice as long as it should be, or half, differs by a half.
_GRADIENT_16_BITS = 0.25

# How far all parameters have moved differs by more: of those that have almost no gradient, such
# optimizers take the sign of its rounding. A model that does not move at all differs by 1.
_UPDATE, _UPDATE_16_BITS = 0.1, 0.5

# Beside a gradient that is shorter than this part of all gradients together, rounding is not small.
_SHORT = 1e-2


@dataclass(frozen=True)
class StageResult:
    """How one stage compares with one process."""

    stage: int
    loss_difference: float  # the largest, relative
    step: int | None  # the first at which it is more than the tolerance
    parameter: str | None  # the first that differs at the end
    parameter_difference: float  # its, relative to its largest number
    gradient: str | None  # the parameter whose gradient differs most in the first step, if too much
    gradient_difference: float  # its, relative to its length
    update_difference: float  # of the way that all parameters have gone, relative to its length
    moved: bool  # is that within the bound?

    @property
    def ok(self) -> bool:
        return self.step is None and self.parameter is None and self.gradient is None and self.moved


@dataclass(frozen=True)
class VerifyReport:
    """What ``verify`` found; the same on every rank."""

    ranks: int
    tolerance: float
    results: tuple[StageResult, ...]

    @property
    def ok(self) -> bool:
        """Do all stages train what one process trains?"""
        return all(result.ok for result in self.results)

    def __str__(self) -> str:
        lines = [f"{self.ranks} ranks beside one process (losses within {self.tolerance:g}):"]
        for result in self.results:
            line = f"  stage {result.stage}: "
            if result.ok:
                line += f"the same (losses differ by {result.loss_difference:.1g})"
            else:
                line += f"DIFFERENT: losses by {result.loss_difference:.3g}"
                if result.step is not None:
                    line += f", from step {result.step} on"
                if result.parameter is not None:
                    line += f"; '{result.parameter}' by {result.parameter_difference:.3g}"
                if result.gradient is not None:
                    by = f"{result.gradient_difference:.3g}"
                    line += f"; the first gradient of '{result.gradient}' by {by} of its length"
                if not result.moved:
                    line += f"; what training has changed by {result.update_difference:.3g} of it"
            lines.append(line)
        return "\n".join([*lines, *self._causes()])

    def _causes(self) -> list[str]:
        differing = [result.stage for result in self.results if not result.ok]
        if not differing:
            return []
        if len(differing) == len(self.results):
            return [
                "  All stages differ: something depends on which samples a rank has. BatchNorm "
                "(mz.SyncBatchNorm), dropout, a loss that is no mean over samples?"
            ]
        if 0 not in differing:
            return [
                "  Replicas do not differ, shards do: does the optimizer look at the shape of a "
                "parameter (partition='parameter'), or at several at once?"
            ]
        return []


def verify(
    build: Build,
    batches: Sequence[Sequence[Any]],
    stages: Sequence[int] = (0, 1, 2, 3),
    *,
    tolerance: float | None = None,
    seed: int = 0,
    world: World | None = None,
    **options: Any,
) -> VerifyReport:
    """Train some steps at each stage, and in one process, and compare. Collective.

    ``build()`` gives a model, its optimizer (or a list of several), and ``loss(model, *batch)``, a
    mean over samples; it is called once for each stage and once for one process, after
    ``torch.manual_seed(seed)``.
    ``batches``: the whole batches, the same on all ranks: tuples of tensors with samples on the
    first axis, of which every rank takes its part. One process takes them whole, on every rank.
    ``options`` are ``mz.zero``'s. Returns a report to print; ``report.ok`` says it in a word.
    Raises ArgumentError for batches with fewer samples than ranks.
    """
    world = world if world is not None else init()
    with world.together("verify()"):
        for batch in batches:
            if len(batch[0]) < world.size:
                raise ArgumentError(
                    "verify()", "batches", f"one of {len(batch[0])} samples",
                    f"batches of {world.size} samples or more",
                )  # fmt: skip
        alone = _alone(build, batches, seed)
        dtype = next(alone.model.parameters()).dtype
        narrow = as_policy(options.get("precision")) is not None or dtype not in _TOLERANCE
        bounds = _Bounds.of(dtype, narrow, tolerance)
        results = tuple(
            _compare(stage, build, batches, seed, world, alone, bounds, options) for stage in stages
        )
        return VerifyReport(world.size, bounds.loss, results)


@dataclass(frozen=True)
class _Bounds:
    """What may differ by how much."""

    loss: float
    parameter: float
    gradient: float
    update: float

    @classmethod
    def of(cls, dtype: torch.dtype, narrow: bool, tolerance: float | None) -> _Bounds:
        if tolerance is None:
            tolerance = _TOLERANCE_16_BITS if narrow else _TOLERANCE[dtype]
        looser = tolerance * _LOOSER
        return cls(
            tolerance,
            min(1.0, looser),
            _GRADIENT_16_BITS if narrow else min(_GRADIENT_16_BITS, looser),
            _UPDATE_16_BITS if narrow else _UPDATE,
        )


@dataclass(frozen=True)
class _Alone:
    """What one process has trained: by name, parameters before, and gradients of the first step."""

    model: nn.Module
    losses: list[float]
    before: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor | None]


def _alone(build: Build, batches: Sequence[Sequence[Any]], seed: int) -> _Alone:
    torch.manual_seed(seed)
    model, optimizer, loss = build()
    optimizers = _listed(optimizer)
    named = dict(named_parameters(model))
    found = _Alone(model, [], {name: p.detach().clone() for name, p in named.items()}, {})
    for batch in batches:
        value = loss(model, *batch)
        for each in optimizers:
            each.zero_grad()
        value.backward()
        for name, parameter in named.items() if not found.losses else ():
            gradient = parameter.grad
            found.gradients[name] = None if gradient is None else gradient.detach().clone()
        for each in optimizers:
            each.step()
        found.losses.append(value.item())
    return found


def _compare(
    stage: int,
    build: Build,
    batches: Sequence[Sequence[Any]],
    seed: int,
    world: World,
    alone: _Alone,
    bounds: _Bounds,
    options: dict[str, Any],
) -> StageResult:
    torch.manual_seed(seed)
    plain, plain_optimizer, loss = build()
    kept = options if stage else {}
    model, optimizer = zero(plain, plain_optimizer, stage, world=world, **kept)
    optimizers = _listed(optimizer)
    differences: list[float] = []
    gradient, gradient_by = None, 0.0
    for batch, should in zip(batches, alone.losses, strict=True):
        count = len(batch[0])
        start, stop = (count * at // world.size for at in (world.rank, world.rank + 1))
        is_made = False
        while not is_made:  # a loss scale has to be found first
            if count % world.size:
                model.weigh(stop - start)
            value = loss(model, *(part[start:stop] for part in batch))
            for each in optimizers:
                each.zero_grad()
            value.backward()
            if not differences:
                gradient, gradient_by = _largest_difference(model, alone.gradients)
            for each in optimizers:
                each.step()
            is_made = not any(getattr(each, "step_was_skipped", False) for each in optimizers)
        found = world.allreduce(value.item() * (stop - start)) / count
        differences.append(abs(found - should) / max(abs(should), 1e-30))
    wrong = [step for step, each in enumerate(differences) if not each <= bounds.loss]
    state = model.state_dict()
    name, by = _first_difference(state, alone.model, bounds.parameter)
    update_by = _update_difference(state, alone)
    largest = float(world.allreduce(max(differences, default=0.0), "max"))
    return StageResult(
        stage,
        largest,
        wrong[0] if wrong else None,
        name,
        by,
        None if gradient_by <= bounds.gradient else gradient,
        gradient_by,
        update_by,
        update_by <= bounds.update,
    )


def _listed(optimizer: Any) -> list[Any]:
    return list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]


def _largest_difference(
    model: Any, expected: dict[str, torch.Tensor | None]
) -> tuple[str | None, float]:
    """The parameter whose mean gradient differs most, and by how much beside its length."""
    named = dict(named_parameters(model.module))
    whole = _length([each for each in expected.values() if each is not None])
    worst: tuple[str | None, float] = (None, 0.0)
    for name, should in expected.items():
        is_sharded = isinstance(model, ShardedModule)
        found = model.gradient(name) if is_sharded else named[name].grad
        # None here, and zero there: both are no gradient.
        given, wanted = (
            torch.zeros_like(named[name], dtype=torch.float64) if each is None else each.double()
            for each in (found, should)
        )
        short = max(_length([wanted]), _SHORT * whole, 1e-30)
        by = _length([given - wanted]) / short
        if not by <= worst[1]:
            worst = name, by
    return worst


def _update_difference(state: dict[str, Any], alone: _Alone) -> float:
    """Of the way from the first parameters to the last, beside its length."""
    ways = []
    for name, should in named_parameters(alone.model):
        if should.is_floating_point() or should.is_complex():
            before = alone.before[name]
            ways.append((state[name].to(should) - before, should.detach() - before))
    length = _length([should for _, should in ways])
    difference = _length([found - should for found, should in ways])
    return difference / length if length else difference


def _length(tensors: Sequence[torch.Tensor]) -> float:
    return math.sqrt(sum(float(each.abs().double().pow(2).sum()) for each in tensors))


def _first_difference(
    state: dict[str, Any], reference: nn.Module, tolerance: float
) -> tuple[str | None, float]:
    """The first parameter that differs, and by how much beside its largest number."""
    for name, should in named_parameters(reference):
        scale = max(float(should.detach().abs().max()), 1e-30) if should.numel() else 1.0
        difference = (state[name].to(should) - should.detach()).abs()
        by = float(difference.max()) / scale if should.numel() else 0.0
        if not by <= tolerance:
            return name, by
    return None, 0.0
