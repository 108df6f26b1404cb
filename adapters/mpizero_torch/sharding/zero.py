"""``zero``: ZeRO stages 1, 2 and 3 for a torch model and any optimizer, the loop unchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError, World
from mpizero.engine import COMMON, SEGMENT_BYTES, SHARDED, WHOLE, ShardGroup, take_lane
from mpizero_torch import names, slices, tensors
from mpizero_torch.ddp import DistributedDataParallel
from mpizero_torch.runtime import init
from mpizero_torch.sharding.boundary import Boundary
from mpizero_torch.sharding.deferred import check_lazy
from mpizero_torch.sharding.element_wise import choose_partition
from mpizero_torch.sharding.module import ShardedModule
from mpizero_torch.sharding.offload import StateOnDisk
from mpizero_torch.sharding.optimizer import ShardedOptimizer
from mpizero_torch.sharding.precision import Layers, MixedPrecision, as_policy, loss_scale
from mpizero_torch.sharding.state import Sharding
from mpizero_torch.torch_surface import check_module
from mpizero_torch.wrapper import DistributedModule

SEGMENT_MB = SEGMENT_BYTES / 2**20


def zero(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    stage: int = 2,
    *,
    world: World | None = None,
    partition: str | Sequence[str] = "auto",
    share_parameters: bool | None = None,
    precision: str | torch.dtype | MixedPrecision | None = None,
    accumulate_in_float32: bool = False,
    shard_group: str | int = "world",
    offload: str | None = None,
    offload_dir: str | Path | None = None,
    initialise: Callable[[nn.Module], None] | None = None,
    segment_mb: float = SEGMENT_MB,
    whole: Sequence[type[nn.Module] | nn.Module] = (),
    broadcast_buffers: bool = True,
) -> tuple[Any, Any]:
    """Shard the training of ``model`` with ``optimizer`` over the ranks (arXiv 1910.02054).

    Returns (model, optimizer), to be used in the same loop as before. Parameters and buffers start
    as rank 0's. With one step of n ranks, each on its own batch, the model learns what one process
    learns from all batches together. Collective.

    Parameters
    ----------
    model : any module, its parameters on one device, this rank's.
    optimizer : any built optimizer of the model's parameters, with or without state. Parameters in
        none of its groups are not trained. Or a list of several, each of other parameters (Muon
        for matrices and AdamW for the rest): a list of as many comes back.
    stage : what each of n ranks keeps only an n-th of: 1 the optimizer's state, 2 the gradients
        too, 3 the parameters too. 0: nothing (``DistributedDataParallel``).
    world : the ranks; ``mz.init()``'s by default, ``mesh.replicas`` of a mesh.
    partition : "flat" cuts wherever it falls, for optimizers that treat every element on its own;
        "parameter" gives each rank whole parameters, for those that look at one parameter at a
        time. "auto" knows torch's optimizers; for others say which. For several, a list, or one
        for all.
    share_parameters : have the ranks of a node keep one copy of the parameters between them, in
        node-shared memory. By default on CPUs, for all stages. Then only the optimizer may write
        to them; ``mz.gathered(model, modify=True)`` is for everything else.
    precision : "bf16" or "fp16": parameters and gradients in 16 bits, float32 copies of them and
        the optimizer's state sharded. The module's inputs are converted, its outputs made float32;
        "fp16" scales the gradients by itself and leaves out steps that overflow, on all ranks
        (``optimizer.step_was_skipped``). ``mz.MixedPrecision`` has the choices there are.
    accumulate_in_float32 : with 16-bit parameters, add gradients up in float32.
    shard_group : "world"; "node" or a number k to keep a whole state in each node, or in every k
        ranks (counted node by node), and copies of it in the others (hierarchical sharding).
    offload : "cpu" (for GPUs) or "disk": where the optimizer's state and float32 copies are kept.
    offload_dir : for "disk", the folder of its files.
    initialise : for models made in ``mz.deferred()`` or on the meta device: called with each module
        of parameters, once they have what constructors wrote.
    segment_mb : gradients are reduced, and parameters gathered, in pieces of this many MiB.
    whole : modules, or classes of them, whose parameters are gathered in one piece, however large
        (stage 3): over several nodes those of which each rank calls other parts, as with experts.
    broadcast_buffers : keep buffers (BatchNorm's statistics) as rank 0's.

    Raises ArgumentError and MismatchError for what cannot be right, before anything is changed.
    """
    world = world if world is not None else init()
    with world.together("zero()"):
        if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
            raise ArgumentError("zero()", "stage", repr(stage), "1, 2, 3, or 0 for replicas")
        if isinstance(names.uncompiled(model), DistributedModule):
            raise ArgumentError("zero()", "model", "one that is distributed already", "a plain one")
        policy = as_policy(precision)
        if offload not in (None, "cpu", "disk"):
            raise ArgumentError("zero()", "offload", repr(offload), "None, 'cpu', 'disk'")
        _check_whole(whole, model)
        check_lazy("zero()", model)
        if stage == 0:
            _refuse_for_replicas(policy, offload, shard_group)
            return DistributedDataParallel(
                model, world=world, forward_sync_buffers=None if broadcast_buffers else False
            ), list(optimizer) if isinstance(optimizer, tuple) else optimizer
        named = list(names.named_parameters(model))
        _check_dtypes(named)
        check_module([*named, *names.named_buffers(model)], "zero()")
        optimizers = _listed(optimizer)
        groups = [_group_numbers(each, named) for each in optimizers]
        _check_apart(groups, named)
        slices.check("zero()", named, world)
        are_cut = any(not slices.box(parameter).is_whole for _, parameter in named)
        parts = 1 if shard_group == 1 else world.size
        partitions = [
            choose_partition(each, wish, parts, are_cut)
            for each, wish in zip(optimizers, _wishes(partition, len(optimizers)), strict=True)
        ]
        layers = None if policy is None else Layers(model, policy)
        how = f"stage {stage}, partition {partitions}, precision {policy}"
        _agree(world, named, list(names.named_buffers(model)), groups, how)
        lane = take_lane(world)
        group = ShardGroup(lane.world, shard_group)
        sharding = Sharding(
            stage,
            _where(group, stage, share_parameters),
            max(64, int(segment_mb * 2**20)),
            None if policy is None else policy.torch_dtype,
            frozenset() if layers is None else layers.kept,
            accumulate_in_float32,
            offload,
        )
        if sharding.how == SHARDED:
            _refuse_compiled(model)
            if world.mesh is not None and world.mesh.pp.size > 1:
                raise ArgumentError(
                    "zero()", "stage", "3 without shared parameters, for a stage of a pipeline",
                    "stage 1 or 2, or shared parameters",
                    "Its parameters would be gathered anew for each micro-batch, both ways, and "
                    "torch's schedules differentiate a stage in ways that do not tell when.",
                )  # fmt: skip
        before = [each.state_dict() if each.state else None for each in optimizers]
        scale = loss_scale(policy)
        boundary = None if policy is None else Boundary(model, policy, scale)
        sharded = [ShardedOptimizer(each) for each in optimizers]
        module = ShardedModule(
            model,
            sharded,
            groups,
            partitions,
            world,
            lane,
            group,
            sharding,
            broadcast_buffers=broadcast_buffers,
            layers=layers,
            boundary=boundary,
            loss_scale=scale,
            aside=StateOnDisk(offload_dir) if offload == "disk" else None,
            initialise=initialise,
            whole=whole,
        )
        for each, state in zip(sharded, before, strict=True):
            if state is not None:
                each.load_state_dict(state)
        return module, sharded[0] if isinstance(optimizer, torch.optim.Optimizer) else sharded


def _check_whole(whole: Any, model: nn.Module) -> None:
    given = whole if isinstance(whole, (list, tuple, set)) else [whole]
    parts = list(model.modules())
    for each in given:
        if isinstance(each, type) and any(isinstance(part, each) for part in parts):
            continue
        if not any(part is each for part in parts):
            name = each.__name__ if isinstance(each, type) else f"a {type(each).__name__}"
            raise ArgumentError(
                "zero()", "whole", f"{name}, of which the model has none",
                "a list of modules of the model, or of their classes",
            )  # fmt: skip


def _check_dtypes(named: Sequence[tuple[str, nn.Parameter]]) -> None:
    for name, parameter in named:
        try:
            tensors.numpy_dtype(parameter.dtype)
        except TypeError as error:
            raise ArgumentError(
                "zero()", "model", f"one whose parameter '{name}' is of {parameter.dtype}",
                "parameters of dtypes that can travel", f"({error})",
            ) from None  # fmt: skip


def _listed(optimizer: Any) -> list[Any]:
    several = isinstance(optimizer, (list, tuple))
    if several and not optimizer:
        raise ArgumentError("zero()", "optimizer", "an empty list", "one optimizer or several")
    return list(optimizer) if several else [optimizer]


def _wishes(partition: str | Sequence[str], count: int) -> list[str]:
    """How the parameters of each optimizer are to be cut."""
    if isinstance(partition, str):
        return [partition] * count
    if len(partition) != count:
        raise ArgumentError(
            "zero()", "partition", f"a list of {len(partition)}",
            f"one for each of the {count} optimizers, or one for all",
        )  # fmt: skip
    return list(partition)


def _check_apart(
    groups: Sequence[Sequence[Sequence[int]]], named: Sequence[tuple[str, nn.Parameter]]
) -> None:
    """A parameter that two optimizers update would be in two places."""
    seen: dict[int, int] = {}
    for at, theirs in enumerate(groups):
        for index in (index for members in theirs for index in members):
            if seen.setdefault(index, at) != at:
                raise ArgumentError(
                    "zero()", "optimizer", f"several with '{named[index][0]}' in common",
                    "optimizers of different parameters",
                )  # fmt: skip


def _group_numbers(optimizer: Any, named: Sequence[tuple[str, nn.Parameter]]) -> list[list[int]]:
    """The numbers of each group's parameters. Raises ArgumentError for other things."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentError(
            "zero()", "optimizer", f"a {type(optimizer).__qualname__}", "a torch.optim.Optimizer"
        )
    if isinstance(optimizer, ShardedOptimizer):
        raise ArgumentError("zero()", "optimizer", "one that is sharded already", "a plain one")
    number = {id(parameter): at for at, (_, parameter) in enumerate(named)}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in number:
                raise ArgumentError(
                    "zero()", "optimizer",
                    f"one with a parameter of shape {tuple(parameter.shape)} that is not the "
                    "model's", "an optimizer of the model's own parameters",
                    "Build it with model.parameters(), of the model that is given here.",
                )  # fmt: skip
    return [[number[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _agree(
    world: World,
    named: Sequence[tuple[str, torch.Tensor]],
    buffers: Sequence[tuple[str, torch.Tensor]],
    groups: Sequence[Sequence[Sequence[int]]],
    how: str,
) -> None:
    """All ranks must be about to shard the same."""
    world.agree(
        [f"{n}: {t.dtype}, shape {tuple(t.shape)}" for n, t in [*named, *buffers]],
        "parameters and buffers",
    )
    world.agree(
        [how, *map(str, groups)],
        "the stage and the parameters of the optimizer's groups",
    )


def _where(group: ShardGroup, stage: int, share: bool | None) -> str:
    if share is None:
        share = group.one_memory
    if share and not group.one_memory:
        raise ArgumentError(
            "zero()", "share_parameters", "True", "None or False here",
            "Only ranks of one node, on CPUs, can share memory, and all groups of them must.",
        )  # fmt: skip
    if share:
        return COMMON
    return SHARDED if stage == 3 else WHOLE


def _refuse_compiled(model: nn.Module) -> None:
    if any(
        isinstance(part, torch._dynamo.OptimizedModule) or part._compiled_call_impl is not None
        for part in model.modules()
    ):
        raise ArgumentError(
            "zero()", "model", "compiled by torch.compile, for stage 3 without shared parameters",
            "a plain module, or stage 1 or 2, or shared parameters",
            "Its parameters come and go while it runs, which a compiled graph does not know.",
        )  # fmt: skip


def _refuse_for_replicas(*given: Any) -> None:
    precision, offload, shard_group = given
    for name, value, plain in (
        ("precision", precision, (None,)),
        ("offload", offload, (None,)),
        ("shard_group", shard_group, ("world",)),
    ):
        if value not in plain:
            raise ArgumentError("zero()", name, repr(value), f"{plain[0]!r} for stage 0")
