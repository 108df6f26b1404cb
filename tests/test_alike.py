"""Ranks whose parameters are no longer the same: seen at the next average, whatever the reason."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import mpizero_torch as mz
from support.reference import seeded

several_ranks = pytest.mark.parallel([2, 3, 4])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    model(seeded(100 * step + mz.init().rank, 3, 4).float()).square().mean().backward()


def trained(steps: int, **options: Any) -> tuple[Any, torch.optim.Optimizer]:
    inner = net()
    model = mz.DistributedDataParallel(inner, **options)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    for step in range(steps):
        backward(model, step)
        optimizer.step()
    return model, optimizer


def is_last() -> bool:
    return mz.init().rank == mz.init().size - 1


@several_ranks
def test_a_step_that_one_rank_leaves_out() -> None:
    model, optimizer = trained(2)
    backward(model, 2)
    if not is_last():
        optimizer.step()
    with pytest.raises(mz.MismatchError, match=r"rank.* not those of rank 0 any more: '"):
        backward(model, 3)


@several_ranks
def test_a_learning_rate_of_its_own() -> None:
    """All ranks write as often: an element tells."""
    model, optimizer = trained(2)
    if is_last():
        optimizer.param_groups[0]["lr"] = 0.2
    with pytest.raises(mz.MismatchError, match="another learning rate"):
        for step in range(2, 4):
            backward(model, step)
            optimizer.step()


@several_ranks
def test_one_layer_that_differs_is_found_in_as_many_passes_as_there_are_parameters() -> None:
    model, _ = trained(1)
    if is_last():
        model.module[2].bias.data.add_(1.0)
    passes = 0
    with pytest.raises(mz.MismatchError, match=r"'2\.bias'"):
        while passes < 4:
            backward(model, passes)
            passes += 1


@several_ranks
def test_a_rank_that_swaps_an_average_in_and_out_may_do_so() -> None:
    model, optimizer = trained(2)
    same, its = trained(2)
    for step in range(2, 5):
        if is_last():
            with torch.no_grad():
                for parameter in model.parameters():
                    kept = parameter.clone()
                    parameter.zero_()
                    parameter.copy_(kept)
        for each, one in ((model, optimizer), (same, its)):
            backward(each, step)
            one.step()
    for own, other in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(own, other)


@several_ranks
def test_updates_that_a_processor_rounds_differently_are_warned_of_once() -> None:
    model, optimizer = trained(2)
    if is_last():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data.mul_(1 + 1e-6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(2, 5):
            backward(model, step)
            optimizer.step()
    said = [each for each in caught if "rounded differently" in str(each.message)]
    assert len(said) == (1 if mz.init().rank == 0 else 0)


@several_ranks
def test_ranks_that_ask_for_parameters_of_their_own_have_them() -> None:
    inner = net()
    with torch.no_grad():
        for parameter in inner.parameters():
            parameter.add_(float(mz.init().rank))
    own = copy.deepcopy(inner)
    model = mz.DistributedDataParallel(inner, init_sync=False)
    for step in range(3):
        backward(model, step)
    for mine, before in zip(inner.parameters(), own.parameters(), strict=True):
        assert torch.equal(mine, before)


@several_ranks
def test_not_a_number_everywhere_is_the_same() -> None:
    model, _ = trained(1)
    with torch.no_grad():
        model.module[0].weight.fill_(float("nan"))
        if is_last():
            model.module[0].weight.fill_(float("nan"))  # counts differ
    backward(model, 1)
