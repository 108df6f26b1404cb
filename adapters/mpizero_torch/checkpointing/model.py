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
from mpizero_torch.wrapper import DistributedModule

PART = "model"


def plain_module(model: nn.Module) -> nn.Module:
    """The module that wrappers, ours and torch.compile's, wrap, or the model itself."""
    model = names.uncompiled(model)
    return names.uncompiled(model.module) if isinstance(model, DistributedModule) else model


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
    state = model.state if isinstance(model, ShardedModule) else None
    number = {id(parameter): at for at, (_, parameter) in enumerate(state.named)} if state else {}
    specs: list[TensorSpec] = []
    pieces: list[Piece] = []
    whole: dict[str, Any] = {}
    others: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    seen: dict[int, str] = {}
    name_of: dict[int, str] = {}  # of sharded parameters
    for name, value in _entries(model):
        if name in own:
            continue
        if not isinstance(value, torch.Tensor):
            others[name] = value
        elif id(value) in seen:
            aliases[name] = seen[id(value)]
        else:
            seen[id(value)] = name
            if state is not None and id(value) in number:
                name_of[number[id(value)]] = name
            else:
                whole[name] = value
    if isinstance(model, ShardedModule):
        model.follow("save()")
        _collect_sharded(model, name_of, specs, pieces)
    shared = axes.part_of(PART, whole)
    part = Part(PART, [*specs, *shared.specs], [*pieces, *shared.pieces], aliases)
    plain = {
        name: tree.encode(each, f"{PART}.{name}", arrays, as_array) for name, each in others.items()
    }
    found: dict[str, Any] = {"others": merged(axes.gather_stages(plain))}
    if isinstance(model, ShardedModule) and model.scaling is not None:
        found["loss_scale"] = model.scaling.state_dict()
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
) -> None:
    """Give a model what was saved, in place: each rank reads what it keeps, and talks to nobody.

    ``array`` reads those within modules' extra state; ``elsewhere`` are names that the other
    stages of a pipeline have; ``own``: what this rank had of its own (see ``own.py``).

    When all ranks have, a sharded model's parameters are to be ``settle``d.

    Raises ArgumentError for tensors that are missing, of another shape or (if ``strict``) too many.
    """
    specs = checkpoint.specs(PART)
    aliases = checkpoint.metadata(PART)
    found = checkpoint.values.get(PART, {})
    others = found.get("others", {})
    entries = dict(_entries(model))
    mine: Mapping[str, Any] = {} if own is None else own.model
    known = {*specs, *aliases, *others, *mine}
    missing = sorted(name for name in entries if name not in known)
    anywhere = {*entries, *elsewhere, "format"}
    unknown = sorted(name for name in known if name not in anywhere)
    if strict and (missing or unknown):
        raise ArgumentError(
            "load()", "model",
            f"one with {_some(missing) or 'no other names'} that the checkpoint has not, and "
            f"without {_some(unknown) or 'none'} that it has",
            "the model that was saved", "strict=False loads the names that both have.",
        )  # fmt: skip
    state = model.state if isinstance(model, ShardedModule) else None
    number = {id(parameter): at for at, (_, parameter) in enumerate(state.named)} if state else {}
    done: set[int] = set()
    with torch.no_grad():
        for name in mine.keys() & entries.keys():
            _check_shape(name, tuple(entries[name].shape), tuple(mine[name].shape))
            entries[name].copy_(mine[name])
        for name, value in entries.items():
            stored = name if name in specs else aliases.get(name, "")
            if not isinstance(value, torch.Tensor) or stored not in specs or id(value) in done:
                continue
            done.add(id(value))
            index = number.get(id(value))
            box = slices.box(value)
            _check_shape(name, box.shape, specs[stored].shape)
            if state is not None and index is not None:
                state.fill(index, reader(checkpoint, PART, stored, box))
            else:
                slices.local(value).copy_(read_own(checkpoint, PART, stored, box))
    extra = {
        name: tree.decode(each, array, tensors.as_tensor)
        for name, each in others.items()
        if name in entries
    }
    if extra:
        names.load_state_dict(plain_module(model), extra, strict=False)
    if isinstance(model, ShardedModule) and model.scaling is not None and "loss_scale" in found:
        model.scaling.load_state_dict(found["loss_scale"])


def as_array(value: Any) -> Any:
    """A tensor as a host array, for ``tree.encode``; None for what is no tensor."""
    if not isinstance(value, torch.Tensor):
        return None
    array = tensors.as_array(value)
    return array if isinstance(array, np.ndarray) else array.get()


def names_of(model: nn.Module) -> list[str]:
    """The names of all that a checkpoint has of a model."""
    return [name for name, _ in _entries(model)]


def _entries(model: nn.Module) -> Iterable[tuple[str, Any]]:
    found: Mapping[str, Any] = names.state_dict(plain_module(model), keep_vars=True)
    return found.items()


def _check_shape(name: str, own: tuple[int, ...], saved: tuple[int, ...]) -> None:
    if own != saved:
        raise ArgumentError("load()", f"model: {name}", f"of shape {own}", f"shape {saved}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
