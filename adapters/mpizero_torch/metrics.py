"""Numbers over all ranks: the global loss, counts, accuracies."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from typing import Any

import torch

from mpizero import ArgumentError, World
from mpizero_torch import batch_weight
from mpizero_torch.runtime import init
from mpizero_torch.weighed_batches import stripped

Value = Any  # a number, a tensor, or a dict of numbers


def mean(value: Value, weight: float | None = None, *, world: World | None = None) -> Any:
    """The mean of ``value`` over the ranks: the global loss from each rank's loss.

    ``value``: a number or one-element tensor (returns a float), a tensor (returns a new float64
    tensor of its shape), or a dict of numbers (returns a dict, with one message for all). Each rank
    counts with ``weight``: by default what the batch counts that a tensor was computed from, as
    ``mz.shard`` dealt it, or for a mere number the batch at hand of the loop that is open; so a
    short last batch, or an idle rank, does not bias the mean. Collective. NaN if all weights are
    zero. Raises ArgumentError where it cannot be known, as with numbers in several loops at once,
    or after a loop whose uneven batches have been looked at as numbers.
    """
    total = _reduce(value, lambda: _own_weight(value, weight), world)
    return _rebuild(value, total[:-1] / total[-1])


def _own_weight(value: Value, weight: float | None) -> float:
    if weight is None:
        return batch_weight.of_value(value)
    return _checked(weight, "mean()")


def _checked(weight: float, function: str) -> float:
    given = builtins.float(weight)
    if not (math.isfinite(given) and given >= 0):
        raise ArgumentError(function, "weight", str(given), "a finite number >= 0")
    return given


def sum(value: Value, weight: float | None = None, *, world: World | None = None) -> Any:
    """The sum of ``value`` over the ranks, in float64 (integers are exact up to 2^53).

    Takes and returns what ``mean`` does; integer numbers come back as int. Collective. ``weight``
    is a factor for this rank's value: by default 0 for a tensor that was computed from the filler
    batch of a rank without samples, and 1 for all others. Raises ArgumentError where a filler may
    be in it, as in a number after a loop in which a filler's samples have been counted: evaluate
    with ``shard(loader, evaluation=True)``, or state the weight.
    """
    total = _reduce(value, lambda: _own_factor(value, weight), world)
    return _rebuild(value, total[:-1], integers=True)


def _own_factor(value: Value, weight: float | None) -> float:
    if weight is None:
        return 1.0 if batch_weight.counted(value) else 0.0
    return _checked(weight, "sum()")


def _weighted(value: Value, weight: float) -> torch.Tensor:
    numbers = _flatten(value)
    return numbers * weight if weight else torch.zeros_like(numbers)  # 0 x NaN is NaN


def _reduce(value: Value, weigh: Callable[[], float], world: World | None) -> torch.Tensor:
    """The sums over the ranks of the weighted numbers, and of the weights."""
    world = world if world is not None else init()
    with world.telling():
        weight = weigh()
        numbers = _weighted(value, weight)
        message = torch.cat([numbers, torch.tensor([weight], dtype=torch.float64)])
    world.allreduce(message)
    return message


def _flatten(value: Value) -> torch.Tensor:
    if isinstance(value, dict):
        parts = [_flatten(part) for part in value.values()]
        if any(part.numel() != 1 for part in parts):
            raise ArgumentError("mean()", "value", "a dict with arrays", "a dict of numbers")
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
    value = stripped(value)
    dtype = value.dtype if isinstance(value, torch.Tensor) else torch.float64
    tensor = torch.as_tensor(value, dtype=dtype).detach()
    return tensor.to(device="cpu", dtype=torch.float64, copy=True).reshape(-1)


def _rebuild(value: Value, numbers: torch.Tensor, integers: bool = False) -> Any:
    if isinstance(value, dict):
        return {
            key: _rebuild(part, numbers[at : at + 1], integers)
            for at, (key, part) in enumerate(value.items())
        }
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        return numbers.reshape(value.shape)
    number = numbers.item()
    return builtins.int(number) if integers and isinstance(value, int) else number
