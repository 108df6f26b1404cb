"""Ranks that have drifted apart are found, and named; and the first gradient that is not finite."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mpizero_torch as mz


def trained(stage: int | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    world = mz.init()
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if stage is None:
        model = mz.DistributedDataParallel(model)
    else:
        model, optimizer = mz.zero(model, optimizer, stage=stage)
    torch.manual_seed(world.rank)
    for _ in range(2):
        model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("stage", [None, 1, 2, 3])
def test_what_was_trained_together_is_in_sync(stage: int | None) -> None:
    mz.assert_in_sync(*trained(stage))


@pytest.mark.parallel([2, 3, 4])
def test_one_changed_bit_is_found_on_all_ranks() -> None:
    model, optimizer = trained()
    rank, size = model.world.rank, model.world.size
    with torch.no_grad():
        if rank == size - 1:
            weight = model.module[2].weight.view(-1)
            weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))
    with pytest.raises(mz.MismatchError) as error:
        mz.assert_in_sync(model, optimizer)
    text = str(error.value)
    assert "'2.weight', the first of 1 of" in text
    assert f"rank {size - 1}: 1 of 10 elements differ from rank 0's, first at 3" in text
    mz.init().barrier()


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("what", ["state", "rate", "buffer"])
def test_state_settings_and_buffers_are_compared_too(what: str) -> None:
    model, optimizer = trained()
    if model.world.rank == 1:
        if what == "state":
            optimizer.state[model.module[0].bias]["exp_avg"][1] += 1
        elif what == "rate":
            optimizer.param_groups[0]["lr"] *= 2
        else:
            model.module[1].running_mean[0] = 7
    named = {"state": "exp_avg of 0.bias", "rate": "group 0", "buffer": "1.running_mean"}[what]
    with pytest.raises(mz.MismatchError, match=named):
        mz.assert_in_sync(model, optimizer)


@pytest.mark.parallel([2, 3])
def test_a_rank_that_compares_another_model_is_named() -> None:
    rank = mz.init().rank
    with pytest.raises(mz.MismatchError, match="what is to be in sync"):
        mz.assert_in_sync(nn.Linear(2, 2 + (rank == 1)))


@pytest.mark.parallel([1, 2, 3])
def test_nan_and_signed_zeros_are_bits_like_others() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight[0, 0], model.weight[0, 1], model.bias[0] = float("nan"), -0.0, 1
    mz.assert_in_sync(model)


@pytest.mark.parallel([1, 2, 3])
def test_the_first_gradient_that_is_not_finite_is_named_where_it_came() -> None:
    world = mz.init()
    model = mz.DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)))
    with mz.detect_nonfinite(model):
        model(torch.ones(2, 3)).sum().backward()  # nothing to say
    seen = []
    with mz.detect_nonfinite(model), model.no_sync():
        x = torch.ones(2, 3)
        if world.rank == world.size - 1:
            x[0, 0] = float("nan")
        try:
            model.module[1](torch.relu(model.module[0](x)) * x).sum().backward()
        except mz.MpizeroError as error:
            seen.append(str(error))
    assert bool(seen) == (world.rank == world.size - 1)
    if seen:
        assert f"on rank {world.rank}" in seen[0] and "'1.weight' has NaN" in seen[0]


@pytest.mark.parallel(1)
def test_what_overflows_by_design_is_refused() -> None:
    model = nn.Linear(2, 2)
    sharded, _ = mz.zero(model, torch.optim.SGD(model.parameters(), 0.1), 1, precision="fp16")
    with pytest.raises(mz.ArgumentError, match="fp16"), mz.detect_nonfinite(sharded):
        pass
