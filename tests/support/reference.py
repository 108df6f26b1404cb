"""What distributed gradients must equal: one process on all ranks' data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn


def seeded(seed: int, *shape: int) -> torch.Tensor:
    """Float64 normal numbers that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """The gradients of a model by name (copies), None where there is none."""
    inner = getattr(model, "module", model)
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in inner.named_parameters()
    }


def expected_gradients(
    model: nn.Module,
    losses: Sequence[Callable[[nn.Module], torch.Tensor]],
    weights: Sequence[float],
) -> dict[str, torch.Tensor | None]:
    """sum(weight x gradient) / sum(weights) over the losses, summed in float64.

    None for parameters that no loss uses, as in one process.
    """
    alone = copy.deepcopy(getattr(model, "module", model))
    sums: dict[str, torch.Tensor | None] = dict.fromkeys(gradients(alone))
    for each, weight in zip(losses, weights, strict=True):
        alone.zero_grad()
        each(alone).backward()
        for name, gradient in gradients(alone).items():
            if gradient is not None:
                weighted = gradient.double() * weight if weight else torch.zeros_like(gradient)
                before = sums[name]
                sums[name] = weighted if before is None else before + weighted
    total = sum(weights)
    dtypes = {name: p.dtype for name, p in alone.named_parameters()}
    return {n: None if s is None else (s / total).to(dtypes[n]) for n, s in sums.items()}


def assert_same_gradients(
    ours: dict[str, torch.Tensor | None], theirs: dict[str, torch.Tensor | None]
) -> None:
    """Equal to the rounding of float64 sums in another order, and None in the same places."""
    assert ours.keys() == theirs.keys()
    for name, mine in ours.items():
        other = theirs[name]
        assert (mine is None) == (other is None), f"{name}: {mine} against {other}"
        if mine is not None and other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-13, msg=name)
