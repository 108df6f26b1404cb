"""``load_pretrained``: weights of anybody's safetensors files; each rank reads what it keeps."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from mpizero import ArgumentError, World
from mpizero.checkpoint import Readable, SafetensorsFiles, agreed
from mpizero_torch import building, slices
from mpizero_torch.checkpointing import model as models
from mpizero_torch.checkpointing.axes import read_own, reader
from mpizero_torch.checkpointing.save import world_of
from mpizero_torch.names import uncompiled

Rename = Callable[[str], "str | None"]


def load_pretrained(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    rename: Rename | Mapping[str, str | None] | None = None,
    strict: bool = True,
    world: World | None = None,
) -> Any:
    """Give a model the weights of a safetensors file, or of a Hugging Face folder. Collective.

    ``path``: a file, an index (``model.safetensors.index.json``), or a folder with either. Each
    rank reads the elements that it keeps, and holds nothing else: for models of ``mz.zero``, built
    in ``mz.deferred()`` or not, of ``mz.DistributedDataParallel``, and plain ones. Values are
    converted to the parameters' dtype; with ``precision=`` the float32 masters get them.

    ``rename``: makes of a name in the files the model's (a function, or a table of those that
    change); None: leave this one out. ``strict``: all names must be found, as in
    ``load_state_dict``; returns what that does, missing and unexpected names. Of tied parameters
    one name is enough.

    Raises ArgumentError for missing or unexpected names, for tensors of another shape, and if not
    one name is known; CheckpointError for files that are damaged. What was read by then stays.
    """
    world = world_of(model, world)
    with world.together("load_pretrained()"), SafetensorsFiles(path, world) as found:
        with agreed(world):
            result = _load(uncompiled(model), found, _function(rename), strict)
        for part in models.sharded_parts(model):
            part.state.memory.settle()
        return result


def _load(model: nn.Module, found: Readable, rename: Rename, strict: bool) -> Any:
    entries = {k: v for k, v in models.entries(model) if isinstance(v, torch.Tensor)}
    stored: dict[str, str] = {}  # by the model's names
    for name in found.specs(models.PART):
        new = rename(name)
        if new is not None and new in stored:
            raise ArgumentError(
                "load_pretrained()", "rename",
                f"one that makes '{new}' of both '{stored[new]}' and '{name}'",
                "one that gives different names",
            )  # fmt: skip
        if new is not None:
            stored[new] = name
    known = {id(entries[name]) for name in stored if name in entries}
    missing = [name for name, each in entries.items() if id(each) not in known]
    unexpected = [name for name in stored if name not in entries]
    _check(entries, stored, found, missing, unexpected, strict)
    sharded = models.sharded_parameters(model)
    done: set[int] = set()
    with torch.no_grad():
        for name, value in entries.items():
            if name not in stored or id(value) in done:
                continue
            done.add(id(value))
            box = slices.box(value)
            if id(value) in sharded:
                part, index = sharded[id(value)]
                part.state.fill(index, reader(found, models.PART, stored[name], box))
            else:
                slices.local(value).copy_(read_own(found, models.PART, stored[name], box))
    return _IncompatibleKeys(missing, unexpected)


def _check(
    entries: Mapping[str, torch.Tensor],
    stored: Mapping[str, str],
    found: Readable,
    missing: list[str],
    unexpected: list[str],
    strict: bool,
) -> None:
    """Refuse what does not fit, all of it in one message."""
    specs = found.specs(models.PART)
    hollow = [name for name, each in entries.items() if building.is_hollow(each)]
    if hollow:
        raise ArgumentError(
            "load_pretrained()", "model", f"made in mz.deferred(), with '{hollow[0]}' without "
            "memory", "one that mz.zero() has sharded", "Call mz.zero(model, ...) first.",
        )  # fmt: skip
    wrong = [
        f"'{name}' of shape {specs[own].shape} for {slices.box(entries[name]).shape}"
        for name, own in stored.items()
        if name in entries and specs[own].shape != slices.box(entries[name]).shape
    ]
    if strict and missing:
        wrong.append(f"missing: {models.some(missing)}")
    if strict and unexpected:
        wrong.append(f"unexpected: {models.some(unexpected)}")
    if not any(name in entries for name in stored):
        wrong.append(f"not one of its names ({models.some(sorted(stored))}) is the model's "
                     f"({models.some(list(entries))})")  # fmt: skip
    if wrong:
        raise ArgumentError(
            "load_pretrained()", "path", f"{found.path}, {'; '.join(wrong)}",
            "files of the model's names and shapes",
            "rename= gives the files' other names, and None for those to be left out; "
            "strict=False loads the names that both have.",
        )  # fmt: skip


def _function(rename: Rename | Mapping[str, str | None] | None) -> Rename:
    if rename is None:
        return lambda name: name
    if isinstance(rename, Mapping):
        table = dict(rename)
        return lambda name: table.get(name, name)
    return rename
