"""Several optimizers for one model: each of other parameters, stepped on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import mpizero_torch as mz

ranks = pytest.mark.parallel([1, 2, 3, 4])

PER_RANK = 2
WAYS = [
    pytest.param({"stage": 0}, id="0"),
    pytest.param({"stage": 1}, id="1"),
    pytest.param({"stage": 2, "segment_mb": 0.002}, id="2"),
    pytest.param({"stage": 3}, id="3"),
    pytest.param({"stage": 3, "share_parameters": False, "segment_mb": 0.002}, id="3 private"),
]


class ByNorm(torch.optim.Optimizer):
    """Steps along the gradient divided by its norm: it needs whole parameters."""

    def __init__(self, parameters: Any, lr: float = 0.02, momentum: float = 0.5) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                assert p.dim() == 2
                if p.grad is not None:
                    state = self.state[p]
                    kept = state.setdefault("kept", torch.zeros_like(p))
                    kept.mul_(group["momentum"]).add_(p.grad / (p.grad.norm() + 1e-6))
                    p.add_(kept, alpha=-group["lr"])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 4))
    return model.double()


def two(model: nn.Module) -> list[Any]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    return [
        ByNorm(matrices),
        torch.optim.AdamW([{"params": rest[:1]}, {"params": rest[1:], "lr": 0.1}], lr=0.01),
    ]


def wrapped(way: dict[str, Any], make: Any = two, **more: Any) -> tuple[Any, Any]:
    inner = net()
    options = {**way, **more}
    if make is two and options["stage"]:
        options.setdefault("partition", ["parameter", "auto"])
    return mz.zero(inner, make(inner), **options)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    count = mz.init().size * PER_RANK
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(count, 4, generator=generator, dtype=torch.float64)


def backward(model: Any, step: int, whole: bool = False) -> None:
    rank = mz.init().rank
    own = slice(None) if whole else slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    x, y = batch(step)
    functional.mse_loss(model(x[own]), y[own]).backward()


def train(model: Any, optimizers: Any, steps: range, whole: bool = False) -> None:
    for step in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(model, step, whole)
        for optimizer in optimizers:
            optimizer.step()


def assert_same(model: Any, alone: nn.Module) -> None:
    state = model.state_dict()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-10, msg=name)


def assert_same_state(ours: Any, theirs: Any) -> None:
    for found, expected in zip(ours, theirs, strict=True):
        found, expected = found.state_dict(), expected.state_dict()
        assert [g["params"] for g in found["param_groups"]] == [
            g["params"] for g in expected["param_groups"]
        ]
        assert found["state"].keys() == expected["state"].keys()
        for number, values in expected["state"].items():
            for key, value in values.items():
                torch.testing.assert_close(found["state"][number][key], value, rtol=1e-8, atol=1e-9)


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_they_train_as_in_one_process(way: dict[str, Any]) -> None:
    model, optimizers = wrapped(way)
    assert isinstance(optimizers, list) and len(optimizers) == 2
    alone = net()
    its = two(alone)
    for each in (optimizers, its):
        schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in each]
        for step in range(3):
            train(alone if each is its else model, each, range(step, step + 1), each is its)
            schedules[0].step()
            if step:
                schedules[1].step()
    assert_same(model, alone)
    assert_same_state(optimizers, its)
    settings = [
        [group["lr"] for o in each for group in o.param_groups] for each in (optimizers, its)
    ]
    assert settings[0] == settings[1]


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_each_is_stepped_and_forgets_on_its_own(way: dict[str, Any]) -> None:
    model, optimizers = wrapped(way)
    alone = net()
    its = two(alone)
    for net_of, each, whole in ((model, optimizers, False), (alone, its, True)):
        first, second = each
        backward(net_of, 0, whole)
        first.step()
        first.zero_grad()  # the second's gradients stay, and the next are added to them
        backward(net_of, 1, whole)
        second.step()
        second.zero_grad()
        first.step()
        with net_of.no_sync() if not whole else torch.enable_grad():
            backward(net_of, 2, whole)
        second.zero_grad()  # of those that have stayed on this rank, too
        backward(net_of, 3, whole)
        first.step()
        second.step()
    assert_same(model, alone)
    assert_same_state(optimizers, its)


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_hold_all(way: dict[str, Any], tmp_path: Path) -> None:
    folder = mz.init().broadcast_object(str(tmp_path / "run"))
    model, optimizers = wrapped(way)
    train(model, optimizers, range(2))
    schedules = [torch.optim.lr_scheduler.StepLR(each, 2) for each in optimizers]
    mz.save(folder, model=model, optimizer=optimizers, scheduler=schedules)
    alone = net()
    its = two(alone)
    train(alone, its, range(2), whole=True)
    plain = net()
    plains = two(plain)
    mz.load(folder, model=plain, optimizer=plains)
    assert_same_state(plains, its)
    for other in ({"stage": 0}, {"stage": 2, "segment_mb": 0.001}):
        again, others = wrapped(other)
        mz.load(folder, model=again, optimizer=others)
        train(again, others, range(2, 3))
        expected = net()
        theirs = two(expected)
        train(expected, theirs, range(3), whole=True)
        assert_same(again, expected)
    with pytest.raises(mz.MpizeroError, match="of class AdamW"):
        mz.load(folder, model=model, optimizer=optimizers[1])
    mz.assert_in_sync(model, optimizers)
    report = mz.memory_report(model, optimizers)
    if way["stage"] and mz.init().size > 1:
        assert report.rank.optimizer_state < 3 * 8 * report.elements / mz.init().size + 4096


@ranks
@pytest.mark.parametrize("way", WAYS[1:])
def test_a_loss_scale_is_asked_once_for_all(way: dict[str, Any]) -> None:
    inner = net().float()
    optimizers = two(inner)
    options = {"precision": "fp16", "partition": ["parameter", "flat"], **way}
    model, both = mz.zero(inner, optimizers, **options)
    x = torch.ones(PER_RANK, 6)
    for factor, made in ((1.0, True), (float("inf"), False), (1.0, True)):
        for each in both:
            each.zero_grad()
        before = model.state_dict()
        (model(x).mean() * factor).backward()
        scale = model.loss_scale
        for each in both:
            each.step()
        assert [each.step_was_skipped for each in both] == [not made] * 2
        assert model.loss_scale == (scale if made else scale / 2)
        after = model.state_dict()
        for name, value in before.items():
            assert torch.equal(value, after[name]) is not made, name
    assert model.scaling.skipped == 1


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_loops_that_end_earlier_and_further_groups(way: dict[str, Any]) -> None:
    def later(model: nn.Module) -> list[Any]:
        matrices = [p for p in model.parameters() if p.dim() == 2]
        rest = [p for p in model.parameters() if p.dim() < 2]
        return [ByNorm(matrices[:2]), torch.optim.SGD(rest, lr=0.1, momentum=0.9)]

    world = mz.init()
    cuts = {"partition": ["parameter", "flat"]} if way["stage"] else {}
    model, optimizers = wrapped(way, later, **cuts)
    alone = net()
    its = later(alone)
    for each, whole in ((optimizers, False), (its, True)):
        net_of = alone if whole else model
        train(net_of, each, range(1), whole)
        last = [p for p in net_of.parameters() if p.dim() == 2][2]
        each[0].add_param_group({"params": [last], "lr": 0.3})
        train(net_of, each, range(1, 3), whole)
    assert_same(model, alone)
    assert_same_state(optimizers, its)
    if way["stage"]:
        with pytest.raises(mz.ArgumentError, match="no group"):
            optimizers[1].add_param_group({"params": [next(iter(model.parameters()))]})
        with pytest.raises(mz.ArgumentError, match="join"), model.join(optimizers[0]):
            pass
    with model.join(optimizers):
        train(model, optimizers, range(3, 4 + (world.rank == 0)))
    train(alone, its, range(3, 4), whole=True)
    x, y = batch(4)  # only rank 0 has a part of this one
    for each in its:
        each.zero_grad()
    functional.mse_loss(alone(x[:PER_RANK]), y[:PER_RANK]).backward()
    for each in its:
        each.step()
    assert_same(model, alone)


@ranks
def test_verify_takes_several() -> None:
    def build() -> Any:
        model = net()
        return model, two(model), lambda model, x, y: functional.mse_loss(model(x), y)

    batches = [batch(step) for step in range(3)]
    assert mz.verify(build, batches, partition=["parameter", "flat"]).ok


@ranks
def test_lists_that_do_not_fit() -> None:
    inner = net()
    every = list(inner.parameters())
    for optimizers, options, named in (
        ([torch.optim.SGD(every), torch.optim.SGD(every[:1])], {}, r"'0\.weight' in common"),
        ([], {}, "empty"),
        ([torch.optim.SGD(every[:1]), "SGD"], {}, "str"),
        ([torch.optim.SGD(every)], {"partition": ["flat", "flat"]}, "one for each"),
    ):
        with pytest.raises(mz.ArgumentError, match=named):
            mz.zero(inner, optimizers, **options)  # type: ignore[arg-type]


@ranks
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("way", WAYS)
def test_muon_and_adamw(way: dict[str, Any]) -> None:
    def make(model: nn.Module) -> list[Any]:
        matrices = [p for p in model.parameters() if p.dim() == 2]
        rest = [p for p in model.parameters() if p.dim() < 2]
        return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)]

    model, optimizers = wrapped(way, make)
    alone = net()
    its = make(alone)
    train(model, optimizers, range(3))
    train(alone, its, range(3), whole=True)
    state = model.state_dict()
    for name, value in alone.state_dict().items():
        # Muon orthogonalises in bfloat16, which makes much of the order of sums.
        tolerance = 3e-4 if value.dim() == 2 else 1e-9
        torch.testing.assert_close(state[name], value, rtol=0, atol=tolerance, msg=name)
