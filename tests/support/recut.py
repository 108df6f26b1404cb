"""Checkpoints cut anew: a small run with all that is awkward, saved and loaded by any ranks.

What a run is made of is recorded as plain torch has it, so that runs can be compared bit for bit.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model
from torch import nn
from torch.nn import functional

import mpizero_torch as mz
from mpizero import World

TOKENS, WIDTH = 11, 6
SAMPLES = 840  # the smallest batch that 1 to 8 ranks share equally
STEPS = 2  # before a save

# Segments of about 100 bytes: every matrix is cut into several, and ends within one.
SEGMENT_MB = 1e-4

# A run's state by name: the model's and the optimizer's tensors, and what else there is.
Record = dict[str, Any]


class Awkward(nn.Module):
    """A tied parameter, an empty one, a scalar, two dtypes, buffers that change, and few numbers.

    What a forward does to the buffers does not depend on the batch, and so not on the rank.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH, dtype=dtype)
        self.mix = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.gain = nn.Parameter(torch.rand(WIDTH))
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=dtype))
        self.nothing = nn.Parameter(torch.zeros(0, 3, dtype=dtype))
        self.head = nn.Linear(WIDTH, TOKENS, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("drift", torch.zeros(3, dtype=dtype))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        self.drift.mul_(0.5).add_(self.scale.detach())
        hidden = torch.tanh(self.mix(self.embed(tokens)) * self.gain)
        logits: torch.Tensor = self.head(hidden.to(self.head.weight.dtype)) * self.scale
        return logits + self.nothing.sum()


@dataclass(frozen=True)
class Way:
    """How a run is spread: the stage, and what ``mz.zero`` does from stage 1 on."""

    stage: int
    shared: bool | None = True
    partition: str = "flat"
    precision: str | None = None
    shard_group: str | int = "world"

    def __str__(self) -> str:
        if not self.stage:
            return "stage 0"
        kind = "shared" if self.shared else "private"
        return f"stage {self.stage} {kind} {self.partition}"


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.01, amsgrad=True)


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


Make = Callable[[Any], torch.optim.Optimizer]


def plain(make: Make, seed: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """The run in one process: two groups, not in the order of the parameters."""
    torch.manual_seed(seed)
    model = Awkward(dtype)
    few = [model.scale, model.nothing, model.mix.bias, model.gain]
    many = [model.embed.weight, model.mix.weight]
    groups = [{"params": few, "weight_decay": 0.0}, {"params": many, "lr": 0.02}]
    return model, make(groups)


def spread(
    way: Way, world: World, make: Make, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Any, Any]:
    """The same run on the ranks of a world. Collective."""
    model, optimizer = plain(make, seed, dtype)
    if not way.stage:
        return mz.DistributedDataParallel(model, world=world), optimizer
    return mz.zero(
        model, optimizer, way.stage, world=world, share_parameters=way.shared,
        partition=way.partition, precision=way.precision, segment_mb=SEGMENT_MB,
        shard_group=way.shard_group,
    )  # fmt: skip


def train(model: Any, optimizer: Any, seed: int, rank: int = 0, ranks: int = 1) -> None:
    """One step; each rank takes its part of a batch that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(0, TOKENS, (2, SAMPLES), generator=generator)
    own = slice(SAMPLES // ranks * rank, SAMPLES // ranks * (rank + 1))
    optimizer.zero_grad()
    functional.cross_entropy(model(tokens[own]), targets[own]).backward()
    optimizer.step()


def record(model: Any, optimizer: Any) -> Record:
    """A run's whole state, as the plain one has it. Collective; nothing in it changes later.

    Without the optimizer's state for parameters of no elements: shards have none of it.
    """
    found: Record = {f"model: {name}": value for name, value in model.state_dict().items()}
    state = optimizer.state_dict()
    for number, values in state["state"].items():
        if number != 1:  # ``nothing``
            found.update({f"optimizer: {number}/{key}": each for key, each in values.items()})
    found["groups"] = state["param_groups"]
    return copy.deepcopy(found)


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Record) -> None:
    """Give a plain run what was recorded, by torch's own means."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in saved.items():
        if name.startswith("optimizer: "):
            number, key = name.removeprefix("optimizer: ").split("/")
            state.setdefault(int(number), {})[key] = value
    model.load_state_dict(
        {name.removeprefix("model: "): v for name, v in saved.items() if name.startswith("model: ")}
    )
    optimizer.load_state_dict(copy.deepcopy({"state": state, "param_groups": saved["groups"]}))


def next_step(saved: Record, make: Make, seed: int, dtype: torch.dtype = torch.float64) -> Record:
    """What the run in one process is after one more step."""
    model, optimizer = plain(make, 0, dtype)
    restore(model, optimizer, saved)
    train(model, optimizer, seed)
    return record(model, optimizer)


def differences(found: Record, expected: Record) -> list[str]:
    """The names of what is not the same, bit for bit."""
    return [name for name in {**found, **expected} if not _same_bits(found, expected, name)]


def far_apart(found: Record, expected: Record) -> list[str]:
    """The names of what differs by more than sums in another order explain.

    A gradient is a mean of 840 terms below 1: rounding leaves about 1e-15 of it in float64 and 1e-7
    in float32 (``gain``). Adam divides by the gradient's own size, which here is rarely below 1e-4,
    and multiplies by 0.02. So 1e-10 and 1e-4 of a parameter that is off are far more than rounding,
    and far less than the step, which is 1e-2.
    """
    wrong = []
    for name in {**found, **expected}:
        one, other = found.get(name), expected.get(name)
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            tolerance = 1e-10 if one.dtype == torch.float64 else 1e-4
            same = one.shape == other.shape and one.dtype == other.dtype
            if not same or not torch.allclose(one, other, rtol=tolerance, atol=tolerance):
                wrong.append(name)
        elif one != other:
            wrong.append(name)
    return wrong


def _same_bits(found: Record, expected: Record, name: str) -> bool:
    one, other = found.get(name), expected.get(name)
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits = [each.reshape(-1).view(torch.uint8) for each in (one, other)]
    return torch.equal(*bits)


@contextmanager
def part_of(world: World, ranks: Iterable[int]) -> Iterator[World | None]:
    """A world of these ranks; None on the others. Collective."""
    part = world.split(0 if world.rank in ranks else None)
    try:
        yield part
    finally:
        if part is not None:
            part.close()


def save(path: Path, way: Way, world: World, make: Make, seed: int, **options: Any) -> Record:
    """Train on the ranks of ``world`` and save; returns what was saved. Collective."""
    model, optimizer = spread(way, world, make, seed)
    for step in range(STEPS):
        train(model, optimizer, seed + step, world.rank, world.size)
    mz.save(path, model=model, optimizer=optimizer, world=world, **options)
    return record(model, optimizer)


def loaded(
    path: Path, model: Any, optimizer: Any, world: World, saved: Record, after: Record, seed: int
) -> list[str]:
    """Load, train one step; what is not as it must be. Collective."""
    mz.load(path, model=model, optimizer=optimizer, world=world)
    wrong = [f"loaded {name}" for name in differences(record(model, optimizer), saved)]
    train(model, optimizer, seed, world.rank, world.size)
    return wrong + [f"trained {name}" for name in far_apart(record(model, optimizer), after)]


def loaded_alone(
    path: Path, world: World, make: Make, saved: Record, after: Record, seed: int
) -> list[str]:
    """The same in a process of its own, without a wrapper; and by safetensors' own readers."""
    model, optimizer = plain(make, 0, torch.float64)
    wrong = loaded(path, model, optimizer, world, saved, after, seed)
    weights = {name: v for name, v in saved.items() if name.startswith("model: ")}
    for strict in (False, True):
        model, _ = plain(make, 0, torch.float64)
        if strict:  # it looks for the names of tied parameters in the header
            load_model(model, path / "model.safetensors", strict=True)
        else:
            left = model.load_state_dict(load_file(path / "model.safetensors"), strict=False)
            if left.missing_keys != ["head.weight"] or left.unexpected_keys:
                wrong.append(f"names {left}")
        found = {f"model: {name}": value for name, value in model.state_dict().items()}
        wrong += [f"read {name}" for name in differences(found, weights)]
    return wrong


def every_pair(
    folder: Path, world: World, ways: Sequence[Way], make: Make = adamw, thin: int = 1
) -> list[str]:
    """Save by 1, 2, ... ranks in each way, and load each by 1, 2, ... ranks in each. Collective.

    With ``thin`` every rank count still meets every other, and every way every other, but only one
    of so many pairs is tried.

    Returns what is wrong, of all ranks. A run that loads has before loaded another, so that what
    is not overwritten is noticed.
    """
    counts = range(1, world.size + 1)
    saves = list(itertools.product(counts, ways))
    paths = [folder / f"by {n}, {way}" for n, way in saves]
    records: list[Record] = []
    for n in counts:
        with part_of(world, range(n)) as savers:
            for at, (count, way) in enumerate(saves):
                if count == n:
                    found = save(paths[at], way, savers, make, 10 * at) if savers else None
                    records.append(world.broadcast_object(found))
    own = {at: next_step(records[at], make, at) for at in range(world.rank, len(saves), world.size)}
    afters = {at: each for part in world.gather_objects(own) for at, each in part.items()}

    wrong: list[str] = []
    alone = world.split(world.rank)
    assert alone is not None
    for at in range(world.rank, len(saves), world.size):
        wrong += [
            f"{paths[at].name}; in one process: {each}"
            for each in loaded_alone(paths[at], alone, make, records[at], afters[at], at)
        ]
    alone.close()
    for m in counts:
        with part_of(world, range(world.size - m, world.size)) as loaders:
            if loaders is not None:
                for number, way in enumerate(ways):
                    model, optimizer = spread(way, loaders, make, 1)
                    for at, path in enumerate(paths):
                        if (at + saves[at][0] + m + number) % thin:
                            continue
                        wrong += [
                            f"{path.name}; by {m}, {way}: {each}"
                            for each in loaded(
                                path, model, optimizer, loaders, records[at], afters[at], at
                            )
                        ]
    return [each for part in world.gather_objects(wrong) for each in part]
