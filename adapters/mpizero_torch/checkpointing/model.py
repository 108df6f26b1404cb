"""A model in a checkpoint: its parameters and buffers under its own names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from mpizero import ArgumentError
from mpizero.checkpoint import Part, Piece, Readable, TensorSpec, tree
from mpizero_torch import names, slices, tensors
from mpizero_torch.checkpointing.axes import Axes, merged, read_own, reader, strips
from mpizero_torch.sharding import ShardedModule
from mpizero_torch.sharding.model_state import ungathered
from mpizero_torch.wrapper import DistributedModule

PART = "model"


def plain_module(model: nn.Module) -> nn.Module:
    """The module that wrappers, ours and torch.compile's, wrap, or the model itself."""
    model = names.uncompiled(model)
    return names.uncompiled(model.module) if isinstance(model, DistributedModule) else model


def sharded_parts(model: nn.Module | None) -> list[ShardedModule]:
    """The sharded modules in a model: itself, or what a bigger one has of them."""
    if model is None:
        return []
    return [each for each in names.uncompiled(model).modules() if isinstance(each, ShardedModule)]


def sharded_parameters(model: nn.Module) -> dict[int, tuple[ShardedModule, int]]:
    """Whose they are, and their numbers there, by their id."""
    return {
        id(parameter): (part, at)
        for part in sharded_parts(model)
        for at, (_, parameter) in enumerate(part.state.named)
    }


def model_part(
    model: nn.Module, axes: Axes, arrays: dict[str, Any], own: Collection[str] = ()
) -> tuple[Part, dict[str, Any]]:
    """What this rank writes of a model, and what of it is no tensor. Collective.

    Without what is each rank's ``own``, which is in a part of its own.

    Arrays within modules' extra state go to ``arrays``: the model's files have tensors only that
    the plain module has.

    Sharded parameters are written by those who have them, with ``precision`` as the float32 values
    that are trained. Tied ones are written once; the other names are in the files' headers, where
    safetensors' own ``load_model`` looks for them.
    """
    sharded = sharded_parameters(model)
    specs: list[TensorSpec] = []
    pieces: list[Piece] = []
    whole: dict[str, Any] = {}
    others: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    seen: dict[int, str] = {}
    name_of: dict[ShardedModule, dict[int, str]] = {part: {} for part in sharded_parts(model)}
    for name, value in entries(model):
        if name in own:
            continue
        if not isinstance(value, torch.Tensor):
            others[name] = value
        elif id(value) in seen:
            aliases[name] = seen[id(value)]
        else:
            seen[id(value)] = name
            if id(value) in sharded:
                part_of_it, number = sharded[id(value)]
                name_of[part_of_it][number] = name
            else:
                whole[name] = value
    for each, own_names in name_of.items():
        each.follow("save()")
        _collect_sharded(each, own_names, specs, pieces)
    shared = axes.part_of(PART, whole)
    part = Part(PART, [*specs, *shared.specs], [*pieces, *shared.pieces], aliases)
    plain = {
        name: tree.encode(each, f"{PART}.{name}", arrays, as_array) for name, each in others.items()
    }
    found: dict[str, Any] = {"others": merged(axes.gather_stages(plain))}
    for scaling in _scalings(model):
        found["loss_scale"] = scaling.state_dict()
    return axes.all_stages(part), found


def _collect_sharded(
    model: ShardedModule,
    name_of: Mapping[int, str],
    specs: list[TensorSpec],
    pieces: list[Piece],
) -> None:
    """The sharded parameters, and this rank's pieces of those for which it speaks."""
    state = model.state
    boxes = [slices.box(parameter) for _, parameter in state.named]
    for index, name in name_of.items():
        dtype = tensors.numpy_dtype(state.trained_dtype(index))
        specs.append(TensorSpec(name, dtype, boxes[index].shape))
    counts = model.counts
    for index, elements, values in state.pieces() if state.group.is_holder else ():
        if index in name_of and counts[index]:
            pieces += strips(Piece(name_of[index], elements.start, values), boxes[index])


def load_model(
    model: nn.Module,
    checkpoint: Readable,
    array: Callable[[str], Any],
    strict: bool,
    elsewhere: Iterable[str] = (),
    own: Any = None,
) -> tuple[list[str], list[str]]:
    """Give a model what was saved, in place: each rank reads what it keeps, and talks to nobody.

    Returns the names that the checkpoint lacks, and those that the model lacks.

    ``array`` reads those within modules' extra state; ``elsewhere`` are names that the other
    stages of a pipeline have; ``own``: what this rank had of its own (see ``own.py``).

    When all ranks have, a sharded model's parameters are to be ``settle``d.

    Raises ArgumentError for tensors of another shape, if there is not one name in common, and, if
    ``strict``, for those that are missing or too many.
    """
    specs = checkpoint.specs(PART)
    aliases = checkpoint.metadata(PART)
    found = checkpoint.values.get(PART, {})
    others = found.get("others", {})
    held = dict(entries(model))
    mine: Mapping[str, Any] = {} if own is None else own.model
    known = {*specs, *aliases, *others, *mine}
    missing = sorted(name for name in held if name not in known)
    known.discard("format")
    anywhere = {*held, *elsewhere}
    unknown = sorted(name for name in known if name not in anywhere)
    if strict and (missing or unknown):
        raise ArgumentError(
            "load()", "model",
            f"one with {some(missing) or 'no other names'} that the checkpoint has not, and "
            f"without {some(unknown) or 'none'} that it has",
            "the model that was saved", "strict=False loads the names that both have; rename= "
            "gives the checkpoint's other names.",
        )  # fmt: skip
    if held and not any(name in anywhere for name in known):
        raise ArgumentError(
            "load()", "model",
            f"one with {some(list(held))}, of which the checkpoint has not one; it has "
            f"{some(sorted(known))}",
            "a model that has names in common with what was saved",
            "Give the checkpoint's other names by rename=, a function of a name.",
        )  # fmt: skip
    sharded = sharded_parameters(model)
    done: set[int] = set()
    with torch.no_grad():
        for name in mine.keys() & held.keys():
            _check_shape(name, tuple(held[name].shape), tuple(mine[name].shape))
            held[name].copy_(mine[name])
        for name, value in held.items():
            stored = name if name in specs else aliases.get(name, "")
            if not isinstance(value, torch.Tensor) or stored not in specs or id(value) in done:
                continue
            done.add(id(value))
            box = slices.box(value)
            _check_shape(name, box.shape, specs[stored].shape)
            if id(value) in sharded:
                part, index = sharded[id(value)]
                part.state.fill(index, reader(checkpoint, PART, stored, box))
            else:
                slices.local(value).copy_(read_own(checkpoint, PART, stored, box))
    extra = {
        name: tree.decode(each, array, tensors.as_tensor)
        for name, each in others.items()
        if name in held
    }
    if extra:
        names.load_state_dict(plain_module(model), extra, strict=False)
    for scaling in _scalings(model) if "loss_scale" in found else ():
        scaling.load_state_dict(found["loss_scale"])
    return missing, unknown


def as_array(value: Any) -> Any:
    """A tensor as a host array, for ``tree.encode``; None for what is no tensor."""
    if not isinstance(value, torch.Tensor):
        return None
    array = tensors.as_array(value)
    return array if isinstance(array, np.ndarray) else array.get()


def names_of(model: nn.Module) -> list[str]:
    """The names of all that a checkpoint has of a model."""
    return [name for name, _ in entries(model)]


def _scalings(model: nn.Module) -> list[Any]:
    """The loss scales of its sharded parts, under float16."""
    return [part.scaling for part in sharded_parts(model) if part.scaling is not None]


def entries(model: nn.Module) -> Iterable[tuple[str, Any]]:
    """All that a state_dict has of a model: the parameters and buffers themselves."""
    with ungathered():
        found: Mapping[str, Any] = names.state_dict(plain_module(model), keep_vars=True)
    return found.items()


def _check_shape(name: str, own: tuple[int, ...], saved: tuple[int, ...]) -> None:
    if own != saved:
        raise ArgumentError(
            "load()", f"model: {name}", f"of shape {own}", f"shape {saved}",
            "With strict=False, rename= may return None for what is to be left out.",
        )  # fmt: skip


def some(names: list[str]) -> str:
    """The first of some names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
