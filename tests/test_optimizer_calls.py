"""The inner optimizer is called once a step, wherever its state is; and what cannot be sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import mpizero_torch as mz

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])

PER_RANK = 2
WAYS = [
    pytest.param({"stage": 0}, id="0"),
    pytest.param({"stage": 1}, id="1"),
    pytest.param({"stage": 2}, id="2"),
    pytest.param({"stage": 3}, id="3"),
    pytest.param({"stage": 3, "share_parameters": False}, id="3 private"),
]
KINDS = ["float32", "bf16", "fp16", "disk"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)
    )


def sharded(make: Any, way: dict[str, Any], kind: str, folder: Path, **more: Any) -> Any:
    inner = net()
    options: dict[str, Any] = {**way, **more}
    if options["stage"]:
        options |= {"partition": "flat", "segment_mb": 0.002, **more}
        if kind == "disk":
            options |= {"offload": "disk", "offload_dir": folder}
        elif kind == "fp16":  # with a scale at which nothing overflows: no step is left out
            options["precision"] = mz.MixedPrecision("fp16", initial_scale=2.0**8)
        elif kind != "float32":
            options["precision"] = kind
    plain = make(inner.parameters())
    return (*mz.zero(inner, plain, **options), plain)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    count = mz.init().size * PER_RANK
    return torch.randn(count, 6, generator=generator), torch.randn(count, 4, generator=generator)


def train(model: Any, optimizer: Any, steps: int, whole: bool = False, first: int = 0) -> None:
    rank = mz.init().rank
    own = slice(None) if whole else slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    for step in range(first, first + steps):
        x, y = batch(step)
        optimizer.zero_grad()
        functional.mse_loss(model(x[own]), y[own]).backward()
        optimizer.step()


def assert_same(model: Any, alone: nn.Module, kind: str = "float32") -> None:
    """Beside the way that training has gone. (The sign of a tiny gradient is rounding.)"""
    state, start = model.state_dict(), net().state_dict()
    bound = {"bf16": 0.1, "fp16": 0.02}.get(kind, 1e-4)
    for name, value in alone.state_dict().items():
        assert float((state[name] - value).norm()) <= bound * float((value - start[name]).norm())


class Averaging(torch.optim.Optimizer):
    """SGD, and the average of where it has been: what each counts is counted in the group."""

    def __init__(self, parameters: Any, lr: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr, "k": 0, "total": 0.0})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        for group in self.param_groups:
            group["k"] += 1
            group["total"] += group["lr"]
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.detach().clone())
                    z.sub_(p.grad, alpha=group["lr"])
                    p.lerp_(z, group["lr"] / group["total"])


@ranks
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS[1:])
def test_it_is_called_once_a_step(way: dict[str, Any], kind: str, tmp_path: Path) -> None:
    model, optimizer, plain = sharded(Averaging, way, kind, tmp_path)
    alone = net()
    its = Averaging(alone.parameters())
    calls = []
    for each in (plain, optimizer):
        each.register_step_pre_hook(lambda *_: calls.append("before"))
        each.register_step_post_hook(lambda *_: calls.append("after"))
    train(alone, its, 4, whole=True)
    train(model, optimizer, 3)
    files = len(list(tmp_path.rglob("*.bin")))
    train(model, optimizer, 1, first=3)
    assert plain.calls == plain.param_groups[0]["k"] == 4
    assert len(calls) == 16 and calls.count("before") == 8
    assert len(list(tmp_path.rglob("*.bin"))) == files  # nothing is made anew at each step
    assert_same(model, alone, kind)


@ranks
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_state_on_disk_is_never_in_memory(make: Any, tmp_path: Path) -> None:
    def build(parameters: Any) -> Any:
        return make(parameters, lr=0.01, **({"momentum": 0.9} if make is torch.optim.SGD else {}))

    model, optimizer, plain = sharded(build, {"stage": 2}, "disk", tmp_path)
    train(model, optimizer, 2)
    state = [value for values in plain.state.values() for value in values.values()]
    state = [value for value in state if isinstance(value, torch.Tensor) and value.numel() > 1]
    assert state and sum(value.nbytes for value in state) <= model.aside.nbytes
    assert all(model.aside.keep(value) is value for value in state)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert all(
        model.aside.keep(value) is value
        for values in plain.state.values() for value in values.values()
    )  # fmt: skip


@ranks
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree"])
@pytest.mark.parametrize("kind", KINDS)
def test_schedule_free(name: str, kind: str, tmp_path: Path) -> None:
    package = pytest.importorskip("schedulefree")

    def make(parameters: Any) -> Any:
        return getattr(package, name)(parameters, lr=0.02, warmup_steps=3)

    for way in WAYS if kind == "float32" else WAYS[2::2]:
        (options,) = way.values
        partition = {"partition": "auto"} if options["stage"] else {}  # it is known
        model, optimizer, _ = sharded(make, options, kind, tmp_path, **partition)
        alone = net()
        its = make(alone.parameters())
        for each, whole in ((optimizer, False), (its, True)):
            each.train()
            train(alone if whole else model, each, 4, whole)
            each.eval()
        assert optimizer.param_groups[0]["k"] == 4
        assert_same(model, alone, kind)  # the averages
        with mz.gathered(model) as inner:
            found = {key: value.clone() for key, value in inner.state_dict().items()}
        everyones = mz.init().gather_objects({key: v.float().sum() for key, v in found.items()})
        assert all(each == everyones[0] for each in everyones)
        optimizer.train()
        train(model, optimizer, 1)
        its.train()
        train(alone, its, 1, whole=True)
        assert_same(model, alone, kind)


@ranks
def test_optimizers_without_modes_have_none(tmp_path: Path) -> None:
    _, optimizer, _ = sharded(torch.optim.SGD, {"stage": 2}, "float32", tmp_path)
    assert not hasattr(optimizer, "train") and not hasattr(optimizer, "eval")


@ranks
def test_step_sizes_from_all_parameters_cannot_be_sharded(tmp_path: Path) -> None:
    package = pytest.importorskip("prodigyopt")

    def make() -> Any:
        return sharded(package.Prodigy, {"stage": 2}, "bf16", tmp_path)

    if mz.init().size > 1:
        with pytest.raises(mz.ArgumentError, match="all parameters at once"):
            make()
        return
    model, optimizer, plain = make()
    alone = net()
    its = package.Prodigy(alone.parameters())
    train(model, optimizer, 6)
    train(alone, its, 6, whole=True)
    assert [each.param_groups[0]["k"] for each in (optimizer, plain, its)] == [6, 6, 6]
    assert plain.param_groups[0]["d"] == pytest.approx(its.param_groups[0]["d"], rel=0.1)


class Blocks(torch.optim.Optimizer):
    """SGD that keeps a number for every 16 elements, as 8-bit optimizers do; or one of a part."""

    def __init__(self, parameters: Any, lr: float = 0.05, per: int = 16) -> None:
        super().__init__(parameters, {"lr": lr, "per": per})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    per = group["per"] or p.numel()
                    blocks = functional.pad(p.grad.flatten(), (0, -p.numel() % per)).view(-1, per)
                    scale = blocks.abs().amax(1)
                    self.state[p]["scale"] = scale if group["per"] else scale[0]
                    p.sub_(p.grad, alpha=group["lr"])


@several_ranks
@pytest.mark.parametrize("per", [16, 0], ids=["blocks", "one number"])
@pytest.mark.parametrize("way", WAYS[1:])
def test_state_by_blocks_wants_whole_parameters(
    way: dict[str, Any], per: int, tmp_path: Path
) -> None:
    def make(parameters: Any) -> Any:
        return Blocks(parameters, per=per)

    alone = net()
    its = make(alone.parameters())
    train(alone, its, 2, whole=True)
    saved = its.state_dict()
    model, optimizer, _ = sharded(make, way, "float32", tmp_path)
    train(model, optimizer, 2)
    assert_same(model, alone)
    with pytest.raises(mz.ArgumentError, match="partition='parameter'"):
        optimizer.state_dict()
    with pytest.raises(mz.MpizeroError, match="partition='parameter'"):
        mz.save(tmp_path / "run", optimizer=optimizer)
    if per:
        with pytest.raises(mz.ArgumentError, match="partition='parameter'"):
            optimizer.load_state_dict(saved)
    model, optimizer, _ = sharded(make, way, "float32", tmp_path, partition="parameter")
    train(model, optimizer, 2)
    found = optimizer.state_dict()
    for number, values in saved["state"].items():
        torch.testing.assert_close(found["state"][number]["scale"], values["scale"])
    optimizer.load_state_dict(found)
    train(model, optimizer, 1)
