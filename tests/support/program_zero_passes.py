"""Backward passes of random programs about ZeRO."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from support.program_sides import FORMS
from support.program_zero_sides import LAYERS, Setting, Side


class Draw:
    """Random choices for one step."""

    def __init__(
        self, rng: random.Random, size: int, setting: Setting, names: Sequence[str]
    ) -> None:
        self.rng, self.size, self.setting = rng, size, setting
        self._names = list(names)

    def one(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def often(self, share: float) -> bool:
        return self.rng.random() < share

    @property
    def optimizers(self) -> range:
        return range(2 if self.setting.several else 1)

    @property
    def names(self) -> list[str]:
        """Some parameters, at least one."""
        if self.often(0.2):
            return self._names
        found = [name for name in self._names if self.often(0.3)]
        return found or [self.one(*self._names)]

    @property
    def layers(self) -> str:
        """Some layers; those that are in no group yet are left alone."""
        choices = LAYERS.replace("d", "") if self.setting.late else LAYERS
        return "".join(name for name in choices if self.often(0.4)) or str(self.one(*choices))

    def uses(self, same: bool) -> list[str]:
        """Which layers each rank uses."""
        choices = (LAYERS, LAYERS, LAYERS, "abc", "a", "ca", "bd", "ep", "abab", "pd", "")
        if same or self.setting.same_everywhere:
            return [self.one(*choices[:-1])] * self.size
        return [self.one(*choices) for _ in range(self.size)]


def draw_train(draw: Draw) -> dict[str, Any]:
    setting = draw.setting
    graph = draw.one("one", "one", "one", "retain", "two", "sum")
    again = draw.one(None, None, None, None, False, True)
    form = draw.one(*list(FORMS)[:-1], *["tensor"] * 6)
    same = draw.often(0.7)
    if setting.precision == "fp16" or again is not None:
        graph = "one"
    if setting.compiled:
        again, form = None, "tensor"
    extra = draw.one("", "", "", "penalty", "weights", "inputs", "weight", "inner")
    if again is not None or setting.norm or setting.precision is not None:
        extra = ""
    return {
        "uses": draw.uses(same),
        "micro": draw.one(1, 1, 1, 2, 3),
        "sync": draw.one("always", "always", "last", "never" if draw.often(0.3) else "last"),
        "graph": graph,
        "again": again,
        "form": form,
        "extra": extra,
        "zero": draw.one("", "optimizers", "optimizers", "model"),
        "step": draw.often(0.5),
    }


def train(
    side: Side,
    number: int,
    *,
    uses: list[str],
    micro: int,
    sync: str,
    graph: str,
    again: bool | None,
    form: str,
    extra: str,
    zero: str,
    step: bool,
) -> None:
    """One or several backward passes, and perhaps a step."""
    if zero == "optimizers":
        for each in side.optimizers:
            each.zero_grad()
    elif zero:
        side.wrapped.zero_grad()
    for each in range(micro):
        is_averaged = sync == "always" or (sync == "last" and each == micro - 1)
        losses = _losses(side, number * 16 + each * 2, uses, graph, again, form, extra)
        for at, loss in enumerate(losses):
            with side.passing(is_averaged):
                keep = graph == "retain" and at + 1 < len(losses)
                loss.backward(retain_graph=keep)  # type: ignore[no-untyped-call]
    if step and not side.unreduced and side.has_gradients:
        for one in side.optimizers:
            one.step()


def _losses(
    side: Side, number: int, uses: list[str], graph: str, again: bool | None, form: str, extra: str
) -> list[torch.Tensor]:
    """What is to be differentiated, one after the other."""
    found: list[torch.Tensor] = []
    for each in range(2 if graph in ("two", "sum") else 1):
        outs = side.outputs(number + each, uses, need=True, again=again, form=form)
        loss = _mean([_loss(out, each) for _, out in outs])
        found.append(_with_extra(side, loss, outs, extra, number))
        if graph == "retain":
            found.append(_mean([_loss(out, 1) for _, out in outs]))
    return [found[0] + found[1]] if graph == "sum" else found


def _with_extra(side: Side, loss: torch.Tensor, outs: Any, extra: str, number: int) -> torch.Tensor:
    if extra == "penalty":
        terms = []
        for x, out in outs:
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            terms.append((slope.norm(dim=1) - 1).square().mean())
        return loss + _mean(terms)
    if extra == "weights":  # the same on all ranks
        weights = [side.net.a.weight, side.net.e.weight]
        return loss + 0.01 * sum((w.square().sum() for w in weights), torch.zeros(()))
    if extra == "inputs":
        slopes = [torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for x, out in outs]
        side.result("slope", side.mine(slopes))
    if extra == "weight":
        slopes = [
            torch.autograd.grad(out.square().sum(), side.net.scale, retain_graph=True)[0]
            for _, out in outs
        ]
        side.result("slope of a weight", slopes[0 if side.real else side.rank])
    if extra == "inner":
        with torch.no_grad():
            x = side.part(number, side.rank)
            side.result("inner", side.net(x, LAYERS))
    return loss


def _mean(losses: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(losses)).mean()


def _loss(out: torch.Tensor, number: int) -> torch.Tensor:
    return out.square().mean() if number % 2 == 0 else (out.sin() * (number + 1)).mean()
