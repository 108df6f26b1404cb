"""An optimizer in a checkpoint: its state under ``parameter name/state name``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError, World
from mpizero.checkpoint import Part, Piece, Readable, TensorSpec, shared_part, tree
from mpizero_torch import tensors
from mpizero_torch.checkpointing.model import as_array, plain_module, reader
from mpizero_torch.sharding import ShardedOptimizer
from mpizero_torch.sharding.optimizer_state import Stored, own_state

PART = "optimizer"


def optimizer_part(
    optimizer: torch.optim.Optimizer, model: nn.Module | None, world: World
) -> tuple[Part, dict[str, Any]]:
    """What this rank writes of an optimizer's state, and what of it is no tensor. Collective."""
    names = group_names(optimizer, model)
    specs: list[TensorSpec] = []
    pieces: list[Piece] = []
    whole: dict[str, Any] = {}
    others: dict[str, dict[str, Any]] = {}
    if isinstance(optimizer, ShardedOptimizer):
        _collect_sharded(optimizer, specs, pieces, others)
    else:
        of_parameter = [name for group in names for name in group]
        for number, state in optimizer.state_dict()["state"].items():
            others[of_parameter[number]] = dict(state)
    plain: dict[str, Any] = {}
    for name in sorted(others):
        plain[name] = {
            key: tree.encode(value, f"{name}/{key}", whole, as_array)
            for key, value in others[name].items()
        }
    groups = []
    for at, (group, own) in enumerate(zip(optimizer.param_groups, names, strict=True)):
        settings = {key: value for key, value in group.items() if key != "params"}
        encoded = tree.encode(settings, f"groups.{at}", whole, as_array)
        groups.append({"names": list(own), "settings": encoded})
    shared = shared_part(PART, whole, world)
    part = Part(PART, [*specs, *shared.specs], [*pieces, *shared.pieces])
    return part, {"groups": groups, "others": plain}


def load_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module | None, checkpoint: Readable
) -> None:
    """Give an optimizer what was saved; a sharded one reads its own part. Talks to nobody.

    Raises ArgumentError if its groups have other parameters.
    """
    saved = checkpoint.values[PART]
    own, theirs = group_names(optimizer, model), [each["names"] for each in saved["groups"]]
    if [sorted(each) for each in own] != [sorted(each) for each in theirs]:
        raise ArgumentError(
            "load()", "optimizer", f"one with groups {_short(own)}",
            f"groups of the parameters that were saved: {_short(theirs)}",
        )  # fmt: skip

    def array(name: str) -> Any:
        return checkpoint.read(PART, name)

    number = {name: at for at, name in enumerate(name for group in own for name in group)}
    state: dict[int, dict[str, Any]] = {}
    for name, others in saved["others"].items():
        decoded = tree.decode(others, array, tensors.as_tensor)
        state.setdefault(number[name], {}).update(decoded)
    sharded = isinstance(optimizer, ShardedOptimizer)
    for stored, spec in checkpoint.specs(PART).items():
        name, _, key = stored.rpartition("/")
        if name not in number or key in state.get(number[name], ()):
            continue  # a value of a group, or one of ``others``
        state.setdefault(number[name], {})[key] = (
            Stored(spec.shape, reader(checkpoint, PART, stored))
            if sharded
            else tensors.as_tensor(checkpoint.read(PART, stored))
        )
    at, groups = 0, []
    for group, names in zip(saved["groups"], own, strict=True):
        settings = tree.decode(group["settings"], array, tensors.as_tensor)
        groups.append({**settings, "params": list(range(at, at + len(names)))})
        at += len(names)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def group_names(
    optimizer: torch.optim.Optimizer, model: nn.Module | None
) -> Sequence[Sequence[str]]:
    """The names of each group's parameters, in order. Without a model, their numbers."""
    if isinstance(optimizer, ShardedOptimizer):
        return optimizer.names
    if model is None:
        counts = [len(group["params"]) for group in optimizer.param_groups]
        starts = [sum(counts[:at]) for at in range(len(counts))]
        return [
            [str(number) for number in range(start, start + count)]
            for start, count in zip(starts, counts, strict=True)
        ]
    known = {id(parameter): name for name, parameter in plain_module(model).named_parameters()}
    found = []
    for group in optimizer.param_groups:
        if any(id(parameter) not in known for parameter in group["params"]):
            raise ArgumentError(
                "save()", "optimizer", "one of parameters that are not the model's",
                "the model's optimizer",
            )  # fmt: skip
        found.append([known[id(parameter)] for parameter in group["params"]])
    return found


def _collect_sharded(
    optimizer: ShardedOptimizer,
    specs: list[TensorSpec],
    pieces: list[Piece],
    others: dict[str, dict[str, Any]],
) -> None:
    """This rank's pieces of sharded state, and what all ranks' state consists of."""
    state = optimizer.sharded_state
    tensors_here, others_here = own_state(optimizer.inner, optimizer.runs, state.group)
    names, shapes = [name for name, _ in state.named], state.shapes
    described = {
        key: (tensors.numpy_dtype(each[1].dtype), each[2], tuple(each[1].shape))
        for key, held in tensors_here.items()
        for each in held.values()
    }
    everyones = state.group.world.gather_objects((described, others_here))
    forms = {key: form for each, _ in everyones for key, form in each.items()}
    for (index, key), (dtype, sliced, shape) in sorted(forms.items()):
        own = shapes[index] if sliced else shape
        specs.append(TensorSpec(f"{names[index]}/{key}", dtype, own))
    for (index, key), held in sorted(tensors_here.items()):
        for start, (_, values, sliced) in sorted(held.items()):
            flat = tensors.as_array(values.contiguous().view(-1))
            pieces.append(Piece(f"{names[index]}/{key}", start if sliced else 0, flat))
    for _, each in everyones:
        for index, values in each.items():
            others.setdefault(names[index], {}).update(values)


def _short(groups: Sequence[Sequence[str]]) -> str:
    return "; ".join(
        f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names in groups
    )
