"""One side of a random program: a rank's modules, wrapped or plain, and what it says of passes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from support.reference import seeded

LAYERS = "abc"


@dataclass
class Held:
    """An output in a dataclass."""

    out: torch.Tensor


class Slotted:
    """An output in an object with slots."""

    __slots__ = ("out",)

    def __init__(self, out: torch.Tensor) -> None:
        self.out = out


FORMS: dict[str, Any] = {
    "tensor": lambda x: x,
    "dict": lambda x: {"out": x},
    "dataclass": Held,
    "object": lambda x: SimpleNamespace(out=x),
    "slots": Slotted,
    "closure": lambda x: lambda: x,  # nobody can see into it
}


def taken(output: Any) -> torch.Tensor:
    """The tensor in an output of any of the FORMS."""
    if isinstance(output, dict):
        output = output["out"]
    elif hasattr(output, "out"):
        output = output.out
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output()
    return found


@dataclass(frozen=True)
class Shape:
    """What a module of a program is like."""

    conv: bool = False
    norm: bool = False
    count: bool = False  # a buffer that is written through .data

    def __str__(self) -> str:
        on = [name for name in ("conv", "norm", "count") if getattr(self, name)]
        return "+".join(on) or "linear"


class Net(nn.Module):
    """Layers a, b, c; ``forward`` takes those to use, how to checkpoint, and how to return."""

    seen: torch.Tensor

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.shape = shape
        for name in LAYERS:
            layer = nn.Conv2d(4, 4, 3, padding=1) if shape.conv else nn.Linear(4, 4)
            setattr(self, name, layer)
        if shape.norm:
            self.norm = nn.BatchNorm2d(4) if shape.conv else nn.BatchNorm1d(4)
        if shape.count:
            self.register_buffer("seen", torch.zeros(4, 1, 1) if shape.conv else torch.zeros(4))
        self.double()

    def forward(
        self, x: torch.Tensor, use: str = LAYERS, again: bool | None = None, form: str = "tensor"
    ) -> Any:
        if not use:
            x = x * 1.0
        for name in use:
            if again is None:
                x = self._layer(x, name)
            else:
                x = checkpoint(self._layer, x, name, use_reentrant=again)
        return FORMS[form](x)

    def _layer(self, x: torch.Tensor, name: str) -> torch.Tensor:
        x = getattr(self, name)(x)
        if name == "b" and self.shape.norm:
            x = self.norm(x)
        if name == "c" and self.shape.count:
            if self.training:
                self.seen.data.mul_(0.9).add_(x.detach().mean())
            x = x + self.seen * 0.1
        return torch.tanh(x)


@dataclass
class Side:
    """One rank's part of a program: its modules, wrapped or plain, and what it has kept."""

    rank: int
    size: int
    models: list[Any]
    real: bool
    optimizers: list[Any] = field(default_factory=list)  # None: steps are taken in backward
    kept: list[torch.Tensor] = field(default_factory=list)
    results: list[torch.Tensor] = field(default_factory=list)
    store: dict[str, Any] = field(default_factory=dict)

    @property
    def inner(self) -> list[Net]:
        return [getattr(model, "module", model) if self.real else model for model in self.models]

    @property
    def hooked(self) -> bool:
        """Are the optimizer's steps taken in backward?"""
        return None in self.optimizers

    def step(self, model: int) -> None:
        """The optimizer's, which torch's fused ones refuse where there is no gradient."""
        if any(parameter.grad is not None for parameter in self.parameters(model)):
            self.optimizers[model].step()

    def parameters(self, model: int) -> list[nn.Parameter]:
        return list(self.inner[model].parameters())

    def batch(self, number: int, need: bool = False) -> torch.Tensor:
        """This rank's inputs: they depend on the number and the rank alone."""
        net = self.inner[0]
        shape = (3, 4, 2, 2) if net.shape.conv else (3, 4)
        made = seeded(number * 64 + self.rank, *shape).to(self.parameters(0)[0].dtype)
        return made.requires_grad_(need)

    @contextmanager
    def passing(self, chain: Sequence[int], sync: bool) -> Iterator[None]:
        """Around a backward pass: does it average?"""
        with ExitStack() as stack:
            if self.real and not sync:
                for model in chain:
                    stack.enter_context(self.models[model].no_sync())
            yield

    def weigh(self, chain: Sequence[int], weight: float | None) -> None:
        """State the weight of the next pass."""
        if self.real and weight is not None:
            for model in chain:
                self.models[model].weigh(weight)


@dataclass(frozen=True)
class Before:
    """A backward pass through these models comes."""

    chain: tuple[int, ...]
    weight: float | None = None


@dataclass(frozen=True)
class After:
    """It has come. ``full``: all gradients were computed, not those of some inputs alone."""

    chain: tuple[int, ...]
    sync: bool = True
    full: bool = True


@dataclass(frozen=True)
class Joined:
    """In a ``join`` each rank has done so many steps; ``passes(step)`` gives its losses."""

    model: int
    steps: tuple[int, ...]
    passes: Any


@dataclass(frozen=True)
class Saved:
    """All ranks have loaded what they had saved."""

    model: int


def clone(nets: Sequence[Net]) -> list[Any]:
    """Plain copies."""
    return [copy.deepcopy(net) for net in nets]
