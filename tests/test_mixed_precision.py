"""Models that 16 bits alone do not train: buffers, running statistics, layers that stay wide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import mpizero_torch as mz

ranks = pytest.mark.parallel([1, 2, 3, 4])

PER_RANK = 4
WAYS = [
    pytest.param({"stage": 1}, id="1"),
    pytest.param({"stage": 2, "partition": "parameter"}, id="2"),
    pytest.param({"stage": 3}, id="3"),
    pytest.param({"stage": 3, "share_parameters": False, "segment_mb": 0.002}, id="3 private"),
]


class Model(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(6, 16), between, nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.between(torch.tanh(self.first(x))))


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.sin(torch.arange(16.0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.positions


class WideNorm(nn.LayerNorm):
    """As some models write it: computed in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)


class Functional(nn.Module):
    """Its weight meets a buffer in an operation that wants one dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)
        self.register_buffer("offset", torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x + self.offset, self.weight)


class Recurrent(nn.Module):
    """Gives a layer a state of its own making."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(1, 16)
        return self.lstm(x, hx=(zeros, zeros))[0]


def norm_of_float32() -> nn.Module:
    return nn.Sequential(ToFloat32(), nn.LayerNorm(16))


class ToFloat32(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


MODELS = {
    "positions": Positions,
    "batch norm": lambda: nn.BatchNorm1d(16),
    "norm of float32": norm_of_float32,
    "lstm": Recurrent,
}


def build(name: str) -> Model:
    torch.manual_seed(0)
    return Model({**MODELS, "wide norm": lambda: WideNorm(16)}[name]())


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    # The same samples on all ranks, so that BatchNorm knows the statistics of all.
    generator = torch.Generator().manual_seed(step)
    return torch.randn(PER_RANK, 6, generator=generator), torch.randn(
        PER_RANK, 4, generator=generator
    )


def train(model: Any, optimizer: Any, steps: int = 4) -> list[float]:
    losses = []
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@ranks
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_they_train_by_default(name: str, way: dict[str, Any], precision: str) -> None:
    alone, inner = build(name), build(name)
    expected = train(alone, sgd(alone))
    policy = mz.MixedPrecision(precision, initial_scale=1024.0)  # no step is left out
    model, optimizer = mz.zero(inner, sgd(inner), precision=policy, **way)
    found = train(model, optimizer)
    assert found == pytest.approx(expected, rel=2e-2 if precision == "bf16" else 4e-3)
    state = model.state_dict()
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=0.05, atol=5e-3)
    for part in inner.modules():
        wide = isinstance(part, nn.BatchNorm1d)
        for each in [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
            if each.is_floating_point() and (wide or not isinstance(each, nn.Parameter)):
                assert each.dtype == torch.float32


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_what_stays_in_float32(way: dict[str, Any]) -> None:
    for asked in (["between", nn.Embedding], [nn.LayerNorm], ["between", "last"], [""]):
        inner, alone = build("wide norm"), build("wide norm")
        expected = train(alone, sgd(alone))
        policy = mz.MixedPrecision("bf16", float32=asked, cast_inputs="" not in asked)
        model, optimizer = mz.zero(inner, sgd(inner), precision=policy, **way)
        losses = train(model, optimizer)
        assert losses == pytest.approx(expected, rel=1e-5 if asked == [""] else 2e-2)
        kept = {name for name, p in inner.named_parameters() if p.dtype == torch.float32}
        names = ["between", "last"] if "last" in asked else ["between"]
        if asked == [""]:
            names = ["first", "between", "last"]
        assert kept == {f"{name}.{each}" for name in names for each in ("weight", "bias")}
        for name, parameter in alone.named_parameters():
            if asked == [""]:
                torch.testing.assert_close(model.state_dict()[name], parameter.detach())
        assert model.gradient("between.weight").dtype == torch.float32
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_dtypes_that_do_not_fit_are_named_with_the_remedy(way: dict[str, Any]) -> None:
    inner = build("wide norm")
    model, optimizer = mz.zero(inner, sgd(inner), precision="bf16", **way)
    with pytest.raises(mz.ArgumentError, match=r"'between'.*float32="):
        train(model, optimizer)

    def made(**options: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        inner = Model(Functional())
        policy = mz.MixedPrecision("bf16", **options)
        return mz.zero(inner, sgd(inner), precision=policy, **way)

    model, optimizer = made()
    with pytest.raises(mz.ArgumentError, match=r"'between'.*float32=.*buffers="):
        train(model, optimizer)
    torch.manual_seed(0)
    alone = Model(Functional())
    expected = train(alone, sgd(alone))
    for options in ({"buffers": "bf16"}, {"float32": [Functional]}):
        model, optimizer = made(**options)
        assert train(model, optimizer) == pytest.approx(expected, rel=2e-2)
    assert model.state_dict()["between.offset"].dtype == torch.float32


class Time(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)
        self.seen: Any = None

    def forward(self, time: torch.Tensor, more: dict[str, torch.Tensor]) -> torch.Tensor:
        self.seen = time[0, 0].item(), more["wave"][0, 0].item()
        return self.last(torch.sin(time) + more["wave"])


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_inputs_as_they_are(way: dict[str, Any]) -> None:
    for cast, seen in ((True, 996.0), (False, 997.0)):
        inner = Time()
        policy = mz.MixedPrecision("bf16", cast_inputs=cast)
        model, optimizer = mz.zero(inner, sgd(inner), precision=policy, **way)
        time = torch.full((2, 4), 997.0)
        out = model(time, more={"wave": time})
        out.sum().backward()
        optimizer.step()
        assert inner.seen == (seen, seen) and out.dtype == torch.float32


@ranks
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dtype": "fp8"}, "dtype"),
        ({"dtype": "bf16", "buffers": "int8"}, "buffers"),
        ({"dtype": "bf16", "float32": ["betwene"]}, "betwene"),
        ({"dtype": "bf16", "float32": "between"}, "float32"),
        ({"dtype": "fp16", "growth_interval": 0}, "growth_interval"),
    ],
)
def test_choices_that_there_are_not(options: dict[str, Any], named: str) -> None:
    inner = build("positions")
    with pytest.raises(mz.ArgumentError, match=named):
        mz.zero(inner, sgd(inner), precision=mz.MixedPrecision(**options))
