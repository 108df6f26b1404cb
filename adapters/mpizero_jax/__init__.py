"""JAX on mpizero: data-parallel and sharded training of jitted functions over MPI.

    import mpizero_jax as mj

    world = mj.init()
    params = mj.broadcast(params)
    loss, gradients = mj.value_and_grad(loss_function)(params, batch)  # means over the ranks

All of it works inside of ``jax.jit`` as well as outside.
"""

from __future__ import annotations

from mpizero import ArgumentError, LaunchError, MismatchError, MpizeroError, World
from mpizero_jax.checkpoints import load, save
from mpizero_jax.collectives import (
    all_to_all,
    allgather,
    allreduce,
    broadcast,
    reduce_scatter,
)
from mpizero_jax.data import Batch, ShardedArrays, shard
from mpizero_jax.gradients import grad, mean_gradients, value_and_grad
from mpizero_jax.runtime import init
from mpizero_jax.whole import own_state, whole_state
from mpizero_jax.zero import ZeroState, zero

__all__ = [
    "ArgumentError",
    "Batch",
    "LaunchError",
    "MismatchError",
    "MpizeroError",
    "ShardedArrays",
    "World",
    "ZeroState",
    "all_to_all",
    "allgather",
    "allreduce",
    "broadcast",
    "grad",
    "init",
    "load",
    "mean_gradients",
    "own_state",
    "reduce_scatter",
    "save",
    "shard",
    "value_and_grad",
    "whole_state",
    "zero",
]
