"""Numbers over ranks, and batch normalisation over ranks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import mpizero_torch as mz
from mpizero_torch import batch_weight
from support.reference import seeded

ranks = pytest.mark.parallel([1, 2, 3, 4])


@ranks
def test_mean_and_sum_of_numbers_tensors_and_dicts() -> None:
    world = mz.init()
    size, rank = world.size, world.rank
    assert mz.mean(float(rank)) == (size - 1) / 2
    assert mz.mean(torch.tensor(float(rank), requires_grad=True)) == (size - 1) / 2
    assert mz.mean(1 / 3) == pytest.approx(1 / 3, rel=1e-15)  # a Python float has 53 bits
    assert mz.sum(3) == 3 * size and isinstance(mz.sum(3), int)
    assert mz.sum({"right": rank, "loss": 0.5}) == {
        "right": size * (size - 1) // 2,
        "loss": 0.5 * size,
    }
    table = mz.mean(torch.full((2, 3), float(rank)))
    assert table.shape == (2, 3) and torch.all(table == (size - 1) / 2)
    with pytest.raises(mz.ArgumentError, match="dict of numbers"):
        mz.mean({"a": torch.ones(2)})


@ranks
def test_mean_weighs_ranks() -> None:
    world = mz.init()
    size, rank = world.size, world.rank
    expected = sum(r * (r + 1) for r in range(size)) / sum(r + 1 for r in range(size))
    assert mz.mean(float(rank), weight=rank + 1) == pytest.approx(expected)
    assert math.isnan(mz.mean(1.0, weight=0))
    idle = rank == 0 and size > 1
    value = batch_weight.hand_out(torch.tensor(float("nan") if idle else 2.0), 0.0 if idle else 1.0)
    assert mz.mean(value) == mz.mean({"a": value})["a"] == 2.0  # an idle rank's may be anything


@ranks
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 2, 2)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_over_ranks_is_batch_norm_over_the_whole_batch(
    shape: tuple[int, ...], affine: bool, momentum: float | None
) -> None:
    world = mz.init()
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    alone = kinds[len(shape)](3, affine=affine, momentum=momentum).double()
    if affine:
        nn.init.normal_(alone.weight), nn.init.normal_(alone.bias)
        for parameter in alone.parameters():
            world.broadcast(parameter)
    ours = mz.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(alone))
    # Ranks have different numbers of samples, far from zero: cancellation would show.
    counts = [shape[0] + 2 * r for r in range(world.size)]
    whole = seeded(1, sum(counts), *shape[1:]) + 1e4
    mine = slice(sum(counts[: world.rank]), sum(counts[: world.rank + 1]))
    for _ in range(2):
        x, own = whole.clone().requires_grad_(), whole[mine].clone().requires_grad_()
        expected, got = alone(x), ours(own)
        torch.testing.assert_close(got, expected[mine], rtol=1e-7, atol=1e-9)
        factor = seeded(2, *whole.shape)
        (expected * factor).sum().backward()
        (got * factor[mine]).sum().backward()
        torch.testing.assert_close(own.grad, x.grad[mine], rtol=1e-6, atol=1e-9)
    for (name, b), theirs in zip(ours.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(b, theirs, rtol=1e-9, atol=1e-9, msg=name)
    ours.eval(), alone.eval()
    torch.testing.assert_close(ours(whole[mine]), alone(whole[mine]))


@ranks
def test_conversion_keeps_parameters_and_finds_every_batch_norm() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    weight = model[0].weight
    converted = mz.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted[0].weight is weight
    assert [type(m) for m in converted.modules()].count(mz.SyncBatchNorm) == 2
    assert list(converted.state_dict()) == list(model.state_dict())
    if mz.init().size > 1:
        with pytest.raises(mz.ArgumentError, match="input"):
            converted[0](torch.zeros(2, 3, 4, 4))


@pytest.mark.parallel([2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input(dtype: torch.dtype) -> None:
    world = mz.init()
    ours = mz.SyncBatchNorm(3)
    whole = seeded(1, 8, 3).to(dtype)
    mine = whole[world.rank * 4 : world.rank * 4 + 4].clone().requires_grad_()
    out = ours(mine)
    assert out.dtype == dtype
    expected = nn.BatchNorm1d(3)(whole.float())[world.rank * 4 : world.rank * 4 + 4]
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
    out.sum().backward()
    assert mine.grad.dtype == dtype


@ranks
def test_a_copy_of_a_synchronised_batch_norm_is_one_of_the_same_ranks() -> None:
    world = mz.init()
    ours = mz.SyncBatchNorm.convert_sync_batchnorm(torch.nn.BatchNorm1d(3), world)
    copied = copy.deepcopy(ours)
    assert copied.world is world
    x = torch.full((2, 3), float(world.rank))
    torch.testing.assert_close(copied(x), ours(x))
