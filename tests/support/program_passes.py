"""Backward passes of random programs, in each way in which users have them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from support.program_draw import Draw, Events
from support.program_sides import FORMS, After, Before, Joined, Shape, Side, taken


def _through(side: Side, x: torch.Tensor, chain: Any, uses: Any, **options: Any) -> torch.Tensor:
    """Through one module after the other, the last one first; or each by itself, summed."""
    if options.pop("beside", False):
        pairs = list(zip(chain, uses, strict=True))
        outs = [
            taken(side.models[model](x, of_ranks[side.rank], **options))
            for model, of_ranks in (pairs if side.rank % 2 == 0 else reversed(pairs))
        ]
        return torch.stack(outs).sum(0)
    for model, of_ranks in zip(reversed(chain), reversed(uses), strict=True):
        x = taken(side.models[model](x, of_ranks[side.rank], **options))
    return x


def _loss(out: torch.Tensor, number: int) -> torch.Tensor:
    return out.square().mean() if number % 2 == 0 else (out.sin() * (number + 1)).mean()


def draw_train(draw: Draw) -> dict[str, Any]:
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
    uses = [draw.uses(same) for _ in chain]
    overlaps = any(options.get("overlap", True) for options in draw.setting.options)
    if again and overlaps:
        # More gradients than before are refused, on those ranks that have them.
        chain, uses = tuple(dict.fromkeys(chain)), uses[: len(set(chain))]
        uses = [["ab" if use == "abab" else use for use in each] for each in uses]
        graph = "one" if graph == "sum" else graph
    # A second backward through a graph that was checkpointed is torch's to refuse.
    if graph == "retain":
        again = None
    return {
        "chain": chain,
        "uses": uses,
        "micro": micro,
        "graph": graph,
        "weights": weights,
        "beside": draw.often(0.4),
        "again": again,
        "form": form,
        "penalty": again is None and draw.often(0.15),
        "average_last": draw.often(0.85),
    }


def _has_buffers(shape: Shape) -> bool:
    return shape.norm or shape.count


def train(
    side: Side,
    number: int,
    *,
    chain: tuple[int, ...],
    uses: Any,
    micro: int,
    graph: str,
    weights: list[list[float]] | None,
    beside: bool,
    again: bool | None,
    form: str,
    penalty: bool,
    average_last: bool,
) -> Events:
    done, models = 0, tuple(dict.fromkeys(chain))
    for step in range(micro):
        sync = average_last and step == micro - 1
        losses = []
        for each in range(2 if graph in ("two", "sum") else 1):
            # A rank that uses no layer still has a loss with a graph, as a real one would.
            x = side.batch(number * 16 + step * 2 + each, need=True)
            out = _through(side, x, chain, uses, beside=beside, again=again, form=form)
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
            yield Before(models, weight)
            side.weigh(models, weight)
            with side.passing(models, sync):
                loss.backward(retain_graph=graph == "retain" and at + 1 < len(losses))  # type: ignore[no-untyped-call]
            yield After(models, sync)
            done += 1


def draw_towards(draw: Draw) -> dict[str, Any]:
    model = draw.model
    return {
        "model": model,
        "layers": draw.one("", draw.layers),
        "use": draw.uses(draw.often(0.7)),
        "sync": draw.often(0.7),
        "weights": draw.weights(1),
    }


def towards(
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
    if len(set(use)) > 1 and wanted[0] is not x:
        wanted.append(x)  # else no hook is called on a rank that uses none of them
    loss = _loss(_through(side, x, (model,), [use]), 0)
    stated = None if weights is None or wanted[0] is x else weights[0][side.rank]
    yield Before((model,), stated)
    side.weigh((model,), stated)
    with side.passing((model,), sync):
        loss.backward(inputs=wanted)  # type: ignore[no-untyped-call]
    yield After((model,), sync, full=False)


def draw_grad(draw: Draw) -> dict[str, Any]:
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


def grad(
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


def draw_adversarial(draw: Draw) -> dict[str, Any]:
    return {
        "use": draw.one("abc", "ab"),
        "weights": draw.weights(1),
        "freeze": draw.often(0.8),
        "step": draw.often(0.7),
    }


def adversarial(
    side: Side,
    number: int,
    *,
    use: str,
    weights: list[list[float]] | None,
    freeze: bool,
    step: bool,
) -> Events:
    """A GAN's step: module 1 is trained through module 0, which is frozen; then module 0 itself."""
    weight = None if weights is None else weights[0][side.rank]
    judge, maker = side.models
    trained = [parameter.requires_grad for parameter in side.parameters(0)]
    if freeze:
        judge.requires_grad_(False)
    for model in side.models:
        model.zero_grad()
    made = taken(maker(side.batch(number * 16, need=True), use))
    loss = taken(judge(made)).square().mean()
    yield Before((0, 1), weight)
    side.weigh((1,) if freeze else (0, 1), weight)
    loss.backward()  # type: ignore[no-untyped-call]
    yield After((0, 1))
    if step and not side.hooked:
        side.step(1)
    for parameter, before in zip(side.parameters(0), trained, strict=True):
        parameter.requires_grad_(before)
    judge.zero_grad(set_to_none=False)
    real = side.batch(number * 16 + 1, need=True)
    loss = taken(judge(made.detach())).mean() - taken(judge(real)).sin().mean()
    yield Before((0,), weight)
    side.weigh((0,), weight)
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    yield After((0,))
    if step and not side.hooked:
        side.step(0)


def draw_join(draw: Draw) -> dict[str, Any]:
    return {
        "model": draw.model,
        "steps": [draw.rng.randrange(4) for _ in range(draw.size)],
        "passes": draw.one(1, 2),
        "with_optimizer": True,
    }


def join(
    side: Side, number: int, *, model: int, steps: list[int], passes: int, with_optimizer: bool
) -> Events:
    """Loops that end earlier on some ranks."""
    side.models[model].zero_grad()

    def passes_of(step: int) -> Iterator[torch.Tensor]:
        for each in range(passes):
            x = side.batch(number * 16 + step * passes + each, need=True)
            yield _loss(taken(side.models[model](x)), each)

    if side.real:
        optimizer = side.optimizers[model]
        with side.models[model].join(optimizer if with_optimizer else None):
            for step in range(steps[side.rank]):
                side.models[model].zero_grad()
                for loss in passes_of(step):
                    loss.backward()  # type: ignore[no-untyped-call]
                side.step(model)
        side.models[model].zero_grad()
    yield Joined(model, tuple(steps), passes_of)
