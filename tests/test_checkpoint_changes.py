"""Checkpoints loaded into what has changed since: names, groups, heads, optimizers, wrappers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mpizero_torch as mz
from support.logged import Logged

ranks = pytest.mark.parallel([1, 2, 3, 4])

WAYS = [
    pytest.param({"stage": 0}, id="0"),
    pytest.param({"stage": 1}, id="1"),
    pytest.param({"stage": 2, "precision": "bf16"}, id="2 bf16"),
    pytest.param({"stage": 3}, id="3"),
    pytest.param({"stage": 3, "share_parameters": False, "segment_mb": 0.0002}, id="3 private"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same on all ranks: rank 0's."""
    return Path(mz.init().broadcast_object(str(tmp_path)))


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.register_buffer("seen", torch.rand(2))
        self.head = nn.Linear(6, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(torch.tanh(self.norm(self.body(x))))
        return found


class Parent(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"net": inner})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.parts["net"](x)
        return found


def adamw(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def made(seed: int, way: dict[str, Any], classes: int = 3) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model = Net(classes)
    return mz.zero(model, adamw(model), **way)  # type: ignore[no-any-return]


def train(model: Any, optimizer: Any, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.rand(5, 4)).square().mean().backward()
        optimizer.step()


def same(found: Any, wanted: Any) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], wanted[name]) for name in wanted
    )


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_groups_that_were_added_are_saved(folder: Path, way: dict[str, Any]) -> None:
    def unfrozen() -> tuple[Any, Any]:
        torch.manual_seed(0)
        net = Net()
        first = [*net.norm.parameters(), *net.head.parameters()]
        model, optimizer = mz.zero(net, torch.optim.AdamW(first, lr=0.1), **way)
        if way["stage"] == 0:
            return model, optimizer
        train(model, optimizer)
        model.zero_grad()  # those that were in no group have their own rank's
        optimizer.add_param_group({"params": list(net.body.parameters()), "lr": 0.01})
        return model, optimizer

    model, optimizer = unfrozen()
    train(model, optimizer)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    mz.save(folder / "c", model=model, optimizer=optimizer)
    train(model, optimizer, 1)
    other, its = unfrozen()
    mz.load(folder / "c", model=other, optimizer=its)
    assert same(other.state_dict(), wanted)
    train(other, its, 1)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0)


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_other_names_and_another_head(folder: Path, way: dict[str, Any], logged: Logged) -> None:
    model, optimizer = made(0, way)
    train(model, optimizer)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    state = optimizer.state_dict()["state"]
    mz.save(folder / "c", model=model, optimizer=optimizer)

    torch.manual_seed(1)
    outer = Parent(Net(classes=5))
    theirs, its = mz.zero(outer, adamw(outer), **way)
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    with pytest.raises(mz.ArgumentError, match="not one"):
        mz.load(folder / "c", model=theirs, strict=False)

    def inside(name: str) -> str | None:
        return None if name.startswith("head.") else f"parts.net.{name}"

    with pytest.raises(mz.ArgumentError, match=r"rename.*|strict=False"):
        mz.load(folder / "c", model=theirs, optimizer=its, rename=inside)
    with pytest.raises(mz.ArgumentError, match="of shape"):
        mz.load(folder / "c", model=theirs, rename=lambda name: f"parts.net.{name}")
    with logged.at_level(logging.WARNING, "mpizero"):
        mz.load(folder / "c", model=theirs, optimizer=its, rename=inside, strict=False)
    if mz.init().rank == 0:
        assert "parts.net.head.weight" in "".join(logged.messages)
    for name, value in theirs.state_dict().items():
        inner = name.removeprefix("parts.net.")
        assert torch.equal(value, before[name] if "head" in name else wanted[inner]), name
    found = its.state_dict()["state"]
    assert 4 not in found and 5 not in found
    for number in range(4):
        assert torch.equal(found[number]["exp_avg"], state[number]["exp_avg"])
    train(theirs, its, 1)


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_other_groups_keep_their_settings(folder: Path, way: dict[str, Any]) -> None:
    model, optimizer = made(0, way)
    train(model, optimizer)
    state = optimizer.state_dict()["state"]
    mz.save(folder / "c", model=model, optimizer=optimizer)
    torch.manual_seed(0)
    net = Net()
    groups = [
        {"params": [p for p in net.parameters() if p.dim() > 1], "weight_decay": 0.5},
        {"params": [p for p in net.parameters() if p.dim() < 2], "lr": 0.3},
    ]
    other, its = mz.zero(net, torch.optim.AdamW(groups, lr=0.2), **way)
    with pytest.raises(mz.ArgumentError, match="strict=False"):
        mz.load(folder / "c", model=other, optimizer=its)
    mz.load(folder / "c", model=other, optimizer=its, strict=False)
    assert [group["lr"] for group in its.param_groups] == [0.2, 0.3]
    assert its.param_groups[0]["weight_decay"] == 0.5
    numbers = [0, 4, 1, 2, 3, 5]  # of weights, then of the rest, among the saved ones
    found = its.state_dict()["state"]
    for at, number in enumerate(numbers):
        assert torch.equal(found[at]["exp_avg_sq"], state[number]["exp_avg_sq"])


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_another_optimizer_is_remarked(folder: Path, way: dict[str, Any]) -> None:
    model, optimizer = made(0, way)
    train(model, optimizer)
    mz.save(folder / "c", model=model, optimizer=optimizer)
    net = Net()
    other, its = mz.zero(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), **way)
    with pytest.raises(mz.ArgumentError, match=r"SGD.*AdamW"):
        mz.load(folder / "c", model=other, optimizer=its)


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_a_part_of_a_bigger_module(folder: Path, way: dict[str, Any]) -> None:
    model, optimizer = made(0, way)
    train(model, optimizer)
    parent = Parent(model)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    mz.save(folder / "c", model=parent)
    state = {name: value.clone() for name, value in parent.state_dict().items()}
    assert same({name.removeprefix("parts.net."): value for name, value in state.items()}, wanted)
    assert parent.state_dict(keep_vars=True).keys() == state.keys()

    def other() -> tuple[Any, Any, Any]:
        inner, its = made(1, way)
        return Parent(inner), inner, its

    loaded, inner, its = other()
    mz.load(folder / "c", model=loaded)
    assert same(inner.state_dict(), wanted)
    train(inner, its)  # an update begins with what was loaded
    assert not same(inner.state_dict(), wanted)

    by_dict, inner, its = other()
    result = by_dict.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    for name, value in inner.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    its.step()
    del state["parts.net.head.bias"]
    state["parts.net.other"] = torch.ones(1)
    result = by_dict.load_state_dict(state, strict=False)
    assert result.missing_keys == ["parts.net.head.bias"]
    assert result.unexpected_keys == ["parts.net.other"]
    with pytest.raises(RuntimeError, match="size mismatch"):
        by_dict.load_state_dict({**state, "parts.net.head.weight": torch.ones(1)}, strict=False)
    train(inner, its)
