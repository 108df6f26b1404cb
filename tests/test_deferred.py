"""Models built without memory have the values that ordinary building gives them, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import mpizero_torch as mz
from support.launch import mpirun

ranks = pytest.mark.parallel([1, 2, 3, 4])

STAGES = [
    pytest.param({"stage": 0}, id="0"),
    pytest.param({"stage": 1}, id="1"),
    pytest.param({"stage": 2}, id="2"),
    pytest.param({"stage": 3}, id="3"),
    pytest.param({"stage": 3, "share_parameters": False}, id="3 private"),
]


class Written(nn.Module):
    """Writes to its parameters after its parts have initialised themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(17, 8, padding_idx=3), nn.Linear(8, 8)
        self.last = nn.Linear(8, 17)
        self.apply(self.initialise)
        nn.init.zeros_(self.body.weight)
        self.last.bias.data.fill_(-4)
        self.last.weight = self.embed.weight
        self.scale = nn.Parameter(torch.randn(5) * 0.1 + self.embed.weight.detach()[2, 3])
        self.register_buffer("mask", torch.tril(torch.ones(4, 4)))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", self.embed.weight.detach().mean(0), persistent=False)

    def initialise(self, part: nn.Module) -> None:
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)


class Asking(nn.Module):
    """Looks at values while it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [each.item() for each in torch.linspace(0, 0.3, 4)]
        self.table = torch.tensor([torch.rand(()), torch.ones(()) * 2])
        first = nn.Linear(3, 3)
        if first.weight.sum() > 0:
            nn.init.ones_(first.bias)
        self.parts = nn.ModuleList([first, copy.deepcopy(first), nn.BatchNorm1d(3)])
        self.parts.append(copy.deepcopy(self.parts[2]))
        self.narrow = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(30, 9), std=0.5, a=-0.4, b=0.4)
        )
        self.square = nn.Parameter(nn.init.orthogonal_(torch.empty(6, 6)))
        self.holes = nn.Parameter(nn.init.sparse_(torch.empty(9, 5), 0.4))
        self.own = nn.Parameter(torch.empty(4))
        self.own.data.copy_(torch.from_numpy(np.arange(4.0)))
        self.other = nn.Parameter(torch.ones(3))
        self.other.detach().numpy()[1] = 7
        generator = torch.Generator().manual_seed(5)
        self.drawn = nn.Parameter(torch.randn(40, generator=generator))
        self.chosen = nn.Parameter(torch.rand(7)[torch.randperm(7)][torch.rand(7) > 0.3])


class Lazy(nn.Module):
    """Knows its shapes once it has seen an input."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d())
        self.parts(torch.ones(2, 5))


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "written": Written,
    "asking": Asking,
    "lazy": Lazy,
    "lstm": lambda: nn.LSTM(3, 4, 2),
    "gru": lambda: nn.GRU(3, 4),
    "transformer": lambda: nn.Transformer(8, 2, 1, 1, 8, batch_first=True),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 5)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 5)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(5, 5)),
    "converted": lambda: nn.Linear(4, 5).double().requires_grad_(True),
}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@ranks
@pytest.mark.parametrize("way", STAGES)
@pytest.mark.parametrize("kind", BUILDERS)
def test_values_are_those_of_ordinary_building(kind: str, way: dict[str, Any]) -> None:
    build = BUILDERS[kind]
    torch.manual_seed(3)
    plain, drawn = build(), [torch.rand(2), torch.rand(2)]
    torch.manual_seed(3)
    with mz.deferred():
        built = build()
    assert torch.equal(torch.rand(2), drawn[0])
    model, _ = mz.zero(built, sgd(built), **way)
    assert torch.equal(torch.rand(2), drawn[1])
    found, wanted = model.state_dict(), plain.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    if isinstance(plain, Written):
        assert isinstance(built, Written) and torch.equal(built.mean, plain.mean)
    if isinstance(plain, Asking):
        assert isinstance(built, Asking)
        assert built.rates == plain.rates and torch.equal(built.table, plain.table)


@ranks
@pytest.mark.parametrize("way", STAGES)
def test_ranks_start_as_rank_0_and_train(way: dict[str, Any]) -> None:
    world = mz.init()
    torch.manual_seed(0)
    alone = Written()
    its = sgd(alone)
    torch.manual_seed(world.rank)
    with mz.deferred():
        built = Written()
    model, optimizer = mz.zero(built, sgd(built), segment_mb=0.0002, **way)
    for inner, each in ((alone, its), (model, optimizer)):
        parts = inner if inner is alone else model.module
        forward = nn.Sequential(parts.embed, parts.body, parts.last)
        if inner is not alone:
            parts.forward = forward.forward
        (inner if inner is not alone else forward)(torch.arange(17)).square().mean().backward()
        each.step()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


class Unwritten(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6, 2))
        self.register_buffer("table", torch.ones(3))
        if how == "in part":
            nn.init.ones_(self.weight[:4])
        if how == "by arithmetic":
            self.weight = nn.Parameter(torch.empty(6, 2) * 2)
        if how == "in a buffer":
            nn.init.ones_(self.weight)
            self.register_buffer("table", torch.empty(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight * self.table


@ranks
@pytest.mark.parametrize("way", STAGES)
@pytest.mark.parametrize("how", ["not at all", "in part", "by arithmetic", "in a buffer"])
def test_what_nobody_has_written_is_refused(how: str, way: dict[str, Any]) -> None:
    name = "table" if how == "in a buffer" else "weight"
    with mz.deferred():
        model = Unwritten(how)
    with pytest.raises(mz.ArgumentError, match=f"'{name}'.*nobody has written"):
        mz.zero(model, sgd(model), **way)
    if way["stage"] == 0:
        return

    def elsewhere(part: nn.Module) -> None:
        nn.init.constant_(part.bias if isinstance(part, nn.Linear) else part.weight[:3], 2.0)

    with mz.deferred():
        model = Unwritten(how)
    with pytest.raises(mz.ArgumentError, match=f"'{name}'.*nobody has written"):
        mz.zero(model, sgd(model), initialise=elsewhere, **way)


@ranks
@pytest.mark.parametrize("way", STAGES[1:])
def test_initialise_begins_with_what_constructors_wrote(way: dict[str, Any]) -> None:
    def initialise(part: nn.Module) -> None:
        if isinstance(part, Unwritten):
            nn.init.constant_(part.weight[4:], 3.0)
        elif isinstance(part, nn.Linear):
            nn.init.constant_(part.bias, 5.0)

    torch.manual_seed(0)
    weight = nn.Linear(2, 2).weight.detach()
    torch.manual_seed(0)
    with mz.deferred():
        model = nn.Sequential(nn.Linear(2, 2), Unwritten("in part"))
    found = mz.zero(model, sgd(model), initialise=initialise, **way)[0].state_dict()
    assert torch.equal(found["0.weight"], weight)
    assert torch.equal(found["0.bias"], torch.full((2,), 5.0))
    assert found["1.weight"].tolist() == [[1, 1]] * 4 + [[3, 3]] * 2


@pytest.mark.parallel([1, 2])
def test_a_model_without_values_says_so() -> None:
    with mz.deferred():
        model = nn.Linear(3, 2)
    assert model.weight.shape == (2, 3) and isinstance(model.weight, nn.Parameter)
    writes: list[Callable[[], Any]] = [
        lambda: nn.init.normal_(model.weight), lambda: model.weight.data.fill_(1),
        lambda: model(torch.ones(3)), lambda: copy.deepcopy(model), lambda: model.double(),
        lambda: model.load_state_dict(nn.Linear(3, 2).state_dict()), lambda: model.weight.tolist(),
    ]  # fmt: skip
    for write in writes:
        with pytest.raises((mz.MpizeroError, RuntimeError), match=r"mz\.deferred\(\)"):
            write()


@pytest.mark.parallel([1, 2])
def test_modules_without_shapes_are_named() -> None:
    for stage in (0, 1, 3):
        with mz.deferred():
            model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
        with pytest.raises(mz.ArgumentError, match="'1', a LazyLinear"):
            mz.zero(model, torch.optim.SGD([*model[0].parameters()], 0.1), stage=stage)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("way", STAGES[1:])
def test_the_meta_device_takes_reset_parameters(way: dict[str, Any]) -> None:
    with torch.device("meta"):
        model: nn.Module = nn.Sequential(nn.Linear(3, 40), nn.BatchNorm1d(40))
    found = mz.zero(model, sgd(model), **way)[0].state_dict()
    assert found["0.weight"].std() > 0.1 and torch.equal(found["1.weight"], torch.ones(40))
    with torch.device("meta"):
        model = Unwritten("in a buffer")
        recurrent = nn.LSTM(3, 3)
    with pytest.raises(mz.ArgumentError, match=r"'weight'.*nobody has written"):
        mz.zero(model, sgd(model), initialise=lambda part: None, **way)
    with pytest.raises(mz.ArgumentError, match=r"LSTM.*mz\.deferred\(\)"):
        mz.zero(recurrent, sgd(recurrent), **way)


PROGRAM = """
import resource, sys
import torch
from torch import nn
import mpizero_torch as mz

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(1000, 1000, bias=False) for _ in range(20))
        self.apply(lambda each: isinstance(each, nn.Linear) and nn.init.normal_(each.weight))
        nn.init.trunc_normal_(self.parts[3].weight)

    def forward(self, x):
        return x

world = mz.init()
with mz.deferred():  # so that all is imported that torch wants
    first = nn.Linear(1000, 1000)
    nn.init.trunc_normal_(first.weight)
mz.zero(first, torch.optim.SGD(first.parameters(), lr=0.1), stage=3, share_parameters=False)
before = peak()
with mz.deferred():
    model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer = mz.zero(model, optimizer, stage=3, share_parameters=False)
own = 20 * 4 * 1e6 / 2**20 / world.size
print("MEMORY", peak() - before - 2 * own)
"""


def test_memory_is_that_of_a_unit_beside_what_a_rank_keeps() -> None:
    """A rank of two keeps 38 MiB, and gradients of as much; the whole model is 76 MiB."""
    found = mpirun(2, PROGRAM, timeout=120)
    assert found.returncode == 0, found.stdout
    beside = [float(line.split()[-1]) for line in found.stdout.splitlines() if "MEMORY" in line]
    assert len(beside) == 2 and max(beside) < 50, beside
