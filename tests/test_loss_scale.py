"""float16: gradients of every kind of output are those of float32, or it is an error."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import mpizero_torch as mz
from mpizero_torch.sharding.loss_scale import LossScale

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])

PER_RANK = 2
WAYS = [
    pytest.param({"stage": 1}, id="1"),
    pytest.param({"stage": 2, "segment_mb": 0.002}, id="2"),
    pytest.param({"stage": 3}, id="3"),
    pytest.param({"stage": 3, "share_parameters": False, "segment_mb": 0.002}, id="3 private"),
]


@dataclass(frozen=True)
class Found:
    """What some modules return: no container that torch knows."""

    loss: torch.Tensor
    logits: list[torch.Tensor]


class Slotted:
    __slots__ = ("inside", "loss")

    def __init__(self, loss: torch.Tensor, inside: Any) -> None:
        self.loss, self.inside = loss, inside


class Net(nn.Module):
    """Computes its loss as ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
        self.how = how
        self.kept: Any = None

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        out = self.net(x)
        loss = functional.mse_loss(out.float(), y.float())
        self.kept = out
        return {
            "plain": lambda: out,
            "float": lambda: out.float(),
            "loss": lambda: loss,
            "both": lambda: {"loss": loss, "logits": out},
            "dataclass": lambda: Found(loss, [out]),
            "slots": lambda: Slotted(loss, Found(loss, [out])),
        }[self.how]()

    def own_loss(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        """A method of its own, as some models have for training."""
        return self(x, y)


def loss_of(model: Any, x: torch.Tensor, y: torch.Tensor, y_of: Any = None) -> torch.Tensor:
    out = model(x, y)
    if isinstance(out, dict):
        return out["loss"]
    if not isinstance(out, torch.Tensor):
        return out.loss
    return out if out.dim() == 0 else functional.mse_loss(out.float(), y)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count = mz.init().size * PER_RANK
    return torch.randn(count, 6, generator=generator), torch.randn(count, 4, generator=generator)


def own(tensor: torch.Tensor) -> torch.Tensor:
    rank = mz.init().rank
    return tensor[rank * PER_RANK : (rank + 1) * PER_RANK]


def wrapped(how: str, way: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    inner = Net(how)
    options = {"precision": "fp16", **options, **way}
    return mz.zero(inner, torch.optim.SGD(inner.parameters(), 0.05), **options)


def assert_gradients(model: Any, alone: nn.Module, factor: float = 1.0) -> None:
    for name, parameter in alone.named_parameters():
        assert parameter.grad is not None
        difference = (model.gradient(name) - parameter.grad * factor).norm()
        assert float(difference) <= 5e-3 * float(parameter.grad.norm()) * factor, name


@ranks
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["plain", "float", "loss", "both", "dataclass", "slots"])
def test_gradients_are_those_of_float32_whatever_comes_out(how: str, way: dict[str, Any]) -> None:
    model, optimizer = wrapped(how, way)
    alone = Net(how)
    x, y = batch()
    loss_of(alone, x, y).backward()
    loss_of(model, own(x), own(y)).backward()
    assert_gradients(model, alone)
    assert_the_norm_and_the_inner_forward(model, optimizer, alone)


def assert_the_norm_and_the_inner_forward(model: Any, optimizer: Any, alone: nn.Module) -> None:
    x, y = batch()
    whole = torch.cat([p.grad.flatten() for p in alone.parameters() if p.grad is not None])
    assert float(mz.clip_grad_norm_(model, 1e9)) == pytest.approx(float(whole.norm()), rel=5e-3)
    optimizer.zero_grad()
    for call in (model.module, model.own_loss):  # the inner module's own forward
        loss_of(call, own(x), own(y)).backward()
        assert_gradients(model, alone)
        optimizer.zero_grad()


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_gradients_too_small_for_float16_are_not_lost(way: dict[str, Any]) -> None:
    """float16 has nothing below 6e-8."""
    model, _ = wrapped("float", way)
    alone = Net("float")
    x, y = batch()
    (loss_of(alone, x, y) * 1e-7).backward()
    (loss_of(model, own(x), own(y)) * 1e-7).backward()
    assert_gradients(model, alone)


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_inputs_and_through_several_forwards(way: dict[str, Any]) -> None:
    model, _ = wrapped("plain", way)
    alone = Net("plain")
    x, y = batch()
    leaf, part = x.clone().requires_grad_(), own(x).clone().requires_grad_()
    first, again = alone(leaf, y), model(part, own(y))
    grow = torch.ones(4, 6) / 6
    functional.mse_loss(alone(first @ grow, y), y).backward()
    loss = functional.mse_loss(model(again @ grow, own(y)), own(y))
    loss /= 2  # what comes out may be changed in place
    loss.backward()
    assert_gradients(model, alone, 0.5)
    assert leaf.grad is not None and part.grad is not None
    expected = own(leaf.grad) * mz.init().size / 2
    torch.testing.assert_close(part.grad, expected, rtol=2e-2, atol=1e-5)


class Checkpointed(Net):
    def __init__(self, reentrant: bool) -> None:
        super().__init__("float")
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return checkpoint(self.net, x, use_reentrant=self.reentrant).float()


@ranks
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_computed_again_in_backward_is_scaled_once(
    way: dict[str, Any], reentrant: bool
) -> None:
    inner, alone = Checkpointed(reentrant), Net("float")
    optimizer = torch.optim.SGD(inner.parameters(), 0.05)
    model, _ = mz.zero(inner, optimizer, precision="fp16", **way)
    x, y = batch()
    loss_of(alone, x, y).backward()
    loss_of(model, own(x).requires_grad_(), own(y)).backward()
    assert_gradients(model, alone)


class Cache:
    """What a model keeps of its own from one call to the next."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> dict[str, Any]:
        cache = Cache() if cache is None else cache
        cache.seen.append(self.net(x))
        return {"out": torch.cat(cache.seen), "cache": cache}


@ranks
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_cache_goes_in_and_out_as_it_is(precision: str) -> None:
    inner = Remembering()
    optimizer = torch.optim.SGD(inner.parameters(), 0.05)
    model, _ = mz.zero(inner, optimizer, precision=precision)
    for call in (model, inner):
        with torch.no_grad():
            first = call(torch.ones(1, 6))
            second = call(torch.ones(1, 6), first["cache"])
        assert second["cache"] is first["cache"] and len(first["cache"].seen) == 2
        assert second["out"].dtype == torch.float32 and second["out"].shape == (2, 6)


def penalty(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    weights = [p.float().pow(2).sum() for p in model.parameters()]
    return loss_of(model, x, y) + 0.1 * torch.stack(weights).sum()


def kept_by_the_module(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return loss_of(model, x, y) + model.kept.float().pow(2).mean()


def part_of_the_module(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.mse_loss(model.net(x.half()).float(), y)


def differentiated_gradient(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    found = torch.autograd.grad(model(x, y).sum(), x, create_graph=True)[0]
    return found.pow(2).sum()


@ranks
@pytest.mark.parametrize(
    "loss", [penalty, kept_by_the_module, part_of_the_module, differentiated_gradient]
)
@pytest.mark.parametrize("way", WAYS[:2])
def test_losses_that_the_scale_would_miss_are_refused(
    loss: Callable[..., torch.Tensor], way: dict[str, Any]
) -> None:
    model, optimizer = wrapped("plain", way)
    x, y = batch()
    with pytest.raises(mz.MpizeroError, match="precision='fp16'"):
        loss(model, own(x), own(y)).backward()
    optimizer.zero_grad()
    loss_of(model, own(x), own(y)).backward()  # and it goes on
    optimizer.step()
    with pytest.raises(mz.MpizeroError, match=r"autograd\.grad\(\)"):
        torch.autograd.grad(loss_of(model, own(x), own(y)), list(model.parameters()))


@several_ranks
def test_verify_finds_a_scale_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Any:
        model = Net("float")
        return model, torch.optim.SGD(model.parameters(), 0.05), loss_of

    def check() -> mz.VerifyReport:
        return mz.verify(build, [batch(s) for s in range(3)], (1, 2, 3), precision="fp16")

    assert check().ok, str(check())
    monkeypatch.setattr(LossScale, "scale", lambda self, output, dtype: output.to(dtype))
    monkeypatch.setattr(LossScale, "check_pass", lambda self, parameters: None)
    report = check()
    assert not any(result.ok for result in report.results)
    assert "gradient of" in str(report) and "training has changed" in str(report)


@several_ranks
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_verify_finds_gradients_of_another_length(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> Any:
        model = Net("loss")
        return model, torch.optim.AdamW(model.parameters(), 1e-3), loss_of

    monkeypatch.setattr(mz.ShardedModule, "_unscale", lambda self: self.scaling.value * factor)
    report = mz.verify(build, [batch()], (2,), precision="fp16")
    assert report.results[0].gradient is not None, str(report)


def step(model: Any, optimizer: Any, factor: float = 1.0) -> None:
    x, y = batch()
    optimizer.zero_grad()
    (loss_of(model, own(x), own(y)) * factor).backward()
    optimizer.step()


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_is_never_finite_warns_and_ends(way: dict[str, Any]) -> None:
    model, optimizer = wrapped("plain", way)
    step(model, optimizer)
    assert not optimizer.step_was_skipped
    is_first = mz.init().rank == 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(16):
            step(model, optimizer, float("nan"))
            assert optimizer.step_was_skipped
    assert [("in a row" in str(each.message)) for each in caught] == [True] * is_first
    assert model.loss_scale == 1.0 and model.scaling.skipped == 16
    with pytest.raises(mz.MpizeroError, match="smallest"):
        step(model, optimizer, float("nan"))
    step(model, optimizer)
    assert not optimizer.step_was_skipped


@ranks
def test_the_scale_is_as_it_is_asked_for() -> None:
    def made(**options: Any) -> tuple[Any, Any]:
        precision = mz.MixedPrecision("fp16", **options)
        return wrapped("plain", {"stage": 2}, precision=precision)

    model, optimizer = made(initial_scale=64.0, growth_factor=4.0, growth_interval=2)
    scales = []
    for factor in (1.0, 1.0, 1.0, float("inf"), 1.0, 1.0):
        step(model, optimizer, factor)
        scales.append(model.loss_scale)
    assert scales == [64.0, 256.0, 256.0, 128.0, 128.0, 512.0]
    model, optimizer = made(loss_scale=8.0)
    alone = Net("plain")
    x, y = batch()
    loss_of(alone, x, y).backward()
    loss_of(model, own(x), own(y)).backward()
    assert_gradients(model, alone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(16):
            step(model, optimizer, float("nan"))
    assert model.loss_scale == 8.0
    with pytest.raises(mz.MpizeroError, match="smallest"):
        step(model, optimizer, float("nan"))
    for options in ({"loss_scale": 0.0}, {"growth_factor": 1.0}, {"smallest_scale": 1e9}):
        with pytest.raises(mz.ArgumentError, match=next(iter(options))):
            made(**options)
