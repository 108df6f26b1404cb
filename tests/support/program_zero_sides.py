"""The two sides of a random program about ZeRO: all ranks' model, and one process's."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mpizero_torch as mz
from support.program_sides import FORMS, taken
from support.reference import seeded

LAYERS = "abcdep"
_SAMPLES = 2  # of each rank


@dataclass(frozen=True)
class Setting:
    """What a program is about: the model, its optimizers, and how they are wrapped."""

    stage: int
    share: bool | None
    nodes: str  # the node of each rank
    progress: str
    partition: str
    segment_mb: float
    shard_group: str | int
    optimizer: str
    groups: int
    several: bool  # optimizers
    late: bool  # layers that are frozen, and in no group, at first
    tied: bool
    norm: bool
    dtype: str
    precision: str | None
    compare: str  # "each", "some", "end"
    compiled: bool
    ema: bool

    @property
    def is_private(self) -> bool:
        """Do parameters come and go?"""
        return self.stage == 3 and not self.shares

    @property
    def shares(self) -> bool:
        """Do ranks hold one copy of the parameters between them?"""
        return self.stage > 0 and self.share is not False

    @property
    def same_everywhere(self) -> bool:
        """Must all ranks come to the same modules?"""
        return self.norm or (self.is_private and len(set(self.nodes)) > 1)

    def __str__(self) -> str:
        plain = {"share": None, "groups": 1, "shard_group": "world", "precision": None}
        said = [
            f"{key}={value!r}"
            for key, value in vars(self).items()
            if value is not False or key == "share"
            if key not in plain or value != plain[key]
        ]
        return ", ".join(said)


class Prompt(nn.Module):
    """A module that returns a view of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4) * 0.3)

    def forward(self, rows: slice) -> torch.Tensor:
        return self.table[rows]


class Net(nn.Module):
    """Layers of some kinds, of which ``forward`` takes those to use."""

    def __init__(self, tied: bool, norm: bool) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.scale = nn.Parameter(1 + torch.randn(4) * 0.1)
        self.gate = nn.Parameter(torch.tensor(0.8))
        self.a = nn.Linear(4, 4)
        self.b = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4, bias=False))
        self.c = nn.Linear(4, 4)
        self.d = nn.Linear(4, 4)
        self.e = nn.LayerNorm(4)
        self.p = Prompt()
        self.norm = nn.BatchNorm1d(4) if norm else None
        if tied:
            self.c.weight = self.a.weight

    def forward(
        self, x: torch.Tensor, use: str = LAYERS, again: bool | None = None, form: str = "tensor"
    ) -> Any:
        x = x * self.scale
        for name in use:
            if again is None:
                x = self._layer(x, name)
            else:
                x = checkpoint(self._layer, x, name, use_reentrant=again)
        return FORMS[form](x)

    def _layer(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if name == "p":
            return x + self.p(slice(1, 2))
        x = x + torch.tanh(getattr(self, name)(x))
        if name == "a" and self.norm is not None:
            x = self.norm(x)
        return x * self.gate if name == "c" else x


def make_optimizer(name: str, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """By its name in a Setting. Of eps no less than what rounding makes of a gradient that is 0."""
    kind, _, how = name.partition(" ")
    options: dict[str, Any] = {how: True} if how in ("foreach", "fused") else {}
    if kind == "SGD":
        momentum = {"momentum": 0.9} if how == "momentum" else {}
        return torch.optim.SGD(groups, lr=0.05, **momentum, **options)
    if kind == "Adafactor":
        return torch.optim.Adafactor(groups, lr=0.01, eps=(1e-3, 1e-3))
    made: Any = getattr(torch.optim, kind)
    return made(groups, lr=0.01, eps=1e-3, **options)  # type: ignore[no-any-return]


def make_optimizers(setting: Setting, net: Net) -> list[torch.optim.Optimizer]:
    """Those of a setting, of the layers that are not late."""
    own = [p for name, p in net.named_parameters() if not (setting.late and name[0] in "d")]
    if setting.several:
        parts = [[p for p in own if p.dim() == 2], [p for p in own if p.dim() != 2]]
        names = [setting.optimizer, "SGD momentum"]
        return [
            make_optimizer(name, [{"params": part}])
            for name, part in zip(names, parts, strict=True)
        ]
    if setting.groups == 2:
        parts = [own[::2], own[1::2]]
        decays = {"weight_decay": 0.1}
        return [
            make_optimizer(
                setting.optimizer, [{"params": parts[0]}, {"params": parts[1], **decays}]
            )
        ]
    return [make_optimizer(setting.optimizer, [{"params": own}])]


@dataclass
class Side:
    """A program's model, wrapped or plain, and what it has given so far."""

    setting: Setting
    rank: int
    size: int
    real: bool
    net: Net
    model: Any  # what forwards go through
    wrapped: Any
    optimizers: list[Any]
    schedulers: list[Any]
    folder: str
    world: Any
    ema: Any = None
    unreduced: bool = False  # have gradients been accumulated that are not averaged?
    results: list[tuple[str, Any]] = field(default_factory=list)
    store: dict[str, Any] = field(default_factory=dict)

    @property
    def named(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.net.named_parameters())

    def chosen(self, names: Sequence[str]) -> list[tuple[str, nn.Parameter]]:
        """The parameters of these names."""
        return [(name, p) for name, p in self.named if name in names]

    @property
    def members(self) -> set[int]:
        """The ids of the parameters in groups of the oracle's optimizers."""
        return {
            id(p)
            for each in self.optimizers
            for group in each.param_groups
            for p in group["params"]
        }

    @property
    def has_gradients(self) -> bool:
        return any(p.grad is not None for _, p in self.named)

    def result(self, label: str, value: Any) -> None:
        """Note something that both sides must have."""
        self.results.append((label, value))

    def part(self, number: int, rank: int) -> torch.Tensor:
        """The inputs of a rank."""
        made = seeded(number * 64 + rank, _SAMPLES, 4)
        return made.to(torch.float32 if self.setting.dtype == "float32" else torch.float64)

    def batches(self, number: int, need: bool = False) -> list[tuple[int, torch.Tensor]]:
        """What this side computes a loss of: its rank's part, or each by itself, or all."""
        if self.real:
            found = [(self.rank, self.part(number, self.rank))]
        else:
            parts = [self.part(number, rank) for rank in range(self.size)]
            found = [(0, torch.cat(parts))] if self.setting.norm else list(enumerate(parts))
        return [(rank, x.requires_grad_(need)) for rank, x in found]

    def outputs(
        self, number: int, uses: Sequence[str], need: bool = False, **options: Any
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(input, output) of each batch."""
        return [
            (x, taken(self.model(x, uses[rank], **options)))
            for rank, x in self.batches(number, need)
        ]

    def mine(self, of_each: Sequence[torch.Tensor]) -> torch.Tensor:
        """This rank's part of what was computed for each batch, one sample after the other."""
        if self.real:
            return of_each[0]
        whole = torch.cat(list(of_each))
        return whole[self.rank * _SAMPLES : (self.rank + 1) * _SAMPLES]

    @contextmanager
    def passing(self, sync: bool) -> Iterator[None]:
        """Around a backward pass: does it average?"""
        if self.real and not sync:
            with self.wrapped.no_sync():
                yield
        else:
            yield
        self.unreduced = not sync


def make_sides(setting: Setting, world: Any, folder: str) -> tuple[Side, Side]:
    """(all ranks', one process's)."""
    plain = Net(setting.tied, setting.norm).to(getattr(torch, setting.dtype))
    if setting.late:
        plain.d.requires_grad_(False)
    net = copy.deepcopy(plain)
    if setting.norm:
        net = mz.SyncBatchNorm.convert_sync_batchnorm(net)
    own, its = make_optimizers(setting, net), make_optimizers(setting, plain)
    options: dict[str, Any] = {}
    if setting.stage:
        precision: Any = setting.precision
        if precision == "fp16":
            precision = mz.MixedPrecision("fp16", initial_scale=64.0)
        options = {
            "share_parameters": setting.share, "partition": setting.partition,
            "segment_mb": setting.segment_mb, "shard_group": setting.shard_group,
            "precision": precision,
        }  # fmt: skip
    given: Any = own if setting.several else own[0]
    wrapped, made = mz.zero(net, given, setting.stage, world=world, **options)
    optimizers = list(made) if setting.several else [made]
    called: list[Any] = [wrapped, plain]
    if setting.compiled:
        called[0] = torch.compile(wrapped, backend="eager")
    sides = [
        Side(
            setting, world.rank, world.size, real, inner, called[not real],
            wrapped if real else plain, each,
            [torch.optim.lr_scheduler.ExponentialLR(one, 0.8) for one in each], folder, world,
        )
        for real, inner, each in ((True, net, optimizers), (False, plain, its))
    ]  # fmt: skip
    if setting.ema:
        sides[0].ema = mz.EMA(wrapped, 0.5)
        sides[1].ema = {name: p.detach().clone() for name, p in sides[1].named}
    return sides[0], sides[1]
