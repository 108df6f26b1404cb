"""Sixteen bits with float32 copies, scaled losses, offload; and what mz.zero refuses."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mpizero_torch as mz
from support.models import KINDS, loss

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])

KIND = next(kind for kind in KINDS if kind.name == "transformer")
PER_RANK = 4
STAGES = [
    pytest.param({"stage": 1}, id="1"),
    pytest.param({"stage": 2, "partition": "parameter"}, id="2"),
    pytest.param({"stage": 3}, id="3"),
    pytest.param({"stage": 3, "share_parameters": False}, id="3 private"),
]


def sharded(**options: Any) -> tuple[Any, Any]:
    model = KIND.build()
    return mz.zero(
        model, torch.optim.AdamW(model.parameters(), lr=1e-3), segment_mb=0.002, **options
    )


def losses(model: Any, optimizer: Any, steps: int, micro: int = 1) -> list[float]:
    world = mz.init()
    own = slice(world.rank * PER_RANK, (world.rank + 1) * PER_RANK)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(micro):
            x, y = KIND.batch(world.size * PER_RANK, 10 * step + part)
            value = loss(model, x[own], y[own])
            (value / micro).backward()
        optimizer.step()
        found.append(mz.mean(value))
    return found


@ranks
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("way", STAGES)
def test_sixteen_bits_train_like_float32(way: dict[str, Any], precision: str) -> None:
    exact = losses(*sharded(**way), 12)
    model, optimizer = sharded(precision=precision, **way)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    found = losses(model, optimizer, 12)
    # bfloat16 keeps 8 bits: activations are off by 4e-3 each; float16 is better.
    assert found == pytest.approx(exact, rel=2e-2 if precision == "bf16" else 5e-3)
    state = model.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    plain = KIND.build()
    plain.load_state_dict(state)
    for run in optimizer.runs:
        assert run.parameter.dtype == torch.float32
    # What is computed with is the rounded copy of what is trained.
    with mz.gathered(model) as inner:
        for name, parameter in inner.named_parameters():
            assert torch.equal(parameter, state[name].to(dtype)), name


@several_ranks
@pytest.mark.parametrize("way", STAGES)
def test_small_updates_are_not_rounded_away(way: dict[str, Any]) -> None:
    """An update of 1e-4 of a parameter is lost in bfloat16; its float32 copy keeps it."""
    model = nn.Linear(8, 8, bias=False)
    nn.init.ones_(model.weight)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-4)
    wrapped, optimizer = mz.zero(model, optimizer, precision="bf16", **way)
    for _ in range(10):
        optimizer.zero_grad()
        wrapped(torch.ones(1, 8)).sum().backward()
        optimizer.step()
    expected = torch.full((8, 8), 1 - 10 * 1e-4)
    torch.testing.assert_close(wrapped.state_dict()["weight"], expected, rtol=1e-6, atol=0)


@several_ranks
@pytest.mark.parametrize("way", STAGES)
def test_overflow_on_one_rank_skips_the_step_on_all(way: dict[str, Any]) -> None:
    world = mz.init()
    model, optimizer = sharded(precision="fp16", **way)
    losses(model, optimizer, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scale = model.loss_scale
    x, y = KIND.batch(PER_RANK, 5)
    value = loss(model, x, y)
    optimizer.zero_grad()
    (value * (1e9 if world.rank == 1 else 1.0)).backward()
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.loss_scale == scale / 2
    losses(model, optimizer, 1)
    assert not torch.equal(model.state_dict()["head.weight"], before["head.weight"])
    assert len(set(world.gather_objects(model.loss_scale))) == 1


@ranks
@pytest.mark.parametrize("held", [True, False], ids=["no_sync", "in the shard"])
@pytest.mark.parametrize("way", STAGES)
def test_accumulating_in_float32(way: dict[str, Any], held: bool) -> None:
    """64 gradients of 1 and one of 256: in bfloat16, 256 + 1 is 256."""
    model = nn.Linear(4, 4, bias=False)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1.0)
    wrapped, optimizer = mz.zero(
        model, optimizer, precision="bf16", accumulate_in_float32=True, **way
    )
    for micro in range(65):
        value = wrapped(torch.full((1, 4), 256.0 if micro == 0 else 1.0)).sum()
        if held and micro < 64:
            with wrapped.no_sync():
                value.backward()
        else:
            value.backward()
    assert torch.equal(wrapped.gradient("weight"), torch.full((4, 4), 320.0))


@ranks
@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("way", STAGES)
def test_state_on_disk_is_the_same(
    way: dict[str, Any], precision: str | None, tmp_path: Path
) -> None:
    here = sharded(precision=precision, **way)
    there = sharded(precision=precision, offload="disk", offload_dir=tmp_path, **way)
    assert losses(*here, 5) == losses(*there, 5)
    states = [each.state_dict() for each in (here[0], there[0])]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert any(tmp_path.rglob("*.bin"))
    del there
    gc.collect()
    assert not any(tmp_path.rglob("*.bin"))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 4)


@ranks
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"stage": 4}, "stage"),
        ({"partition": "columns"}, "partition"),
        ({"precision": "fp8"}, "precision"),
        ({"offload": "tape"}, "offload"),
        ({"shard_group": "rack"}, "shard_group"),
        ({"stage": 0, "precision": "bf16"}, "precision"),
    ],
)
def test_options_that_there_are_not(options: dict[str, Any], named: str) -> None:
    model = linear()
    with pytest.raises(mz.ArgumentError, match=named):
        mz.zero(model, torch.optim.SGD(model.parameters()), **options)


@ranks
def test_optimizers_that_do_not_fit_the_model() -> None:
    model, other = linear(), linear()
    with pytest.raises(mz.ArgumentError, match=r"shape \(4, 4\)"):
        mz.zero(model, torch.optim.SGD(other.parameters()))
    with pytest.raises(mz.ArgumentError, match="optimizer"):
        mz.zero(model, "AdamW")  # type: ignore[arg-type]
    sharded_model, optimizer = mz.zero(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(mz.ArgumentError, match="model"):
        mz.zero(sharded_model, torch.optim.SGD(model.parameters()))
    with pytest.raises(mz.ArgumentError, match="optimizer"):
        mz.zero(linear(), optimizer)


@several_ranks
def test_ranks_that_differ_are_named() -> None:
    world = mz.init()
    model = nn.Linear(4, 5 if world.rank == 1 else 4)
    with pytest.raises(mz.MismatchError, match="rank 1"):
        mz.zero(model, torch.optim.SGD(model.parameters()))
    model = linear()
    with pytest.raises(mz.MismatchError, match="stage"):
        mz.zero(model, torch.optim.SGD(model.parameters()), stage=1 if world.rank == 1 else 2)
