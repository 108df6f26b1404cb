"""``zero``: ZeRO stages 1, 2 and 3 for a torch model and any optimizer, the loop unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError, World
from mpizero.engine import COMMON, SHARDED, WHOLE, ShardGroup
from mpizero_torch.ddp import DistributedDataParallel
from mpizero_torch.element_wise import choose_partition
from mpizero_torch.loss_scale import LossScale
from mpizero_torch.runtime import init
from mpizero_torch.wrapper import DistributedModule
from mpizero_torch.zero_module import ShardedModule
from mpizero_torch.zero_optimizer import ShardedOptimizer, check_optimizer
from mpizero_torch.zero_state import Sharding

SEGMENT_BYTES = 32 << 20

_PRECISIONS = {
    None: None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16,
    torch.bfloat16: torch.bfloat16, torch.float16: torch.float16, torch.float32: None,
}  # fmt: skip


def zero(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stage: int = 2,
    *,
    world: World | None = None,
    partition: str = "auto",
    share_parameters: bool | None = None,
    precision: str | torch.dtype | None = None,
    accumulate_in_float32: bool = False,
    shard_group: str | int = "world",
    segment_mb: float = SEGMENT_BYTES / 2**20,
    broadcast_buffers: bool = True,
) -> tuple[Any, Any]:
    """Shard the training of ``model`` with ``optimizer`` over the ranks (arXiv 1910.02054).

    Returns both, to be used as before. Parameters and buffers start as rank 0's.
    """
    world = world if world is not None else init()
    if stage not in (0, 1, 2, 3):
        raise ArgumentError("zero()", "stage", repr(stage), "1, 2, 3, or 0 for replicas")
    if stage == 0:
        return DistributedDataParallel(
            model, world=world, broadcast_buffers=broadcast_buffers
        ), optimizer
    if isinstance(model, DistributedModule):
        raise ArgumentError("zero()", "model", "one that is distributed already", "a plain one")
    if precision not in _PRECISIONS:
        raise ArgumentError("zero()", "precision", repr(precision), "'fp32', 'bf16', 'fp16'")
    named = list(model.named_parameters())
    number = {id(parameter): at for at, (_, parameter) in enumerate(named)}
    check_optimizer(optimizer, {id(parameter): name for name, parameter in named})
    groups = [[number[id(p)] for p in g["params"]] for g in optimizer.param_groups]
    buffers = list(model.named_buffers())
    world.agree(
        [f"{n}: {t.dtype}, shape {tuple(t.shape)}" for n, t in [*named, *buffers]],
        "parameters and buffers",
    )
    world.agree([str(each) for each in groups], "the parameters of the optimizer's groups")
    group = ShardGroup(world, shard_group)
    kind = _PRECISIONS[precision]
    sharding = Sharding(
        stage,
        choose_partition(optimizer, partition),
        _where(group, stage, share_parameters),
        int(segment_mb * 2**20),
        kind,
        accumulate_in_float32,
    )
    sharded = ShardedOptimizer(optimizer)
    module = ShardedModule(
        model, sharded, groups, group, sharding,
        broadcast_buffers=broadcast_buffers,
        loss_scale=LossScale() if kind == torch.float16 else None,
        aside=None,
    )  # fmt: skip
    return module, sharded


def _where(group: ShardGroup, stage: int, share: bool | None) -> str:
    if share is None:
        share = group.one_memory
    if share and not group.one_memory:
        raise ArgumentError(
            "zero()", "share_parameters", "True", "None or False here",
            "Only ranks of one node, on CPUs, can share memory.",
        )  # fmt: skip
    if share:
        return COMMON
    return SHARDED if stage == 3 else WHOLE
