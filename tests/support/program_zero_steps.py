"""What users do with a sharded model, as steps of a random program: done on either side."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mpizero_torch as mz
from support.program_sides import taken
from support.program_zero_passes import Draw, draw_train, train
from support.program_zero_sides import LAYERS, Net, Setting, Side, make_optimizers
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

    def act(self, side: Side) -> None:
        STEPS[self.name].act(side, self.number, **self.options)

    def applies(self, oracle: Side) -> bool:
        """Would a program do this now?"""
        return STEPS[self.name].applies(oracle, self.options)


@dataclass(frozen=True)
class Kind:
    """How a step is drawn, done, and when it makes sense."""

    draw: Callable[[Draw], dict[str, Any]]
    act: Callable[..., None]
    often: float
    applies: Callable[[Side, dict[str, Any]], bool] = lambda oracle, options: True
    fits: Callable[[Setting], bool] = lambda setting: True


def _forward(side: Side, number: int, *, grad: bool, training: bool) -> None:
    """One whose output nobody differentiates."""
    side.model.train(training or side.setting.norm)
    with torch.set_grad_enabled(grad):
        outs = side.outputs(number * 16, [LAYERS[:-1]] * side.size)
    side.result("output", side.mine([out.detach() for _, out in outs]))
    side.model.train()


def _zero(side: Side, number: int, *, of: str, to_none: bool) -> None:
    if of == "optimizers":
        for each in side.optimizers:
            each.zero_grad(set_to_none=to_none)
    elif of == "model":
        _zero_model(side, to_none)
    else:
        side.net.zero_grad(set_to_none=to_none)
    if to_none:
        side.unreduced = False


def _zero_model(side: Side, to_none: bool) -> None:
    """The wrapped model's forgets what is in its optimizers, and in none."""
    if side.real:
        side.wrapped.zero_grad(set_to_none=to_none)
    else:
        side.net.zero_grad(set_to_none=to_none)


def _gradient(side: Side, number: int, *, names: list[str], how: str) -> None:
    """Single gradients changed by hand."""
    for at, (name, p) in enumerate(side.chosen(names)):
        made = _made(number * 32 + at, p)
        if how == "None":
            p.grad = None
        elif how == "mz None":
            mz.set_gradient(p, None)
        elif how in ("set", "mz set"):
            if not p.requires_grad:
                continue
            if how == "set":
                p.grad = made
            else:
                mz.set_gradient(p, made)
        elif p.grad is not None:
            _change(p.grad, how, made)
            if how == "full":
                full: Any = mz.full_gradient(p) if side.real else p.grad
                side.result(f"gradient of {name}", full.detach().clone())


def _made(seed: int, like: torch.Tensor) -> torch.Tensor:
    return seeded(seed, like.numel()).view(like.shape).to(like.dtype)


def _change(gradient: torch.Tensor, how: str, made: torch.Tensor) -> None:
    if how == "zero":
        gradient.zero_()
    elif how == "half":
        gradient.mul_(0.5)
    elif how == "data half":
        gradient.data.mul_(0.5)
    elif how == "add":
        gradient.add_(made, alpha=0.1)
    elif how == "copy":
        gradient.copy_(made)
    elif how == "row" and gradient.dim():
        gradient[0] = 0.25
    elif how == "fill":
        gradient.fill_(0.1)


def _surgery(side: Side, number: int, *, names: list[str]) -> None:
    """A gradient is looked at, whole, changed, and set."""
    for _, p in side.chosen(names):
        found = mz.full_gradient(p)
        if found is not None:
            mz.set_gradient(p, found - 0.1 * found.mean())


def _clip(side: Side, number: int, *, how: str, bound: float) -> None:
    if how == "norm":
        norm: Any = mz.clip_grad_norm_(side.wrapped, bound)
        side.result("norm", norm.to(torch.float64))
    elif how == "largest":
        norm = mz.clip_grad_norm_(side.wrapped, bound, norm_type=float("inf"))
        side.result("norm", norm.to(torch.float64))
    elif how == "value":
        mz.clip_grad_value_(side.wrapped, bound)
    elif how == "torch value":
        nn.utils.clip_grad_value_(side.net.parameters(), bound)
    elif how == "torch value of groups":
        _on_all_or_none(side, lambda: [
            nn.utils.clip_grad_value_(group["params"], bound)
            for each in side.optimizers
            for group in each.param_groups
            # torch's raises where no gradient is: a rank may have none of a group's.
            if any(p.grad is not None for p in group["params"])
        ])  # fmt: skip
    elif how == "torch norm":
        nn.utils.clip_grad_norm_(side.model.parameters(), bound)
    else:
        _on_all_or_none(side, lambda: [
            nn.utils.clip_grad_norm_(each.param_groups[0]["params"], bound)
            for each in side.optimizers
        ])  # fmt: skip


def _on_all_or_none(side: Side, work: Callable[[], Any]) -> None:
    """What refuses without asking the other ranks, and need not on those that have nothing."""
    try:
        work()
        refused = None
    except mz.MpizeroError as error:
        refused = error
    if side.real:
        found = [each for each in side.world.gather_objects(refused and str(refused)) if each]
        if found:
            raise mz.MpizeroError(found[0])
    elif refused is not None:
        raise refused


def _step(side: Side, number: int, *, which: int, zero: str) -> None:
    for at, each in enumerate(side.optimizers):
        if which in (-1, at):
            each.step()
    if zero:
        _zero(side, number, of=zero, to_none=True)


def _closure(side: Side, number: int, *, uses: list[str]) -> None:
    def again() -> torch.Tensor:
        _zero(side, number, of="optimizers", to_none=True)
        losses = [out.square().mean() for _, out in side.outputs(number * 16, uses)]
        loss = torch.stack(losses).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        side.unreduced = False
        return loss

    side.optimizers[0].step(again)


def _rate(side: Side, number: int, *, how: str) -> None:
    if how == "schedule":
        for each in side.schedulers:
            each.step()
    else:
        side.optimizers[0].param_groups[0]["lr"] *= 0.7


def _freeze(side: Side, number: int, *, layers: str, train: bool) -> None:
    for name in layers:
        getattr(side.net, name).requires_grad_(train)


def _add_group(side: Side, number: int) -> None:
    parameters = list(side.net.d.parameters())
    for p in parameters:
        p.requires_grad_(True)
    side.optimizers[-1].add_param_group({"params": parameters, "lr": 0.02})


def _read(side: Side, number: int, *, what: str, names: list[str]) -> None:
    """Parameters looked at, whole."""
    if what in ("model", "part", "parameters"):
        chosen: Any = [p for _, p in side.chosen(names)]
        given: Any = {"model": side.wrapped, "part": side.net.b, "parameters": chosen}[what]
        with mz.gathered(given):
            seen = side.net.b.parameters() if what == "part" else chosen
            side.result("gathered", [p.detach().clone() for p in seen])
    elif what == "full":
        side.result("full", [mz.full_parameter(p) for _, p in side.chosen(names)])
    elif what == "norms":
        side.result("norms", [p.detach().square().sum() for _, p in side.chosen(names)])
    elif what == "copy":
        with mz.gathered(side.wrapped):
            copied = copy.deepcopy(side.net)
        if not side.setting.norm:
            out = taken(copied(side.part(number, 0), LAYERS))
            side.result("copy", out.detach())
    elif what == "state":
        side.result("state_dict", dict(side.wrapped.state_dict()))


def _write(side: Side, number: int, *, how: str, names: list[str]) -> None:
    """Parameters given other values."""
    chosen = side.chosen(names)
    made = [_made(number * 32 + at, p) * 0.3 for at, (_, p) in enumerate(chosen)]
    with torch.no_grad():
        if how == "gathered":
            with mz.gathered(side.wrapped, modify=True):
                for _, p in chosen:
                    p.mul_(0.9)
        elif how == "gathered some":
            with mz.gathered([p for _, p in chosen], modify=True):
                for (_, p), value in zip(chosen, made, strict=True):
                    p.copy_(value)
        elif how == "mz":
            for (_, p), value in zip(chosen, made, strict=True):
                mz.set_parameter(p, value)
        elif how == "in place":
            for _, p in chosen:
                p.mul_(0.9)
        elif how == "data in place":
            for _, p in chosen:
                p.data.mul_(0.9)
        elif how == "data":
            for (_, p), value in zip(chosen, made, strict=True):
                p.data = value
        elif how == "vector":
            vector = nn.utils.parameters_to_vector(side.net.parameters())
            nn.utils.vector_to_parameters(vector * 0.9, side.net.parameters())
        elif how == "init":
            for _, p in chosen:
                nn.init.constant_(p, 0.3)


def _load_plain(side: Side, number: int, *, into: str, assign: bool) -> None:
    """A plain model's state, into the wrapped model, or into the module within."""
    state = {key: torch.empty_like(v) for key, v in _plain_state(side).items()}
    for at, (_, value) in enumerate(sorted(state.items())):
        if value.is_floating_point():
            value.copy_(_made(number * 32 + at, value).abs() * 0.3 + 0.05)
        else:
            value.fill_(3)
    if side.setting.tied:
        state["c.weight"] = state["a.weight"]
    target = side.net if into == "net" else side.wrapped
    # With it, a plain optimizer would go on with the parameters that were replaced; ours follows.
    target.load_state_dict(state, assign=assign and side.real)
    if assign:  # that there are others in their place is seen when they are used
        _forward(side, number, grad=True, training=True)


def _plain_state(side: Side) -> dict[str, torch.Tensor]:
    made = Net(side.setting.tied, side.setting.norm).to(getattr(torch, side.setting.dtype))
    return made.state_dict()


def _save(side: Side, number: int, *, how: str) -> None:
    side.store["groups"] = [len(each.param_groups) for each in side.optimizers]
    side.store["how"] = how
    if side.real and how == "files":
        side.store["saved"] = Path(side.folder) / str(number)
        mz.save(
            side.store["saved"], model=side.wrapped, optimizer=_given(side), world=side.world,
            **({"ema": side.ema} if side.setting.ema else {}),
        )  # fmt: skip
    else:
        ema = {} if side.ema is None or side.real else dict(side.ema)
        found = [side.wrapped.state_dict(), [each.state_dict() for each in side.optimizers], ema]
        side.store["saved"] = copy.deepcopy(found)


def _given(side: Side) -> Any:
    return side.optimizers if side.setting.several else side.optimizers[0]


def _load(side: Side, number: int, *, into: str) -> None:
    saved = side.store["saved"]
    if into == "plain":
        _load_into_plain(side, saved)
    elif side.real and side.store["how"] == "files":
        mz.load(
            saved, model=side.wrapped, optimizer=_given(side), world=side.world,
            **({"ema": side.ema} if side.setting.ema else {}),
        )  # fmt: skip
    else:
        model, states, ema = copy.deepcopy(saved)
        side.wrapped.load_state_dict(model)
        for each, state in zip(side.optimizers, states, strict=True):
            each.load_state_dict(state)
        if side.store["how"] == "files" and ema:
            side.ema = ema


def _load_into_plain(side: Side, saved: Any) -> None:
    plain = Net(side.setting.tied, side.setting.norm).to(getattr(torch, side.setting.dtype))
    optimizers = make_optimizers(side.setting, plain)
    if side.real and side.store["how"] == "files":
        given: Any = optimizers if side.setting.several else optimizers[0]
        mz.load(saved, model=plain, optimizer=given, world=side.world)
    else:
        state = copy.deepcopy(saved)
        plain.load_state_dict(state[0])
        for each, own in zip(optimizers, state[1], strict=True):
            each.load_state_dict(own)
    side.result("loaded", [p.detach().clone() for p in plain.parameters()])
    side.result("loaded state", [each.state_dict()["state"] for each in optimizers])


def _optimizer_state(side: Side, number: int, *, names: list[str]) -> None:
    for name, p in side.chosen(names):
        if side.real and side.setting.stage:
            found = mz.optimizer_state(p)
        else:
            found = next((each.state[p] for each in side.optimizers if p in each.state), {})
        side.result(f"state of {name}", {**found})


def _ema(side: Side, number: int, *, how: str) -> None:
    if how == "update":
        if side.real:
            side.ema.update()
        else:
            for name, p in side.named:
                # What is in no group is used as it is.
                kept = side.ema[name]
                is_own = not side.setting.stage or id(p) in side.members
                side.ema[name] = kept * 0.5 + p.detach() * 0.5 if is_own else p.detach().clone()
        return
    with _averaged(side), torch.no_grad():
        outs = side.outputs(number * 16, [LAYERS] * side.size)
        side.result("averaged", side.mine([out for _, out in outs]))


@contextmanager
def _averaged(side: Side) -> Iterator[None]:
    if side.real:
        with side.ema.average():
            yield
        return
    before = {name: p.detach().clone() for name, p in side.named}
    for name, p in side.named:
        if not side.setting.stage or id(p) in side.members:  # others are used as they are
            p.data.copy_(side.ema[name])
    yield
    for name, p in side.named:
        p.data.copy_(before[name])


def _reduced(oracle: Side, options: dict[str, Any]) -> bool:
    return not oracle.unreduced


def _has_gradients(oracle: Side, options: dict[str, Any]) -> bool:
    """Torch's own fused optimizers, and clip_grad_value_, want some."""
    return not oracle.unreduced and all(
        any(p.grad is not None for group in each.param_groups for p in group["params"])
        for each in oracle.optimizers
    )


def _is_late(oracle: Side, options: dict[str, Any]) -> bool:
    fresh = all(id(p) not in oracle.members for p in oracle.net.d.parameters())
    return fresh and not oracle.unreduced


def _has_saved(oracle: Side, options: dict[str, Any]) -> bool:
    if "saved" not in oracle.store or oracle.unreduced:
        return False
    groups = [len(each.param_groups) for each in oracle.optimizers]
    plain = 1 if oracle.setting.several else oracle.setting.groups
    if options["into"] == "plain":
        return all(each == plain for each in oracle.store["groups"])
    return bool(oracle.store["groups"] == groups)


def _draw_gradient(draw: Draw) -> dict[str, Any]:
    hows = ["None", "zero", "set", "half", "data half", "add", "copy", "row", "fill", "mz None"]
    return {"names": draw.names, "how": draw.one(*hows, "mz set", "full")}


def _draw_write(draw: Draw) -> dict[str, Any]:
    setting = draw.setting
    hows = ["gathered", "gathered some", "mz"]
    if not setting.shares and not setting.is_private:
        hows += ["in place", "data in place", "data", "vector", "init"]
    elif draw.often(0.05):
        hows = ["in place", "data in place", "data", "vector", "init"]
    return {"how": draw.one(*hows), "names": draw.names}


def _draw_load_plain(draw: Draw) -> dict[str, Any]:
    setting = draw.setting
    into = draw.one("model", "net") if not (setting.shares or setting.is_private) else "model"
    return {"into": into, "assign": into == "net" and draw.often(0.4)}


def _draw_clip(draw: Draw) -> dict[str, Any]:
    hows = ["norm", "norm", "norm", "largest", "value", "torch value", "torch value of groups"]
    if draw.setting.stage == 0:
        hows += ["torch norm"]
    elif draw.often(0.03):
        hows = ["torch norm", "torch norm of groups"]
    return {"how": draw.one(*hows), "bound": draw.one(0.02, 0.3)}


def _no_masters(setting: Setting) -> bool:
    return setting.precision is None


STEPS: dict[str, Kind] = {
    "train": Kind(draw_train, train, 8.0),
    "forward": Kind(
        lambda draw: {"grad": draw.often(0.5), "training": draw.often(0.5)}, _forward, 1.5
    ),
    "zero": Kind(
        lambda draw: {"of": draw.one("optimizers", "model", "net"), "to_none": draw.often(0.6)},
        _zero,
        3.0,
    ),
    "gradient": Kind(_draw_gradient, _gradient, 3.0, _reduced),
    "surgery": Kind(lambda draw: {"names": draw.names}, _surgery, 0.7, _reduced),
    "clip": Kind(_draw_clip, _clip, 2.0, _has_gradients),
    "step": Kind(
        lambda draw: {
            "which": draw.one(-1, -1, -1, 0, len(draw.optimizers) - 1),
            "zero": draw.one("", "optimizers", "model", "net"),
        },
        _step,
        7.0,
        _has_gradients,
    ),
    "closure": Kind(lambda draw: {"uses": draw.uses(True)}, _closure, 0.5, _reduced),
    "rate": Kind(lambda draw: {"how": draw.one("schedule", "set")}, _rate, 1.0),
    "freeze": Kind(
        lambda draw: {"layers": draw.layers, "train": draw.often(0.6)}, _freeze, 1.5, _reduced
    ),
    "add group": Kind(lambda draw: {}, _add_group, 1.5, _is_late, lambda setting: setting.late),
    "read": Kind(
        lambda draw: {
            "what": draw.one("model", "part", "parameters", "full", "norms", "copy", "state"),
            "names": draw.names,
        },
        _read,
        1.5,
    ),
    "write": Kind(_draw_write, _write, 1.5, _reduced),
    "load plain": Kind(_draw_load_plain, _load_plain, 0.7, _reduced),
    "save": Kind(lambda draw: {"how": draw.one("files", "states")}, _save, 0.8, _reduced),
    "load": Kind(lambda draw: {"into": draw.one("same", "same", "plain")}, _load, 1.2, _has_saved),
    "state": Kind(lambda draw: {"names": draw.names}, _optimizer_state, 0.7, _reduced),
    "ema": Kind(
        lambda draw: {"how": draw.one("update", "update", "average")},
        _ema,
        2.0,
        _reduced,
        lambda setting: setting.ema,
    ),
}


def draw_steps(draw: Draw, count: int) -> list[Step]:
    """A program's lines."""
    kinds = {name: kind for name, kind in STEPS.items() if kind.fits(draw.setting)}
    chosen = draw.rng.choices(list(kinds), [kind.often for kind in kinds.values()], k=count)
    return [Step(name, at, STEPS[name].draw(draw)) for at, name in enumerate(chosen)]


def random_of(seed: int) -> random.Random:
    """Where the choices of a program come from."""
    return random.Random(f"zero {seed}")
