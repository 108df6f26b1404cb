"""What users do with a distributed module, as steps of a random program.

A step is drawn once, the same on all ranks, and then done on each side: by a generator that says
``Before`` and ``After`` around each backward pass, so that the oracle can do its part there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import mpizero_torch as mz
from support.program_sides import FORMS, LAYERS, After, Before, Oracle, Shape, Side, taken
from support.reference import seeded

Events = Iterator[Before | After]


@dataclass(frozen=True)
class Setting:
    """What a program is about: its modules, how they are wrapped, and what else holds for it."""

    shapes: tuple[Shape, ...]
    options: tuple[dict[str, Any], ...]
    progress: str
    weights: str  # "never", "always", "mixed"
    optimizer: str
    hooks: str  # an optimizer's step in backward: "", "before" or "after" wrapping
    converts: bool

    def __str__(self) -> str:
        modules = ", ".join(
            f"m{number} = {shape} {options or ''}".rstrip()
            for number, (shape, options) in enumerate(zip(self.shapes, self.options, strict=True))
        )
        hooks = f", hooks {self.hooks} wrapping step in backward" if self.hooks else ""
        return f"{modules}; {self.optimizer}; progress {self.progress}{hooks}"


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


class Draw:
    """Random choices for one step."""

    def __init__(self, rng: random.Random, size: int, setting: Setting) -> None:
        self.rng, self.size, self.setting = rng, size, setting

    def one(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def often(self, share: float) -> bool:
        return self.rng.random() < share

    @property
    def model(self) -> int:
        return self.rng.randrange(len(self.setting.shapes))

    @property
    def chain(self) -> tuple[int, ...]:
        """The modules that a forward goes through, the first one last."""
        if len(self.setting.shapes) == 1:
            return (0,)
        found: tuple[int, ...] = self.one((0, 1), (1, 0), (0,), (1,))
        return found

    def uses(self, same: bool) -> list[str]:
        """Which layers each rank uses."""
        choices = ("abc", "abc", "ab", "a", "c", "bc", "ba", "abab", "")
        if same:
            return [self.one(*choices[:-1])] * self.size
        return [self.one(*choices) for _ in range(self.size)]

    @property
    def some(self) -> list[int]:
        """Some ranks, perhaps all, perhaps none."""
        if self.often(0.3):
            return list(range(self.size))
        return [rank for rank in range(self.size) if self.often(0.5)]

    @property
    def layers(self) -> str:
        return "".join(name for name in LAYERS if self.often(0.5)) or self.one(*LAYERS)

    def weights(self, passes: int) -> list[list[float]] | None:
        kind = self.setting.weights
        if kind == "never" or (kind == "mixed" and self.often(0.5)):
            return None
        return [[self.one(0.0, 1.0, 2.5, 7.0) for _ in range(self.size)] for _ in range(passes)]


@dataclass(frozen=True)
class Kind:
    """How a step is drawn, done, and when it makes sense."""

    draw: Callable[[Draw], dict[str, Any]]
    act: Callable[..., Events]
    often: float
    applies: Callable[[Oracle, dict[str, Any]], bool] = lambda oracle, options: True


def _through(side: Side, x: torch.Tensor, chain: Any, uses: Any, **options: Any) -> torch.Tensor:
    for model, of_ranks in zip(reversed(chain), reversed(uses), strict=True):
        x = taken(side.models[model](x, of_ranks[side.rank], **options))
    return x


def _loss(out: torch.Tensor, number: int) -> torch.Tensor:
    return out.square().mean() if number % 2 == 0 else (out.sin() * (number + 1)).mean()


def _draw_train(draw: Draw) -> dict[str, Any]:
    chain = draw.chain
    micro, graph = draw.one(1, 1, 2, 3), draw.one("one", "one", "retain", "two", "sum")
    passes = micro * (2 if graph in ("retain", "two") else 1)
    weights = draw.weights(passes)
    same = draw.often(0.5) or draw.setting.weights == "mixed"
    again, form = draw.one(None, None, None, False, True), draw.one(*list(FORMS)[:-1], "tensor")
    if draw.often(0.1) and draw.setting.weights == "never":
        form, same = "closure", True
    if again is not None and graph == "two" and any(map(_has_buffers, draw.setting.shapes)):
        graph = "one"
    # A second backward through a graph that was checkpointed is torch's to refuse.
    if graph == "retain":
        again = None
    return {
        "chain": chain,
        "uses": [draw.uses(same) for _ in chain],
        "micro": micro,
        "graph": graph,
        "weights": weights,
        "again": again,
        "form": form,
        "penalty": again is None and draw.often(0.15),
        "average_last": draw.often(0.85),
    }


def _has_buffers(shape: Shape) -> bool:
    return shape.norm or shape.count


def _train(
    side: Side,
    number: int,
    *,
    chain: tuple[int, ...],
    uses: Any,
    micro: int,
    graph: str,
    weights: list[list[float]] | None,
    again: bool | None,
    form: str,
    penalty: bool,
    average_last: bool,
) -> Events:
    done = 0
    for step in range(micro):
        sync = average_last and step == micro - 1
        losses = []
        for each in range(2 if graph in ("two", "sum") else 1):
            # A rank that uses no layer still has a loss with a graph, as a real one would.
            x = side.batch(number * 16 + step * 2 + each, need=True)
            out = _through(side, x, chain, uses, again=again, form=form)
            loss = _loss(out, each)
            if penalty:
                (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
                loss = loss + (slope.flatten(1).norm(dim=1) - 1).square().mean()
            losses.append(loss)
            if graph == "retain":
                losses.append(_loss(out, 1))
        if graph == "sum":
            losses = [losses[0] + losses[1]]
        for at, loss in enumerate(losses):
            weight = None if weights is None else weights[done][side.rank]
            yield Before(chain, weight)
            side.weigh(chain, weight)
            with side.passing(chain, sync):
                loss.backward(retain_graph=graph == "retain" and at + 1 < len(losses))  # type: ignore[no-untyped-call]
            yield After(chain, sync)
            done += 1


def _draw_towards(draw: Draw) -> dict[str, Any]:
    model = draw.model
    return {
        "model": model,
        "layers": draw.one("", draw.layers),
        "use": draw.uses(True),
        "sync": draw.often(0.7),
        "weights": draw.weights(1),
    }


def _towards(
    side: Side,
    number: int,
    *,
    model: int,
    layers: str,
    use: list[str],
    sync: bool,
    weights: list[list[float]] | None,
) -> Events:
    """``backward(inputs=[...])``, towards some layers' parameters or the input alone."""
    x = side.batch(number * 16, need=True)
    net = side.inner[model]
    named = [p for n in layers for p in getattr(net, n).parameters() if p.requires_grad]
    used = [p for n in layers if n in use[0] for p in getattr(net, n).parameters()]
    wanted: list[torch.Tensor] = [p for p in named if any(p is each for each in used)] or [x]
    loss = _loss(_through(side, x, (model,), [use]), 0)
    stated = None if weights is None or wanted == [x] else weights[0][side.rank]
    yield Before((model,), stated)
    side.weigh((model,), stated)
    with side.passing((model,), sync):
        loss.backward(inputs=wanted)  # type: ignore[no-untyped-call]
    yield After((model,), sync, full=False)


def _draw_grad(draw: Draw) -> dict[str, Any]:
    chain = draw.chain
    return {
        "chain": chain,
        "uses": [draw.uses(False) for _ in chain],
        "ranks": draw.some,
        "of": draw.one("x", "x", "parameters", "both"),
        "create_graph": draw.often(0.3),
        "again": draw.one(None, None, False),
        "evaluating": draw.often(0.3),
    }


def _grad(
    side: Side,
    number: int,
    *,
    chain: tuple[int, ...],
    uses: Any,
    ranks: list[int],
    of: str,
    create_graph: bool,
    again: bool | None,
    evaluating: bool,
) -> Events:
    """``autograd.grad``, on some ranks only: it sends nothing."""
    if side.rank not in ranks:
        return
    modes = [net.training for net in side.inner]
    if evaluating:
        for model in side.models:
            model.eval()
    x = side.batch(number * 16, need=True)
    wanted: list[torch.Tensor] = [] if of == "parameters" else [x]
    if of != "x":
        for model in chain:
            wanted += [p for p in side.parameters(model) if p.requires_grad]
    out = _through(side, x, chain, uses, again=again)
    if wanted:
        found = torch.autograd.grad(
            _loss(out, 0), wanted, create_graph=create_graph, allow_unused=True
        )
        side.results += [each.detach() for each in found if each is not None]
    for model, mode in zip(side.models, modes, strict=True):
        model.train(mode)
    yield from ()


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
    optimizer = side.optimizers[model]
    assert optimizer is not None
    optimizer.step()
    yield from ()


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


def _comparable(oracle: Oracle, options: dict[str, Any]) -> bool:
    return oracle.comparable(options["model"])


def _makes_weights_doubtful(oracle: Oracle, options: dict[str, Any]) -> bool:
    return not oracle.unreduced[options["model"]] and oracle.comparable(options["model"])


STEPS: dict[str, Kind] = {
    "train": Kind(_draw_train, _train, 8.0),
    "towards": Kind(_draw_towards, _towards, 1.0),
    "grad": Kind(_draw_grad, _grad, 2.0),
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
        _comparable,
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
        often[names.index("step")] = 0.0
    chosen = draw.rng.choices(names, often, k=count)
    return [Step(name, at, STEPS[name].draw(draw)) for at, name in enumerate(chosen)]
