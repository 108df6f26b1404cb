"""PyTorch on mpizero: data-parallel and sharded training in a few changed lines.

    import mpizero_torch as mz

    world = mz.init()
    model = mz.DistributedDataParallel(model)
    for x, y in mz.shard(loader):
        ...

Thin by intent: hooks, tensors as arrays, and torch's names for what the core does.
"""

from __future__ import annotations

from mpizero import (
    ArgumentError,
    CheckpointError,
    LaunchError,
    MismatchError,
    MpizeroError,
    PreemptionGuard,
    RankDiedError,
    World,
)
from mpizero.elastic import elastic
from mpizero_torch.building import deferred
from mpizero_torch.checkpointing import CheckpointManager, load, load_pretrained, save
from mpizero_torch.clip import clip_grad_norm_, clip_grad_value_
from mpizero_torch.data import ShardedLoader, ShardedSampler, ShardedStream, shard
from mpizero_torch.ddp import DistributedDataParallel
from mpizero_torch.deciding import agree, print0, seed
from mpizero_torch.elastic_state import ElasticState
from mpizero_torch.ema import EMA
from mpizero_torch.in_sync import assert_in_sync, detect_nonfinite
from mpizero_torch.memory_report import MemoryReport, memory_report
from mpizero_torch.mesh import Mesh, mesh
from mpizero_torch.metrics import mean, sum
from mpizero_torch.node_memory import node_shared
from mpizero_torch.predictions import gather_predictions
from mpizero_torch.runtime import init
from mpizero_torch.sharding import (
    MixedPrecision,
    ShardedModule,
    ShardedOptimizer,
    full_gradient,
    full_parameter,
    gathered,
    optimizer_state,
    set_gradient,
    set_parameter,
    zero,
)
from mpizero_torch.sync_batch_norm import SyncBatchNorm
from mpizero_torch.synced_metrics import sync_metric
from mpizero_torch.timeline import trace
from mpizero_torch.turns import first, first_on_node
from mpizero_torch.ulysses import SequenceParallelAttention, stretch
from mpizero_torch.verify import VerifyReport, verify

__all__ = [
    "EMA",
    "ArgumentError",
    "CheckpointError",
    "CheckpointManager",
    "DistributedDataParallel",
    "ElasticState",
    "LaunchError",
    "MemoryReport",
    "Mesh",
    "MismatchError",
    "MixedPrecision",
    "MpizeroError",
    "PreemptionGuard",
    "RankDiedError",
    "SequenceParallelAttention",
    "ShardedLoader",
    "ShardedModule",
    "ShardedOptimizer",
    "ShardedSampler",
    "ShardedStream",
    "SyncBatchNorm",
    "VerifyReport",
    "World",
    "agree",
    "assert_in_sync",
    "clip_grad_norm_",
    "clip_grad_value_",
    "deferred",
    "detect_nonfinite",
    "elastic",
    "first",
    "first_on_node",
    "full_gradient",
    "full_parameter",
    "gather_predictions",
    "gathered",
    "init",
    "load",
    "load_pretrained",
    "mean",
    "memory_report",
    "mesh",
    "node_shared",
    "optimizer_state",
    "print0",
    "save",
    "seed",
    "set_gradient",
    "set_parameter",
    "shard",
    "stretch",
    "sum",
    "sync_metric",
    "trace",
    "verify",
    "zero",
]
