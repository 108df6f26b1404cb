"""``verify``: does a model train the same at every stage as in one process?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError, World
from mpizero_torch.names import named_buffers, named_parameters
from mpizero_torch.runtime import init
from mpizero_torch.sharding.access import full_parameter
from mpizero_torch.sharding.mean_gradients import digest_of, octets
from mpizero_torch.sharding.precision import as_policy
from mpizero_torch.sharding.zero import zero
from mpizero_torch.sync_batch_norm import SyncBatchNorm
from mpizero_torch.verify_by_hand import (
    ByHand,
    do_by_hand,
    gradients_of,
    largest_difference,
    length,
)
from mpizero_torch.verify_by_hand import differences as compare_by_hand

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

# All parameters' values after they have been halved, beside their length: 1 if that was lost.
_WRITTEN_16_BITS = 0.25


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
    others: tuple[str, ...] = ()  # what else differs, in words

    @property
    def ok(self) -> bool:
        named = (self.step, self.parameter, self.gradient)
        return self.moved and not self.others and all(each is None for each in named)


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
                line += "".join(f"; {each}" for each in result.others)
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

    Compared are losses, the first gradients, parameters and buffers, what training has changed, and
    how often the optimizer was called; then what loops do by hand: parameters are halved, gradients
    forgotten, halved, added up and clipped.

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
        alone = _alone(build, batches, seed, world)
        dtype = next(iter(alone.parameters.values())).dtype
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
    written: float
    is_narrow: bool

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
            _WRITTEN_16_BITS if narrow else min(_WRITTEN_16_BITS, looser),
            narrow,
        )


@dataclass(frozen=True)
class _Alone:
    """What one process has trained: by name, before and after, and gradients of the first step."""

    losses: list[float]
    before: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor | None]
    parameters: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    by_hand: ByHand


def _alone(build: Build, batches: Sequence[Sequence[Any]], seed: int, world: World) -> _Alone:
    torch.manual_seed(seed)
    model, optimizer, loss = build()
    itself = world.split(world.rank)
    for part in model.modules():
        if isinstance(part, SyncBatchNorm) and itself is not None:
            part.world = itself  # the whole batch is here
    optimizers = _listed(optimizer)
    named = dict(named_parameters(model))
    before = _copies(named)
    losses: list[float] = []
    gradients: dict[str, torch.Tensor | None] = {}
    for batch in batches:
        value = loss(model, *batch)
        for each in optimizers:
            each.zero_grad()
        value.backward()
        if not losses:
            gradients = gradients_of(named)
        for each in optimizers:
            each.step()
        losses.append(value.item())
    after, buffers = _copies(named), _copies(dict(named_buffers(model)))
    by_hand = do_by_hand(model, named, optimizers, loss, _even(batches[-1], world.size))
    if itself is not None:
        itself.close()
    return _Alone(losses, before, gradients, after, buffers, by_hand)


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in tensors.items()}


def _even(batch: Sequence[Any], ranks: int) -> list[Any]:
    """As much of a batch as has the same share for each rank."""
    count = len(batch[0]) // ranks * ranks
    return [part[:count] for part in batch]


def _part(batch: Sequence[Any], world: World) -> list[Any]:
    count = len(batch[0])
    start, stop = (count * at // world.size for at in (world.rank, world.rank + 1))
    return [part[start:stop] for part in batch]


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
    calls = [0 for _ in _listed(plain_optimizer)]
    for at, each in enumerate(_listed(plain_optimizer)):
        each.register_step_post_hook(_counter(calls, at))
    kept = options if stage else {}
    model, optimizer = zero(plain, plain_optimizer, stage, world=world, **kept)
    optimizers, named = _listed(optimizer), dict(named_parameters(plain))
    differences: list[float] = []
    gradient, gradient_by = None, 0.0
    for batch, should in zip(batches, alone.losses, strict=True):
        count, own = len(batch[0]), _part(batch, world)
        is_made = False
        while not is_made:  # a loss scale has to be found first
            if count % world.size:
                model.weigh(len(own[0]))
            value = loss(model, *own)
            for each in optimizers:
                each.zero_grad()
            value.backward()
            if not differences:
                gradient, gradient_by = largest_difference(gradients_of(named), alone.gradients)
            for each in optimizers:
                each.step()
            is_made = not any(getattr(each, "step_was_skipped", False) for each in optimizers)
        found = world.allreduce(value.item() * len(own[0])) / count
        differences.append(abs(found - should) / max(abs(should), 1e-30))
    wrong = [step for step, each in enumerate(differences) if not each <= bounds.loss]
    values = {name: full_parameter(parameter) for name, parameter in named.items()}
    name, by = _first_difference(values, alone.parameters, bounds.parameter)
    update_by = _update_difference(values, alone)
    largest = float(world.allreduce(max(differences, default=0.0), "max"))
    others = [*_buffers_that_differ(plain, alone, bounds, world, options, stage)]
    by_hand = do_by_hand(
        model, named, optimizers, loss, _part(_even(batches[-1], world.size), world),
        alone.by_hand.norm,
    )  # fmt: skip
    others += compare_by_hand(by_hand, alone.by_hand, bounds.gradient, bounds.written)
    if any(each != len(batches) + 1 for each in calls):
        others.append(f"the optimizer was called {calls} times in {len(batches) + 1} steps")
    mine = StageResult(
        stage,
        largest,
        wrong[0] if wrong else None,
        name,
        by,
        None if gradient_by <= bounds.gradient else gradient,
        gradient_by,
        update_by,
        update_by <= bounds.update,
        tuple(others),
    )
    # Replicas may differ on one rank alone.
    everyones: list[StageResult] = world.gather_objects(mine)
    return next((each for each in everyones if not each.ok), everyones[0])


def _counter(calls: list[int], at: int) -> Callable[..., None]:
    def count(*_: Any) -> None:
        calls[at] += 1

    return count


def _buffers_that_differ(
    plain: nn.Module,
    alone: _Alone,
    bounds: _Bounds,
    world: World,
    options: Mapping[str, Any],
    stage: int,
) -> list[str]:
    """From one process's, or between ranks that are to have the same."""
    found, said = _copies(dict(named_buffers(plain))), []
    if not bounds.is_narrow:  # where a step may have been repeated, and inputs are rounded
        name, by = _first_difference(found, alone.buffers, bounds.parameter)
        if name is not None:
            said.append(f"buffer {name!r} by {by:.3g}")
    if not stage or options.get("broadcast_buffers", True):
        everyones = world.gather_objects([digest_of([octets(each)]) for each in found.values()])
        for at, name in enumerate(found):
            if any(each[at] != everyones[0][at] for each in everyones):
                said.append(f"buffer {name!r} between ranks")
                break
    return said


def _listed(optimizer: Any) -> list[Any]:
    return list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]


def _update_difference(values: Mapping[str, torch.Tensor], alone: _Alone) -> float:
    """Of the way from the first parameters to the last, beside its length."""
    ways = []
    for name, should in alone.parameters.items():
        if should.is_floating_point() or should.is_complex():
            before = alone.before[name]
            ways.append((values[name].to(should) - before, should - before))
    whole = length([should for _, should in ways])
    difference = length([found - should for found, should in ways])
    return difference / whole if whole else difference


def _first_difference(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float
) -> tuple[str | None, float]:
    """The first tensor that differs, and by how much beside its largest number."""
    for name, should in expected.items():
        if not should.numel():
            continue
        scale = max(float(should.abs().max()), 1e-30)
        by = float((found[name].to(should) - should).abs().max()) / scale
        if not by <= tolerance:
            return name, by
    return None, 0.0
