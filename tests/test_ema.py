"""Moving averages that are spread over the ranks are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mpizero_torch as mz

ranks = pytest.mark.parallel([1, 2, 3, 4])

WAYS = [
    pytest.param({"stage": 0}, id="0"),
    pytest.param({"stage": 1}, id="1"),
    pytest.param({"stage": 2, "share_parameters": False}, id="2 private"),
    pytest.param({"stage": 3}, id="3"),
    pytest.param({"stage": 3, "share_parameters": False, "segment_mb": 0.0002}, id="3 private"),
    pytest.param({"stage": 2, "precision": "bf16"}, id="2 bf16"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same on all ranks: rank 0's."""
    return Path(mz.init().broadcast_object(str(tmp_path)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3))


def made(way: dict[str, Any]) -> tuple[Any, Any]:
    model = net()
    return mz.zero(model, torch.optim.AdamW(model.parameters(), lr=0.1), **way)  # type: ignore[no-any-return]


def step(model: Any, optimizer: Any, number: int) -> None:
    world = mz.init()
    torch.manual_seed(100 * number + world.rank)
    optimizer.zero_grad()
    model(torch.rand(5, 4)).square().mean().backward()
    optimizer.step()


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_the_average_is_that_of_the_trained_values(folder: Path, way: dict[str, Any]) -> None:
    model, optimizer = made(way)
    ema = mz.EMA(model, decay=0.7)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(3):
        step(model, optimizer, number)
        ema.update()
        for name, value in model.state_dict().items():
            wanted[name].mul_(0.7).add_(value, alpha=0.3)
    found = ema.state_dict()
    assert found["updates"] == 3 and found["average"].keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found["average"][name], value), name

    trained = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(6, 4)
    plain = net()
    plain.load_state_dict(wanted)
    with torch.no_grad():
        before = model(x)
        with ema.average():
            for name, value in model.state_dict().items():
                assert torch.equal(value, wanted[name]), name
            tolerance = 0.03 if "precision" in way else 1e-6
            torch.testing.assert_close(model(x), plain(x), rtol=tolerance, atol=tolerance)
            with pytest.raises(mz.MpizeroError, match="inside average"):
                ema.update()
        assert torch.equal(model(x), before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name]), name

    mz.save(folder / "c", model=model, optimizer=optimizer, ema=ema)
    for name, value in load_file(folder / "c" / "ema.safetensors").items():
        assert torch.equal(value, wanted[name]), name
    step(model, optimizer, 3)
    ema.update()
    for other_way in (way, {"stage": 0}):
        other, its = made(other_way)
        theirs = mz.EMA(other, decay=0.1)
        mz.load(folder / "c", model=other, optimizer=its, ema=theirs)
        assert theirs.decay == 0.7 and theirs.updates == 3
        for name, value in theirs.state_dict()["average"].items():
            assert torch.equal(value, wanted[name]), name
    again = mz.EMA(model, decay=0.5)
    again.load_state_dict(found)
    assert torch.equal(again.state_dict()["average"]["0.weight"], wanted["0.weight"])


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_a_rank_keeps_its_part(way: dict[str, Any]) -> None:
    world = mz.init()
    model, _ = made(way)
    ema = mz.EMA(model)
    own = sum(each.average.numel() for each in ema.kept())
    counts = world.gather_objects(own)
    assert sum(counts) == sum(each.numel() for each in net().parameters())
    assert max(counts) <= sum(counts) / world.size + 16 * 4


@pytest.mark.parallel([1, 2])
def test_groups_that_are_added_are_followed() -> None:
    model = net()
    first, last = list(model[0].parameters()), list(model[2].parameters())
    optimizer: Any = torch.optim.SGD(last, lr=0.1)
    sharded, optimizer = mz.zero(model, optimizer, stage=2)
    ema = mz.EMA(sharded, decay=0.5)
    step(sharded, optimizer, 0)
    ema.update()
    sharded.zero_grad()
    optimizer.add_param_group({"params": first})
    wanted = {name: value.clone() for name, value in sharded.state_dict().items()}
    ema.update()
    step(sharded, optimizer, 1)
    ema.update()
    found = ema.state_dict()["average"]
    for name in ("0.weight", "0.bias"):
        wanted[name].mul_(0.5).add_(sharded.state_dict()[name], alpha=0.5)
        assert torch.equal(found[name], wanted[name])


def test_what_is_refused() -> None:
    with pytest.raises(mz.ArgumentError, match="decay"):
        mz.EMA(net(), decay=1.5)
