"""What is each rank's own of a model that is otherwise the same on all: experts, for instance.

Parameters and buffers that were left out of ``DistributedDataParallel`` may differ between ranks.
Where they do, each rank's are written, under its number, with what the optimizer knows of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError, World
from mpizero.checkpoint import Part, Piece, Readable, TensorSpec, tree
from mpizero_torch import names, tensors
from mpizero_torch.checkpointing.model import as_array, plain_module
from mpizero_torch.torch_members import TorchMembers

PART = "own"


@dataclass(frozen=True)
class Own:
    """Tensors by name, and of each the optimizer's state."""

    model: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    anywhere: frozenset[str] = frozenset()  # the names that this or another rank has as its own


def of(model: nn.Module | None, optimizer: Any, world: World) -> Own:
    """What this rank has of its own, of a model and its optimizer. Collective for such models."""
    if not isinstance(model, TorchMembers) or not model.parameters_to_ignore:
        return Own()
    entries = names.state_dict(plain_module(model), keep_vars=True)
    mine = {
        name: each
        for name, each in entries.items()
        if name in model.parameters_to_ignore and isinstance(each, torch.Tensor)
    }
    several = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    known = {p: each for one in several if one is not None for p, each in one.state.items()}
    states: dict[str, Any] = {name: dict(known.get(each, {})) for name, each in mine.items()}
    everyones = world.gather_objects({n: _mark(each, states[n]) for n, each in mine.items()})
    differing = {
        name for found in everyones for name, mark in found.items()
        if any(other.get(name) != mark for other in everyones)
    }  # fmt: skip
    return Own(
        {name: each for name, each in mine.items() if name in differing},
        {name: state for name, state in states.items() if name in differing and state},
        frozenset(differing),
    )


def part_of(own: Own, world: World) -> tuple[Part, list[Any]]:
    """This rank's tensors for a checkpoint, and what of all ranks' is none. Collective."""
    arrays: dict[str, Any] = {}
    plain = {
        "model": tree.encode(dict(own.model), f"{world.rank}.model", arrays, as_array),
        "optimizer": tree.encode(
            {name: dict(state) for name, state in own.optimizer.items()},
            f"{world.rank}.optimizer", arrays, as_array,
        ),
    }  # fmt: skip
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in arrays.items()]
    everyones = world.gather_objects((specs, plain))
    # A tensor that is not contiguous is copied in its own order.
    pieces = [Piece(name, 0, array.reshape(-1)) for name, array in arrays.items()]
    every = [spec for theirs, _ in everyones for spec in theirs]
    return Part(PART, every, pieces), [each for _, each in everyones]


def saved(checkpoint: Readable, model: nn.Module | None, world: World, strict: bool) -> Own:
    """What this rank had of its own. Raises ArgumentError if there were more ranks, or fewer."""
    everyones = checkpoint.values.get(PART)
    if not everyones or model is None:
        return Own()
    anywhere = frozenset(name for each in everyones for name in each["model"])
    if len(everyones) != world.size:
        if not strict:
            return Own(anywhere=anywhere)
        raise ArgumentError(
            "load()", "model", f"one on {world.size} ranks",
            f"{len(everyones)} ranks, each of which has saved its own '{min(anywhere)}'",
            "strict=False loads what all ranks have in common.",
        )  # fmt: skip
    array: Callable[[str], Any] = lambda name: checkpoint.read(PART, name)  # noqa: E731
    mine = tree.decode(everyones[world.rank], array, tensors.as_tensor)
    return Own(mine["model"], mine["optimizer"], anywhere)


def _mark(tensor: torch.Tensor, state: Mapping[str, Any]) -> str:
    """A short form of a tensor and of an optimizer's state of it: equal if these are."""
    found = hashlib.blake2b(digest_size=16)
    for key, value in [("", tensor), *sorted(state.items())]:
        found.update(f"{key}: {getattr(value, 'dtype', '')} {getattr(value, 'shape', '')}".encode())
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            octets: Any = flat.view(torch.uint8).numpy()
            found.update(octets)
        else:
            found.update(repr(value).encode())
    return found.hexdigest()
