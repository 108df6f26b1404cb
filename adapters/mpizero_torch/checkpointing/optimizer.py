"""An optimizer in a checkpoint: its state under ``parameter name/state name``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError
from mpizero.checkpoint import Box, Part, Piece, Readable, TensorSpec, tree
from mpizero_torch import slices, tensors
from mpizero_torch.checkpointing.axes import Axes, merged, read_own, reader, strips
from mpizero_torch.checkpointing.model import as_array, plain_module
from mpizero_torch.names import named_parameters
from mpizero_torch.sharding import ShardedOptimizer
from mpizero_torch.sharding.optimizer_state import Stored, own_state
from mpizero_torch.sharding.optimizer_state import merged as merged_others

PART = "optimizer"


def by_part(optimizer: Any) -> dict[str, Any]:
    """Each optimizer of a list, or the one that there is, by the name of its part."""
    if optimizer is None:
        return {}
    several = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    return {f"{PART}{at + 1}" if at else PART: each for at, each in enumerate(several)}


def optimizer_part(
    name: str,
    optimizer: torch.optim.Optimizer,
    model: nn.Module | None,
    axes: Axes,
    own: Collection[str] = (),
) -> tuple[Part, dict[str, Any]]:
    """What this rank writes of an optimizer's state, and what of it is no tensor. Collective.

    ``name``: of the part. Without the state of what is each rank's ``own``, which is in another.
    """
    names = group_names(optimizer, model)
    part_name = name
    specs: list[TensorSpec] = []
    pieces: list[Piece] = []
    whole: dict[str, Any] = {}
    others: dict[str, dict[str, Any]] = {}
    if isinstance(optimizer, ShardedOptimizer):
        _collect_sharded(optimizer, specs, pieces, others)
    else:
        of_parameter = [name for group in names for name in group]
        for number, state in optimizer.state_dict()["state"].items():
            name = of_parameter[number]
            if name in own:
                continue
            others[name] = {}
            for key, value in state.items():
                cut = slices.is_slice(value)
                (whole if cut else others[name])[f"{name}/{key}" if cut else key] = value
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
    shared = axes.part_of(part_name, whole)
    part = Part(part_name, [*specs, *shared.specs], [*pieces, *shared.pieces])
    found = {
        "class": _class_of(optimizer),
        "groups": _of_all_stages(axes.gather_stages(groups)),
        "others": merged(axes.gather_stages(plain)),
    }
    return axes.all_stages(part), found


def load_optimizer(
    part: str,
    optimizer: torch.optim.Optimizer,
    model: nn.Module | None,
    checkpoint: Readable,
    elsewhere: Sequence[Sequence[str]] = (),
    of_rank: Any = None,
    strict: bool = True,
) -> None:
    """Give an optimizer what was saved as ``part``; a sharded one reads its own of it.

    Unless ``strict``, groups may have other parameters, and then keep their settings, and the
    optimizer may be of another class: the state of the parameters that both have is loaded. Talks
    to nobody.

    ``elsewhere``: the parameters that its groups have on other stages of a pipeline; ``of_rank``:
    what this rank had of its own (see ``own.py``). Raises ArgumentError if its groups have other
    parameters.
    """
    saved = checkpoint.values[part]
    own, theirs = group_names(optimizer, model), [each["names"] for each in saved["groups"]]
    everywhere = [
        {*each, *(elsewhere[at] if at < len(elsewhere) else ())} for at, each in enumerate(own)
    ]
    apart = frozenset() if of_rank is None else of_rank.anywhere
    theirs_class = saved.get("class", _class_of(optimizer))
    if strict and theirs_class != _class_of(optimizer):
        raise ArgumentError(
            "load()", "optimizer", f"of class {_class_of(optimizer)}",
            f"{theirs_class}, which was saved",
            "Another optimizer's state means other things; leave the optimizer out, or pass "
            "strict=False to load it all the same.",
        )  # fmt: skip
    same = [each - apart for each in everywhere] == [set(each) - apart for each in theirs]
    if strict and not same:
        raise ArgumentError(
            "load()", "optimizer", f"one with groups {_short(own)}",
            f"groups of the parameters that were saved: {_short(theirs)}",
            "strict=False loads the state of the parameters that both have, and leaves the "
            "groups their settings.",
        )  # fmt: skip

    def array(name: str) -> Any:
        return checkpoint.read(part, name)

    number = {name: at for at, name in enumerate(name for group in own for name in group)}
    parameters = _parameters(optimizer, model, own)
    specs = checkpoint.specs(part)
    state: dict[int, dict[str, Any]] = {}
    for name, mine in {} if of_rank is None else of_rank.optimizer.items():
        if name in number:
            state[number[name]] = dict(mine)
    for name, others in saved["others"].items():
        if name not in number:
            continue  # another stage's
        others = {
            key: value
            for key, value in others.items()
            if not _is_cut(specs.get(f"{name}/{key}"), parameters[name])  # read below, in part
        }
        decoded = tree.decode(others, array, tensors.as_tensor)
        state.setdefault(number[name], {}).update(decoded)
    sharded = isinstance(optimizer, ShardedOptimizer)
    for stored, spec in specs.items():
        name, _, key = stored.rpartition("/")
        if name not in number or key in state.get(number[name], ()):
            continue  # a value of a group, or one of ``others``
        parameter, box = parameters[name], Box.of_all(spec.shape)
        is_slice = _is_cut(spec, parameter)
        if is_slice:
            box = slices.box(parameter)
        if sharded:
            value: Any = Stored(box.sizes, reader(checkpoint, part, stored, box))
        else:
            value = read_own(checkpoint, part, stored, box).clone()
            value = slices.wrap(value, parameter) if is_slice else value
        state.setdefault(number[name], {})[key] = value
    settings: list[dict[str, Any]] = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    if same and theirs_class == _class_of(optimizer):
        settings = [tree.decode(g["settings"], array, tensors.as_tensor) for g in saved["groups"]]
    at, groups = 0, []
    for setting, names in zip(settings, own, strict=True):
        groups.append({**setting, "params": list(range(at, at + len(names)))})
        at += len(names)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _class_of(optimizer: torch.optim.Optimizer) -> str:
    inner = optimizer.inner if isinstance(optimizer, ShardedOptimizer) else optimizer
    return type(inner).__name__


def _parameters(
    optimizer: torch.optim.Optimizer, model: nn.Module | None, names: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """The parameters that the names of its groups stand for."""
    if isinstance(optimizer, ShardedOptimizer):
        return dict(optimizer.sharded_state.named)
    groups = [group["params"] for group in optimizer.param_groups]
    return {
        name: parameter
        for own, group in zip(names, groups, strict=True)
        for name, parameter in zip(own, group, strict=True)
    }


def _is_cut(spec: TensorSpec | None, parameter: torch.Tensor) -> bool:
    """Is it stored for each element of a parameter that this rank has as a slice?"""
    if spec is None or not slices.is_slice(parameter):
        return False
    return bool(spec.shape) and spec.shape == tuple(parameter.shape)


def _of_all_stages(everyones: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The groups of an optimizer that every stage has, with all stages' parameters."""
    if len({len(groups) for groups in everyones}) > 1:
        raise ArgumentError(
            "save()", "optimizer", f"one with {[len(each) for each in everyones]} groups by stage",
            "as many groups on every stage",
        )  # fmt: skip
    return [
        {**first, "names": list(dict.fromkeys(name for each in same for name in each["names"]))}
        for same in zip(*everyones, strict=True)
        for first in same[:1]
    ]


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
    known = {id(parameter): name for name, parameter in named_parameters(plain_module(model))}
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
    names = [name for name, _ in state.named]
    boxes = [slices.box(parameter) for _, parameter in state.named]
    described = {
        key: (tensors.numpy_dtype(each[1].dtype), each[2], tuple(each[1].shape))
        for key, held in tensors_here.items()
        for each in held.values()
    }
    everyones = state.group.world.gather_objects((described, others_here))
    forms = {key: form for each, _ in everyones for key, form in each.items()}
    for (index, key), (dtype, sliced, shape) in sorted(forms.items()):
        own = boxes[index].shape if sliced else shape
        specs.append(TensorSpec(f"{names[index]}/{key}", dtype, own))
    counts = [slices.copy_number(parameter, state.group.world) == 0 for _, parameter in state.named]
    for (index, key), held in sorted(tensors_here.items()):
        if not counts[index]:
            continue
        for start, (_, values, sliced) in sorted(held.items()):
            flat = tensors.as_array(values.contiguous().view(-1))
            piece = Piece(f"{names[index]}/{key}", start if sliced else 0, flat)
            pieces += strips(piece, boxes[index]) if sliced else [piece]
    for index, found in merged_others(each for _, each in everyones).items():
        others.setdefault(names[index], {}).update(found)


def _short(groups: Sequence[Sequence[str]]) -> str:
    return "; ".join(
        f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names in groups
    )
