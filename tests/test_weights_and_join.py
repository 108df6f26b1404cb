"""Weighted means of gradients, and ranks that run out of data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mpizero_torch as mz
from support.reference import assert_same_gradients, expected_gradients, gradients, seeded

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])


def net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    return model(seeded(seed, 3, 4)).square().mean()


def per_pass(count: int) -> list[Any]:
    return [lambda m, s=s: loss_of(m, s) for s in range(count)]


@ranks
def test_stated_weights_over_ranks() -> None:
    model = mz.DistributedDataParallel(net())
    size, rank = model.world.size, model.world.rank
    for step in range(3):
        weights = [(r * 7 + step) % 5 + 1.0 for r in range(size)]
        model.weigh(weights[rank])
        loss_of(model, rank).backward()
        assert_same_gradients(gradients(model), expected_gradients(model, per_pass(size), weights))
        model.zero_grad(set_to_none=step == 1)


@ranks
@pytest.mark.parametrize("use_no_sync", [True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_stated_weights_over_accumulated_passes(use_no_sync: bool, set_to_none: bool) -> None:
    model = mz.DistributedDataParallel(net())
    size, rank = model.world.size, model.world.rank
    weights = [float(3 * s % 7 + 1) for s in range(3 * size)]
    for _ in range(2):
        for micro_step in range(3):
            mine = micro_step * size + rank
            model.weigh(weights[mine])
            if use_no_sync and micro_step < 2:
                with model.no_sync():
                    loss_of(model, mine).backward()
            else:
                loss_of(model, mine).backward()
        expected = expected_gradients(model, per_pass(3 * size), weights)
        assert_same_gradients(gradients(model), expected)
        model.zero_grad(set_to_none=set_to_none)


@several_ranks
def test_an_idle_rank_may_have_nothing_but_nan() -> None:
    model = mz.DistributedDataParallel(net())
    size, rank = model.world.size, model.world.rank
    weights = [0.0] + [2.0] * (size - 1)
    for _ in range(2):
        model.zero_grad()
        model.weigh(weights[rank])
        loss = loss_of(model, rank)
        (loss * float("nan") if rank == 0 else loss).backward()
        assert_same_gradients(gradients(model), expected_gradients(model, per_pass(size), weights))


@several_ranks
def test_all_ranks_idle_gives_zero() -> None:
    model = mz.DistributedDataParallel(net())
    model.weigh(0)
    loss_of(model, 0).backward()
    assert all(not p.grad.any() for p in model.parameters())


@several_ranks
def test_a_weight_stated_on_some_ranks_only_is_refused() -> None:
    model = mz.DistributedDataParallel(net())
    if model.world.rank == 0:
        model.weigh(3)
    with pytest.raises(mz.MismatchError, match="rank 0: stated a weight"):
        loss_of(model, 0).backward()


@ranks
def test_a_weight_stated_for_some_accumulated_passes_only_is_refused() -> None:
    model = mz.DistributedDataParallel(net())
    model.weigh(3)
    with model.no_sync():
        loss_of(model, 0).backward()
    with pytest.raises(mz.ArgumentError, match="weigh"):
        loss_of(model, 0).backward()


@several_ranks
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_join_lets_ranks_end_at_different_steps(with_optimizer: bool) -> None:
    model = mz.DistributedDataParallel(net())
    alone = net()
    size, rank = model.world.size, model.world.rank
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    reference = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    steps = [2 + 2 * r for r in range(size)]  # rank 0 is done first
    with model.join(optimizer if with_optimizer else None):
        for step in range(steps[rank]):
            optimizer.zero_grad()
            loss_of(model, 10 * step + rank).backward()
            optimizer.step()
    for step in range(max(steps)):
        active = [r for r in range(size) if step < steps[r]]
        reference.zero_grad()
        for r in active:
            (loss_of(alone, 10 * step + r) / len(active)).backward()
        reference.step()
    for ours, theirs in zip(model.module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    if with_optimizer:
        for parameter in model.parameters():
            momentum = optimizer.state[parameter]["momentum_buffer"]
            first = model.world.broadcast(momentum.clone(), root=size - 1)
            assert torch.equal(first, momentum)


@several_ranks
def test_join_with_a_rank_that_has_no_data_and_buffers() -> None:
    torch.manual_seed(1)
    inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = mz.DistributedDataParallel(inner)
    rank = model.world.rank
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with model.join(optimizer):
        for step in range(3 if rank else 0):
            optimizer.zero_grad()
            model(seeded(step + rank, 5, 4).float()).square().sum().backward()
            optimizer.step()
    for name, tensor in model.state_dict().items():
        first = model.world.broadcast(tensor.clone(), root=1)
        assert torch.equal(first, tensor), name


@ranks
def test_join_where_all_end_together() -> None:
    model = mz.DistributedDataParallel(net())
    size = model.world.size
    for _ in range(2):
        model.zero_grad()
        with model.join():
            loss_of(model, model.world.rank).backward()
        assert_same_gradients(
            gradients(model), expected_gradients(model, per_pass(size), [1] * size)
        )
