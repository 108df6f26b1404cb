"""What users do with a distributed module, as steps of a random program.

A step is drawn once, the same on all ranks, and then done on each side: by a generator that says
``Before`` and ``After`` around each backward pass, so that the oracle can do its part there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mpizero_torch as mz
from support.program_draw import Draw, Events
from support.program_oracle import Oracle
from support.program_passes import (
    adversarial,
    draw_adversarial,
    draw_grad,
    draw_join,
    draw_towards,
    draw_train,
    grad,
    join,
    towards,
    train,
)
from support.program_sides import LAYERS, Saved, Side, taken
from support.reference import seeded


@dataclass(frozen=True)
class Step:
    """One line of a program."""

    name: str
    number: int
    options: dict[str, Any]

    def __str__(self) -> str:
        said = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"{self.name}({said})"

    def events(self, side: Side) -> Events:
        return STEPS[self.name].act(side, self.number, **self.options)

    def applies(self, oracle: Oracle) -> bool:
        """Would a program do this now, or would its replicas part by its own fault?"""
        return STEPS[self.name].applies(oracle, self.options)


@dataclass(frozen=True)
class Kind:
    """How a step is drawn, done, and when it makes sense."""

    draw: Callable[[Draw], dict[str, Any]]
    act: Callable[..., Events]
    often: float
    applies: Callable[[Oracle, dict[str, Any]], bool] = lambda oracle, options: True


def _freeze(side: Side, number: int, *, model: int, layers: str, train: bool) -> Events:
    for name in layers:
        getattr(side.inner[model], name).requires_grad_(train)
    yield from ()


def _evaluate(side: Side, number: int, *, model: int, ranks: list[int], grad: bool) -> Events:
    if side.rank in ranks:
        mode = side.inner[model].training
        side.models[model].eval()
        with torch.set_grad_enabled(grad):
            out = taken(side.models[model](side.batch(number * 16)))
        side.results.append(out.detach())
        side.models[model].train(mode)
    yield from ()


def _mode(side: Side, number: int, *, model: int, training: bool) -> Events:
    side.models[model].train(training)
    yield from ()


def _zero(side: Side, number: int, *, models: list[int], how: str) -> Events:
    for model in models:
        if how in ("none", "zeros"):
            side.models[model].zero_grad(set_to_none=how == "none")
            continue
        for parameter in side.parameters(model):
            if how == "by hand None":
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()
    yield from ()


def _step(side: Side, number: int, *, model: int) -> Events:
    side.step(model)
    yield from ()


def _saved(side: Side, number: int, *, model: int, how: str) -> Events:
    """Saved, changed, and loaded again: all is as it was, and buffers rank 0's."""
    module, optimizer = side.models[model], side.optimizers[model]
    if how == "state_dict":
        state = copy.deepcopy(module.state_dict())
        for parameter in side.parameters(model):
            parameter.data.mul_(2.0)
        module.load_state_dict(state)
        return
    if side.real:
        path = Path(side.store["folder"]) / str(number)
        mz.save(path, model=module, optimizer=optimizer, world=module.world)
        for parameter in side.parameters(model):
            parameter.data.mul_(2.0)
        mz.load(path, model=module, optimizer=optimizer, world=module.world)
    yield Saved(model)


def _clip(side: Side, number: int, *, model: int, how: str) -> Events:
    if how == "torch norm" or (how == "mz norm" and not side.real):
        norm = nn.utils.clip_grad_norm_(side.models[model].parameters(), 0.05)
        side.results.append(norm)
    elif how == "mz norm":
        side.results.append(mz.clip_grad_norm_(side.models[model], 0.05))
    elif how == "torch value" or not side.real:
        nn.utils.clip_grad_value_(side.models[model].parameters(), 0.01)
    else:
        mz.clip_grad_value_(side.models[model], 0.01)
    yield from ()


def _rewrite(side: Side, number: int, *, model: int, layers: str, how: str) -> Events:
    """Gradients given other values, other memory, or another tensor."""
    for name in layers:
        for at, parameter in enumerate(getattr(side.inner[model], name).parameters()):
            if parameter.grad is None:
                if how == "new" and parameter.requires_grad:
                    made = seeded(number * 8 + at, *parameter.shape)
                    parameter.grad = made.to(parameter.dtype)
            elif how == "data":
                parameter.grad.data = parameter.grad.data * 0.5
            elif how == "tensor":
                parameter.grad = parameter.grad * 0.5
            elif how == "in place":
                parameter.grad.mul_(0.5)
            elif how == "own" and parameter.requires_grad:
                parameter.grad = parameter.grad * (1 + side.rank)
    yield from ()


def _keep(side: Side, number: int, *, model: int, layers: str) -> Events:
    for name in layers:
        for parameter in getattr(side.inner[model], name).parameters():
            if parameter.grad is not None:
                side.kept.append(parameter.grad)
    for parameter in side.parameters(model):
        parameter.grad = None
    yield from ()


def _write(side: Side, number: int, *, model: int, how: str) -> Events:
    """Parameters written through ``.data``."""
    for parameter in side.parameters(model):
        if how == "in place":
            parameter.data.mul_(1.01)
        else:
            parameter.data = parameter.data * 1.01
    yield from ()


def _convert(side: Side, number: int, *, dtype: str, last: bool) -> Events:
    for model in side.models:
        if dtype == "layout":
            if side.inner[0].shape.conv:
                kind = torch.channels_last if last else torch.contiguous_format
                model.to(memory_format=kind)
        else:
            model.to(getattr(torch, dtype))
    yield from ()


def _equal(oracle: Oracle, options: dict[str, Any]) -> bool:
    found = any(p.grad is not None for p in oracle.sides[0].parameters(options["model"]))
    return found and oracle.equal(options["model"])


def _trains(oracle: Oracle, options: dict[str, Any]) -> bool:
    net = oracle.sides[0].inner[options["model"]]
    return all(any(p.requires_grad for p in getattr(net, n).parameters()) for n in LAYERS)


def _have_gradients(oracle: Oracle, options: dict[str, Any]) -> bool:
    """Torch's clip_grad_value_ refuses none."""
    everyones = [side.parameters(options["model"]) for side in oracle.sides]
    return _comparable(oracle, options) and all(
        any(p.grad is not None for p in parameters) for parameters in everyones
    )


def _comparable(oracle: Oracle, options: dict[str, Any]) -> bool:
    return oracle.comparable(options["model"])


def _makes_weights_doubtful(oracle: Oracle, options: dict[str, Any]) -> bool:
    return not oracle.unreduced[options["model"]] and oracle.comparable(options["model"])


STEPS: dict[str, Kind] = {
    "train": Kind(draw_train, train, 8.0),
    "towards": Kind(draw_towards, towards, 1.0),
    "grad": Kind(draw_grad, grad, 2.0),
    "adversarial": Kind(draw_adversarial, adversarial, 1.0),
    "join": Kind(draw_join, join, 1.0, _trains),
    "saved": Kind(
        lambda draw: {"model": draw.model, "how": draw.one("mz", "state_dict")}, _saved, 0.7
    ),
    "freeze": Kind(
        lambda draw: {
            "model": draw.model,
            "layers": draw.one(draw.layers, LAYERS),
            "train": draw.often(0.5),
        },
        _freeze,
        2.5,
        _makes_weights_doubtful,
    ),
    "evaluate": Kind(
        lambda draw: {"model": draw.model, "ranks": draw.some, "grad": draw.often(0.5)},
        _evaluate,
        1.0,
    ),
    "mode": Kind(lambda draw: {"model": draw.model, "training": draw.often(0.5)}, _mode, 0.5),
    "zero": Kind(
        lambda draw: {
            "models": draw.one([draw.model], list(range(len(draw.setting.shapes)))),
            "how": draw.one("none", "zeros", "by hand None", "by hand zero_"),
        },
        _zero,
        4.0,
    ),
    "step": Kind(lambda draw: {"model": draw.model}, _step, 3.0, _equal),
    "clip": Kind(
        lambda draw: {
            "model": draw.model,
            "how": draw.one("torch norm", "mz norm", "torch value", "mz value"),
        },
        _clip,
        1.0,
        _have_gradients,
    ),
    "rewrite": Kind(
        lambda draw: {
            "model": draw.model,
            "layers": draw.layers,
            "how": draw.one("data", "data", "tensor", "in place", "own", "new")
            if draw.setting.weights == "never"
            else draw.one("data", "tensor", "in place", "own"),
        },
        _rewrite,
        2.0,
        _comparable,
    ),
    "keep": Kind(
        lambda draw: {"model": draw.model, "layers": draw.layers}, _keep, 1.5, _comparable
    ),
    "write": Kind(
        lambda draw: {"model": draw.model, "how": draw.one("in place", "other memory")}, _write, 0.7
    ),
    "convert": Kind(
        lambda draw: {
            "dtype": draw.one("layout", "float32", "float64", "bfloat16"),
            "last": draw.often(0.5),
        },
        _convert,
        0.0,  # in programs that convert at all
    ),
}


def draw_steps(draw: Draw, count: int) -> list[Step]:
    """A program's lines."""
    names = list(STEPS)
    often = [
        3.0 if name == "convert" and draw.setting.converts else STEPS[name].often for name in names
    ]
    if draw.setting.hooks:
        for name in ("step", "join"):
            often[names.index(name)] = 0.0
    if draw.setting.weights != "never":
        often[names.index("join")] = 0.0
    if len(draw.setting.shapes) < 2:
        often[names.index("adversarial")] = 0.0
    chosen = draw.rng.choices(names, often, k=count)
    return [Step(name, at, STEPS[name].draw(draw)) for at, name in enumerate(chosen)]
