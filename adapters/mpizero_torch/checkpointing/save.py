"""``save`` and ``load``: all that a training run consists of, on disk and back."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError, World, diagnostics
from mpizero.checkpoint import (
    LARGEST_FILE,
    Checkpoint,
    Part,
    PendingSave,
    Readable,
    Save,
    agreed,
    carry_out,
    shared_part,
    tree,
)
from mpizero_torch import tensors
from mpizero_torch.checkpointing import average as averages
from mpizero_torch.checkpointing import model as models
from mpizero_torch.checkpointing import optimizer as optimizers
from mpizero_torch.checkpointing import own as owns
from mpizero_torch.checkpointing import random_state
from mpizero_torch.checkpointing.axes import Axes, merged
from mpizero_torch.checkpointing.renamed import Rename, Renamed
from mpizero_torch.names import uncompiled
from mpizero_torch.runtime import init
from mpizero_torch.wrapper import DistributedModule

EXTRA = "extra"

_log = logging.getLogger("mpizero")


def save(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    scheduler: Any = None,
    loader: Any = None,
    ema: Any = None,
    extra: Mapping[str, Any] | None = None,
    asynchronous: bool = False,
    largest_file: int = LARGEST_FILE,
    writers_per_node: int | None = None,
    writer: str = "auto",
    world: World | None = None,
) -> PendingSave | None:
    """Save a run in the folder ``path``, which is there wholly or not at all. Collective.

    ``optimizer`` and ``scheduler`` may be lists of several. ``model.safetensors`` has the plain
    module's names, and so anybody's reader; every rank writes its own part. ``scheduler`` and
    ``loader`` (what ``mz.shard`` gives) are asked for their ``state_dict()``; ``ema`` is an
    ``mz.EMA``; ``extra`` is further values of one's own, the same on all ranks: numbers, strings,
    tensors, lists and dicts of these. Each rank's random number generators are saved too. Nothing
    is pickled.

    Parameters that were left out of ``DistributedDataParallel`` (experts of a rank's own) are saved
    for each rank, if they differ; they are loaded by as many ranks.

    Save between two steps: gradients are not saved, nor is what half a step has accumulated.

    With ``asynchronous`` training waits only until the bytes are copied; what comes back is to be
    ``wait()``ed for, and tells how it went. ``largest_file``: bytes, above which a part is cut into
    several with an index. ``writers_per_node``: how many ranks of a node write at a time.
    ``writer``: "posix" (each rank by itself), "mpi-io" (in concert), or "auto": MPI-IO on Lustre,
    GPFS, PanFS and PVFS2.

    Raises CheckpointError on every rank if one cannot write (what was there before stays), and
    ArgumentError for what only a pickle could hold.
    """
    return save_run(
        path, model=model, optimizer=optimizer, scheduler=scheduler, loader=loader, ema=ema,
        extra=extra, asynchronous=asynchronous, largest_file=largest_file,
        writers_per_node=writers_per_node, writer=writer, world=world,
    )  # fmt: skip


@diagnostics.spanned("checkpoint")
def save_run(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    scheduler: Any = None,
    loader: Any = None,
    ema: Any = None,
    extra: Mapping[str, Any] | None = None,
    asynchronous: bool = False,
    largest_file: int = LARGEST_FILE,
    writers_per_node: int | None = None,
    writer: str = "auto",
    world: World | None = None,
    managed: bool = False,
) -> PendingSave | None:
    """What ``save`` does; ``managed``: a ``CheckpointManager`` may remove it again."""
    world = world_of(model, world)
    everyone = Axes.of(world).everyone
    with everyone.together("save()"):
        parts, values = collect(
            world, None, model=model, optimizer=optimizer, scheduler=scheduler, loader=loader,
            ema=ema, extra=extra,
        )  # fmt: skip
        job = Save(
            Path(path), everyone, parts, values,
            largest_file=largest_file, writers_per_node=writers_per_node, writer=writer,
            managed=managed,
        )  # fmt: skip
        return carry_out(job, everyone, asynchronous)


def collect(
    world: World,
    sharers: World | None = None,
    *,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    scheduler: Any = None,
    loader: Any = None,
    ema: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> tuple[list[Part], dict[str, Any]]:
    """All that a run consists of: tensors by part, with this rank's pieces, and plain values.

    ``sharers``: the ranks among whom it is dealt out what all ranks have; by default all. Of a
    world that belongs to a mesh, all of the mesh's ranks take part. Collective.
    """
    axes = Axes.of(world, sharers)
    parts: list[Part] = []
    arrays: dict[str, Any] = {}  # within values
    values: dict[str, Any] = {}
    own = owns.Own()
    if model is not None:
        model = uncompiled(model)
        own = owns.of(model, optimizer, axes.everyone)
        if own.anywhere:
            part, values[owns.PART] = owns.part_of(own, axes.everyone)
            parts.append(part)
        part, values[models.PART] = models.model_part(model, axes, arrays, own.anywhere)
        arrays = merged(axes.gather_stages(arrays))
        parts.append(part)
    for name, each in optimizers.by_part(optimizer).items():
        part, values[name] = optimizers.optimizer_part(name, each, model, axes, own.anywhere)
        parts.append(part)
    if ema is not None:
        part, values[averages.PART] = averages.average_part(ema)
        parts.append(part)
    others: dict[str, Any] = {"extra": dict(extra or {})}
    for name, each in (("scheduler", scheduler), ("loader", loader)):
        if each is not None:
            others[name] = _state_of(each, name)
    values[EXTRA] = {
        name: tree.encode(value, name, arrays, models.as_array) for name, value in others.items()
    }
    parts.append(shared_part(EXTRA, arrays, sharers or axes.everyone))
    part, values[random_state.PART] = random_state.random_part(axes.everyone)
    parts.append(part)
    return parts, values


def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    scheduler: Any = None,
    loader: Any = None,
    ema: Any = None,
    strict: bool = True,
    rename: Rename | Mapping[str, str | None] | None = None,
    random: bool = True,
    world: World | None = None,
) -> dict[str, Any]:
    """Let a run go on where ``save`` found it; returns ``extra``. Collective.

    On any number of ranks, at any stage, in one process too: each rank reads what it keeps. Names
    may be left out, but what is given must have been saved. ``random``: restore the random number
    generators (a rank more than there were gets its own).

    ``strict``: model and optimizer must have exactly the names, groups and class that were saved.
    Else what both have is loaded, and a warning lists the names that only one has.
    ``rename``: makes of a name in the checkpoint the model's (a function, or a table of those that
    change); None: leave this one out, a head of another shape, say.

    Raises CheckpointError if there is none or it is damaged, naming file and tensor, and
    ArgumentError if it is of another model or optimizer: on every rank, whichever met it. What was
    read by then stays as read.
    """
    world = world_of(model, world)
    everyone = Axes.of(world).everyone
    with everyone.together("load()"), Checkpoint(path, everyone) as checkpoint:
        return restore(
            checkpoint, world, model=model, optimizer=optimizer, scheduler=scheduler,
            loader=loader, ema=ema, strict=strict, rename=rename, random=random,
        )  # fmt: skip


def restore(
    checkpoint: Readable,
    world: World,
    *,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    scheduler: Any = None,
    loader: Any = None,
    ema: Any = None,
    strict: bool = True,
    rename: Rename | Mapping[str, str | None] | None = None,
    random: bool = True,
) -> dict[str, Any]:
    """What ``load`` does, from a checkpoint that is open."""
    if rename is not None:
        checkpoint = Renamed(checkpoint, rename)
    model = None if model is None else uncompiled(model)
    found, axes = checkpoint.values, Axes.of(world)
    world = axes.everyone

    def array(name: str) -> Any:
        return checkpoint.read(EXTRA, name)

    with agreed(world):
        others = tree.decode(found.get(EXTRA, {}), array, tensors.as_tensor)
    given = {"scheduler": scheduler, "loader": loader}
    every = optimizers.by_part(optimizer)
    parts = {models.PART: model, averages.PART: ema}
    for name in [*(name for name, wanted in parts.items() if wanted is not None), *every]:
        if name not in found:
            raise _not_saved(name, checkpoint)
    for name, each in given.items():
        if each is not None and name not in others:
            raise _not_saved(name, checkpoint)
    names, groups = _on_all_stages(axes, model, every)
    with agreed(world):
        own = owns.saved(checkpoint, model, world, strict)
        if model is not None:
            missing, unknown = models.load_model(model, checkpoint, array, strict, names, own)
            if world.rank == 0:
                _tell(checkpoint, missing, unknown)
        for name, each in every.items():
            optimizers.load_optimizer(name, each, model, checkpoint, groups[name], own, strict)
        if ema is not None:
            averages.load_average(ema, checkpoint)
        for name, each in given.items():
            if each is not None:
                _restore_state(each, others[name])
        if random and random_state.PART in found:
            random_state.restore(checkpoint, world)
    for part in models.sharded_parts(model):
        part.state.memory.settle()
    extra: dict[str, Any] = others.get("extra", {})
    return extra


def world_of(model: nn.Module | None, world: World | None) -> World:
    """The ranks that a model is distributed over, or ``world``, or all."""
    if model is not None:
        model = uncompiled(model)
        parts = [each for each in model.modules() if isinstance(each, DistributedModule)]
        model = parts[0] if parts else model
    if isinstance(model, DistributedModule):
        mesh = model.world.mesh
        if world is None or (mesh is not None and world is mesh.world):
            return model.world
    return world if world is not None else init()


def _on_all_stages(
    axes: Axes, model: nn.Module | None, every: Mapping[str, torch.optim.Optimizer]
) -> tuple[list[str], dict[str, list[list[str]]]]:
    """The names of the model, and of the optimizers' groups, that the stages have together."""
    names = [] if model is None else models.names_of(model)
    groups = {
        part: [list(group) for group in optimizers.group_names(each, model)]
        for part, each in every.items()
    }
    everyones = axes.gather_stages((names, groups))
    together: dict[str, list[list[str]]] = {
        part: [[] for _ in theirs] for part, theirs in groups.items()
    }
    for _, found in everyones:
        for part, theirs in together.items():
            for own, more in zip(theirs, found.get(part, ()), strict=False):
                own += more
    return [name for theirs, _ in everyones for name in theirs], together


def _restore_state(each: Any, state: Any) -> None:
    if not isinstance(each, (list, tuple)):
        each.load_state_dict(state)
        return
    for one, own in zip(each, state, strict=True):
        one.load_state_dict(own)


def _tell(checkpoint: Readable, missing: list[str], unknown: list[str]) -> None:
    """Names that only the model, or only the checkpoint, has."""
    for what, names in (("keeps its values of", missing), ("has not", unknown)):
        if names:
            _log.warning(
                "load(strict=False) of %s: the model %s %s",
                checkpoint.path,
                what,
                models.some(names),
            )


def _state_of(each: Any, name: str) -> Any:
    if isinstance(each, (list, tuple)):
        return [_state_of(one, name) for one in each]
    if not hasattr(each, "state_dict"):
        raise ArgumentError(
            "save()", name, f"a {type(each).__name__}, which has no state_dict()",
            "one that has",
        )  # fmt: skip
    return each.state_dict()


def _not_saved(name: str, checkpoint: Readable) -> ArgumentError:
    return ArgumentError(
        "load()", name, "given", f"what was saved in {checkpoint.path}: "
        + ", ".join(sorted({*checkpoint.values, *checkpoint.values.get(EXTRA, {})} - {EXTRA})),
    )  # fmt: skip
