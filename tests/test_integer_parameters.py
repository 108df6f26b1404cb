"""Frozen parameters of integers, as quantised models have them, among an optimizer's parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mpizero_torch as mz

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])

WAYS = {
    f"stage {stage}, {partition}, {'shared' if share is None else 'private'}": {
        "stage": stage, "partition": partition, "share_parameters": share,
    }
    for stage in (1, 2, 3) for partition in ("flat", "parameter") for share in (None, False)
}  # fmt: skip
WAYS["bf16"] = {"stage": 2, "precision": "bf16"}
WAYS["node"] = {"stage": 2, "shard_group": "node"}
CASES = [
    *((way, torch.int8) for way in WAYS),
    *(("stage 3, flat, private", dtype) for dtype in (torch.uint8, torch.int64, torch.bool)),
]


class Quantised(nn.Module):
    """A linear layer whose weights are integers; what is trained is their scale, and a bias."""

    def __init__(self, dtype: torch.dtype, out: int) -> None:
        super().__init__()
        numbers = torch.randint(0, 2 if dtype == torch.bool else 7, (out, 6))
        self.weight = nn.Parameter(numbers.to(dtype), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(out, 1))
        self.bias = nn.Parameter(torch.rand(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def build(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(Quantised(dtype, 6), Quantised(dtype, 3))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """The first layer; all weights of integers and no other; and the rest."""
    first, second = model
    return [
        {"params": [first.scale, first.weight]},
        {"params": [second.weight], "lr": 0.5},
        {"params": [first.bias, second.bias, second.scale], "weight_decay": 0.1},
    ]


def train(model: Any, optimizer: Any, world: mz.World, steps: range, share: bool) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.rand(2 * world.size, 6, generator=generator)
        if share:
            x = x[2 * world.rank : 2 * world.rank + 2]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@ranks
@pytest.mark.parametrize(("way", "dtype"), CASES, ids=str)
def test_they_stay_as_they_are_and_the_others_are_trained(way: str, dtype: torch.dtype) -> None:
    world = mz.init()
    alone, plain = build(dtype), build(dtype)
    if world.rank > 0:  # rank 0's values count
        plain[0].weight.data.zero_()
    its, own = (torch.optim.AdamW(groups(each), lr=1e-2) for each in (alone, plain))
    model, optimizer = mz.zero(plain, own, segment_mb=1e-4, **WAYS[way])
    train(alone, its, world, range(3), share=False)
    train(model, optimizer, world, range(3), share=True)
    loose = {"rtol": 2e-2, "atol": 2e-2} if way == "bf16" else {"rtol": 1e-5, "atol": 1e-6}
    found = model.state_dict()
    for name, value in alone.state_dict().items():
        assert found[name].dtype == value.dtype
        exactly = {} if value.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(found[name], value, **(exactly or loose))
    saved, expected = optimizer.state_dict(), its.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    assert saved["state"].keys() == expected["state"].keys()
    its.load_state_dict(saved)
    optimizer.load_state_dict(expected)
    model.load_state_dict(found)
    train(model, optimizer, world, range(3, 4), share=True)
    mz.assert_in_sync(model, optimizer)
    mz.clip_grad_norm_(model, 1.0)


@ranks
@pytest.mark.parametrize("stage", [1, 3])
def test_they_are_saved_and_loaded(stage: int, tmp_path: Path) -> None:
    world = mz.init()
    path = world.broadcast_object(str(tmp_path / "c"))
    way = {"stage": stage, "share_parameters": False}
    plain = build(torch.int8)
    model, optimizer = mz.zero(plain, torch.optim.AdamW(groups(plain)), **way)
    train(model, optimizer, world, range(2), share=True)
    mz.save(path, model=model, optimizer=optimizer)
    other = build(torch.int8)
    for parameter in other.parameters():
        parameter.data.zero_()
    again, its = mz.zero(other, torch.optim.AdamW(groups(other)), **way)
    mz.load(path, model=again, optimizer=its)
    for one, two in ((model, optimizer), (again, its)):
        train(one, two, world, range(2, 3), share=True)
    found, expected = again.state_dict(), model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@ranks
def test_they_may_come_later_and_only_once() -> None:
    world = mz.init()
    model = build(torch.int8)
    first, second = model
    optimizer = torch.optim.AdamW([first.scale, first.weight])
    module, optimizer = mz.zero(model, optimizer)
    optimizer.add_param_group({"params": [second.weight, second.scale]})
    optimizer.add_param_group({"params": [second.bias]})
    for again in (first.weight, second.weight):
        with pytest.raises(mz.ArgumentError, match="in no group"):
            optimizer.add_param_group({"params": [again]})
    before = second.weight.clone()
    train(module, optimizer, world, range(2), share=True)
    assert torch.equal(module.state_dict()["1.weight"], before)
    assert [len(group["params"]) for group in optimizer.state_dict()["param_groups"]] == [2, 2, 1]


@ranks
def test_what_cannot_travel_is_refused_by_name() -> None:
    model = build(torch.int8)
    model[1].weight = nn.Parameter(torch.ones(3, 6).to(torch.float8_e4m3fnuz), requires_grad=False)
    with pytest.raises(mz.ArgumentError, match=r"'1.weight' is of torch.float8_e4m3fnuz"):
        mz.zero(model, torch.optim.AdamW(model.parameters()))


@several_ranks
def test_replicas_take_them_too() -> None:
    world = mz.init()
    alone, plain = build(torch.int8), build(torch.int8)
    its, own = (torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (alone, plain))
    model = mz.DistributedDataParallel(plain)
    train(alone, its, world, range(2), share=False)
    train(model, own, world, range(2), share=True)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
