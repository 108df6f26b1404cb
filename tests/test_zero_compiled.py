"""torch.compile with sharded models: before and after mz.zero, all of a model or its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import mpizero_torch as mz

ranks = pytest.mark.parallel([2])
# torch's own, where it describes what crosses from one graph to the next.
pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

WAYS = [
    pytest.param({"stage": 0}, id="0"),
    pytest.param({"stage": 1, "segment_mb": 0.002}, id="1"),
    pytest.param({"stage": 2, "segment_mb": 0.002}, id="2"),
    pytest.param({"stage": 3, "segment_mb": 0.002}, id="3"),
]
PRIVATE = {"stage": 3, "share_parameters": False, "segment_mb": 0.002}
PER_RANK = 2


class Broken(nn.Module):
    """A part after which torch.compile begins a new graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return torch.tanh(x)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), Broken(), nn.Linear(32, 8)).double()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def before(inner: nn.Module, way: dict[str, Any]) -> tuple[Any, Any, Any]:
    compiled: Any = torch.compile(inner, backend="aot_eager")
    model, optimizer = mz.zero(compiled, sgd(inner), **way)
    return model, model, optimizer


def wrapped(inner: nn.Module, way: dict[str, Any]) -> tuple[Any, Any, Any]:
    model, optimizer = mz.zero(inner, sgd(inner), **way)
    return model, torch.compile(model, backend="aot_eager"), optimizer


def in_place(inner: nn.Module, way: dict[str, Any]) -> tuple[Any, Any, Any]:
    model, optimizer = mz.zero(inner, sgd(inner), **way)
    model.compile(backend="aot_eager")
    return model, model, optimizer


def parts_before(inner: nn.Module, way: dict[str, Any]) -> tuple[Any, Any, Any]:
    for part in inner.children():
        part.compile(backend="aot_eager")
    model, optimizer = mz.zero(inner, sgd(inner), **way)
    return model, model, optimizer


def parts_after(inner: nn.Module, way: dict[str, Any]) -> tuple[Any, Any, Any]:
    model, optimizer = mz.zero(inner, sgd(inner), **way)
    for part in inner.children():
        part.compile(backend="aot_eager")
    return model, model, optimizer


HOW: list[Callable[..., tuple[Any, Any, Any]]] = [
    before, wrapped, in_place, parts_before, parts_after
]  # fmt: skip


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@ranks
@pytest.mark.parametrize("how", HOW, ids=lambda how: how.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_the_ordinary_loop(way: dict[str, Any], how: Any) -> None:
    """Forward, zero_grad, backward, step; an evaluation of another size wherever one may be."""
    world = mz.init()
    alone = net()
    its = sgd(alone)
    model, compiled, optimizer = how(net(), way)

    def evaluate(step: int) -> None:
        looked_at = torch.full((step + 3, 16), 0.1 * step, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(compiled(looked_at), alone(looked_at), rtol=1e-9, atol=1e-12)

    for step in range(3):
        drawn = torch.Generator().manual_seed(step)
        x = torch.randn(world.size * PER_RANK, 16, generator=drawn).double()
        y = torch.randn(world.size * PER_RANK, 8, generator=drawn).double()
        own = slice(world.rank * PER_RANK, (world.rank + 1) * PER_RANK)
        losses = functional.mse_loss(alone(x), y), functional.mse_loss(compiled(x[own]), y[own])
        for each in (its, optimizer):
            each.zero_grad()
        evaluate(step)
        for loss in losses:
            loss.backward()
        evaluate(step)
        for each in (its, optimizer):
            each.step()
        evaluate(step)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-9, atol=1e-11)


@ranks
@pytest.mark.parametrize("how", HOW, ids=lambda how: how.__name__)
def test_parameters_that_come_and_go_are_not_compiled(how: Any) -> None:
    with pytest.raises(mz.ArgumentError, match=r"compile.*stage 3 without shared parameters"):
        how(net(), PRIVATE)[1](torch.ones(PER_RANK, 16).double())
