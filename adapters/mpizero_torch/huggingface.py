"""Hugging Face Accelerate and ``transformers.Trainer`` on the ranks of an MPI job.

    import mpizero_torch.huggingface

    world = mpizero_torch.huggingface.init()  # before Accelerator() or TrainingArguments(...)

Nothing else changes: both read torchrun's variables and use the process group that they find.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch

from mpizero import LaunchError, World
from mpizero_torch import runtime
from mpizero_torch.distributed import BACKEND
from mpizero_torch.process_group import (
    TIMEOUT,
    ensure_process_group,
    keep_threads,
    set_variables,
)


def init(*, timeout: timedelta = TIMEOUT) -> World:
    """Start MPI and make Accelerate's state that of this job's ranks. Returns the World.

    Collective; call it before anything else of Accelerate or ``Trainer``. On several ranks it sets
    ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE``, makes the process group
    "mpizero", and asks for the CPU (``ACCELERATE_USE_CPU``) where that is mpizero's device. On one
    it does nothing but start MPI. ``timeout``: of torch's monitored barriers. Raises LaunchError
    where Accelerate has started already and knows nothing of the other ranks, where torch sees a
    GPU and mpizero none, and where there is a process group with another backend.
    """
    from accelerate.state import PartialState  # late: an optional dependency

    world = runtime.init()
    if world.size == 1:
        return world
    _check_device(world)
    ensure_process_group(world, timeout)
    set_variables(world)
    keep_threads()
    if world.device.kind == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    _check_state(_state(world, PartialState), world)
    return world


def _state(world: World, make: Any) -> Any:
    """Accelerate's state, which is one for the process: made here, or what there is."""
    return make(cpu=True) if world.device.kind == "cpu" else make(backend=BACKEND)


def _check_state(state: Any, world: World) -> None:
    found = (state.process_index, state.num_processes)
    if found != (world.rank, world.size):
        raise LaunchError(
            f"init(): Accelerate has started already, as rank {found[0]} of {found[1]}, but MPI "
            f"says rank {world.rank} of {world.size}. Call mpizero_torch.huggingface.init() before "
            "Accelerator(), PartialState() and TrainingArguments(...)."
        )


def _check_device(world: World) -> None:
    wanted = os.environ.get("MPIZERO_DEVICE") == "cpu"
    if world.device.kind == "cpu" and torch.cuda.is_available() and not wanted:
        raise LaunchError(
            "init(): torch sees a GPU, which mpizero cannot use without CuPy: "
            "pip install 'mpizero[cuda]', or set MPIZERO_DEVICE=cpu to train on CPUs."
        )
