"""Names of a wrapped model's tensors: the plain module's, wherever they are met."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import mpizero_torch as mz
from support.reference import seeded

two = pytest.mark.parallel([1, 2])


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 3)


def batch(seed: int) -> torch.Tensor:
    return seeded(seed, 2, 3).float()


class WithModule(nn.Module):
    """Has a child called "module"."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.norm = linear(), nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.norm(self.module(x))


def build(kind: str, net: nn.Module) -> Any:
    if kind == "ddp":
        return mz.DistributedDataParallel(net)
    return mz.zero(net, torch.optim.SGD(net.parameters(), 0.1), stage=1)[0]


@two
@pytest.mark.parametrize("kind", ["ddp", "zero"])
@pytest.mark.parametrize("make", [linear, WithModule])
def test_names_are_the_plain_modules_everywhere(kind: str, make: Any) -> None:
    plain, model = make(), build(kind, make())
    bigger = nn.ModuleDict({"net": model, "head": linear()})
    plain_bigger = nn.ModuleDict({"net": plain, "head": linear()})
    for ours, theirs in ((model, plain), (bigger, plain_bigger)):
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for walk in ("named_parameters", "named_buffers"):
            found = [name for name, _ in getattr(ours, walk)()]
            assert found == [name for name, _ in getattr(theirs, walk)()]
        assert dict(ours.named_modules()).keys() == dict(theirs.named_modules()).keys()
        for name, parameter in model.named_parameters():
            assert model.get_parameter(name) is parameter
        changed = {n: v + 1 if v.is_floating_point() else v for n, v in ours.state_dict().items()}
        mz.init().barrier()  # ranks of a node may share the memory
        ours.load_state_dict(changed)
        mz.init().barrier()
        for name, value in ours.state_dict().items():
            assert torch.equal(value, changed[name]), name
    assert next(model.children()) is model.module and model in list(bigger.modules())


@two
@pytest.mark.parametrize("make", [linear, WithModule])
def test_what_torchs_wrapper_saved_is_loaded(make: Any) -> None:
    model = mz.DistributedDataParallel(make())
    bigger = nn.ModuleDict({"net": model})
    wanted = {name: torch.full_like(v, 7) for name, v in model.state_dict().items()}
    for target, prefix in ((model, "module."), (bigger, "net.module.")):
        for tensor in model.state_dict().values():
            tensor.zero_()
        target.load_state_dict({prefix + name: value for name, value in wanted.items()})
        assert all(torch.equal(v, wanted[n]) for n, v in model.state_dict().items())
    del wanted[next(iter(wanted))]
    found = bigger.load_state_dict(
        {**{f"net.{n}": v for n, v in wanted.items()}, "net.more": torch.ones(1)}, strict=False
    )
    missing = [n for n in model.state_dict() if n not in wanted]
    assert found.missing_keys == [f"net.{n}" for n in missing]
    assert found.unexpected_keys == ["net.more"]


@two
def test_conversions_reach_each_tensor_once() -> None:
    model = mz.DistributedDataParallel(nn.BatchNorm1d(3))
    calls: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor)
        return tensor

    model._apply(note)
    assert len(calls) == len(list(model.state_dict()))
    assert model.double().weight.dtype is model.module.weight.dtype is torch.float64
    assert not model.eval().module.training


@two
def test_functional_calls_and_torchs_checkpoints_go_by_these_names() -> None:
    net, x = linear(), batch(3)
    model = mz.DistributedDataParallel(net)
    zeros = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    assert not torch.func.functional_call(model, zeros, (x,)).any()
    assert model(x).any()
    optimizer = torch.optim.AdamW(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    assert set(weights) == set(state["state"]) == {"weight", "bias"}
    alone = linear(seed=5)
    other = torch.optim.AdamW(alone.parameters())
    set_state_dict(alone, other, model_state_dict=weights, optim_state_dict=state)
    assert torch.equal(alone.weight, net.weight)
    moment = other.state[alone.weight]["exp_avg"]
    assert torch.equal(moment, optimizer.state[net.weight]["exp_avg"])


@two
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's, of a part's input
@pytest.mark.parametrize("compiled", ["the model", "a part", "the wrapper"])
def test_compiled_models_have_plain_names_on_disk(tmp_path: Path, compiled: str) -> None:
    def make(compile_it: bool) -> tuple[Any, Any]:
        net: Any = nn.Sequential(linear(), linear())
        optimizer = torch.optim.AdamW(net.parameters())
        if compile_it and compiled == "a part":
            net[1] = torch.compile(net[1], backend="eager")
        if compile_it and compiled == "the model":
            net = torch.compile(net, backend="eager")
        return mz.zero(net, optimizer, stage=1)

    def finish(model: Any, compile_it: bool) -> Any:
        last = compile_it and compiled == "the wrapper"
        return torch.compile(model, backend="eager") if last else model

    folder = mz.init().broadcast_object(str(tmp_path))
    for first in (True, False):  # saved compiled, loaded plain; and the other way round
        model, optimizer = make(first)
        assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
        assert [n for n, _ in model.named_parameters()] == list(model.state_dict())
        model(batch(mz.init().rank)).sum().backward()
        optimizer.step()
        mz.save(f"{folder}/{first}", model=finish(model, first), optimizer=optimizer)
        other, its = make(not first)
        other = finish(other, not first)
        mz.load(f"{folder}/{first}", model=other, optimizer=its)
        mz.assert_in_sync(other)
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, theirs)
