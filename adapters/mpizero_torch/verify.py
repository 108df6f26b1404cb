"""``verify``: does a model train the same at every stage as in one process?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError, World
from mpizero_torch.runtime import init
from mpizero_torch.sharding.zero import zero

Build = Callable[[], tuple[nn.Module, torch.optim.Optimizer, Callable[..., torch.Tensor]]]

# Relative to the loss. Sums over ranks are rounded in another order than sums within one batch, and
# a few steps of an optimizer amplify that: some hundred units in the last place.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
_TOLERANCE_16_BITS = 2e-2

# An optimizer that divides by the root of a squared gradient makes much of rounding where a
# gradient is almost zero: parameters may differ by more than losses, beside the largest of them.
_PARAMETERS_LOOSER = 1e3


@dataclass(frozen=True)
class StageResult:
    """How one stage compares with one process."""

    stage: int
    loss_difference: float  # the largest, relative
    step: int | None  # the first at which it is more than the tolerance
    parameter: str | None  # the first that differs at the end
    parameter_difference: float  # its, relative to its largest number
    ok: bool


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

    ``build()`` gives a model, its optimizer, and ``loss(model, *batch)``, a mean over samples; it
    is called once for each stage and once for one process, after ``torch.manual_seed(seed)``.
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
        expected, model = _alone(build, batches, seed)
        if tolerance is None:
            dtype = next(model.parameters()).dtype
            tolerance = _TOLERANCE.get(dtype, _TOLERANCE_16_BITS)
            if options.get("precision") not in (None, "fp32", torch.float32):
                tolerance = _TOLERANCE_16_BITS
        results = tuple(
            _compare(stage, build, batches, seed, world, expected, model, tolerance, options)
            for stage in stages
        )
        return VerifyReport(world.size, tolerance, results)


def _alone(build: Build, batches: Sequence[Sequence[Any]], seed: int) -> tuple[list[float], Any]:
    torch.manual_seed(seed)
    model, optimizer, loss = build()
    losses = []
    for batch in batches:
        value = loss(model, *batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses, model


def _compare(
    stage: int,
    build: Build,
    batches: Sequence[Sequence[Any]],
    seed: int,
    world: World,
    expected: Sequence[float],
    reference: nn.Module,
    tolerance: float,
    options: dict[str, Any],
) -> StageResult:
    torch.manual_seed(seed)
    plain, plain_optimizer, loss = build()
    kept = options if stage else {}
    model, optimizer = zero(plain, plain_optimizer, stage, world=world, **kept)
    differences = []
    for batch, should in zip(batches, expected, strict=True):
        count = len(batch[0])
        start, stop = (count * at // world.size for at in (world.rank, world.rank + 1))
        if count % world.size:
            model.weigh(stop - start)
        value = loss(model, *(each[start:stop] for each in batch))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found = world.allreduce(value.item() * (stop - start)) / count
        differences.append(abs(found - should) / max(abs(should), 1e-30))
    wrong = [step for step, difference in enumerate(differences) if not difference <= tolerance]
    name, by = _first_difference(
        model.state_dict(), reference, min(1.0, tolerance * _PARAMETERS_LOOSER)
    )
    largest = float(world.allreduce(max(differences, default=0.0), "max"))
    return StageResult(
        stage, largest, wrong[0] if wrong else None, name, by, not wrong and not name
    )


def _first_difference(
    state: dict[str, Any], reference: nn.Module, tolerance: float
) -> tuple[str | None, float]:
    """The first parameter that differs, and by how much beside its largest number."""
    for name, should in reference.named_parameters():
        scale = max(float(should.detach().abs().max()), 1e-30) if should.numel() else 1.0
        difference = (state[name].to(should) - should.detach()).abs()
        by = float(difference.max()) / scale if should.numel() else 0.0
        if not by <= tolerance:
            return name, by
    return None, 0.0
