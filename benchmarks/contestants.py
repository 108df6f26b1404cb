"""Who takes part in the training benchmarks: each builds a model and its optimizer its own way.

All train in float32 with torch's fused AdamW. Whatever a contestant needs is imported when it is
built: DeepSpeed need not be installed, and memory.py, which reads the names from here, must not map
torch's libraries, since they would count as shared with the ranks that it watches.
"""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

RATE = 1e-4


@dataclass
class Trainer:
    """One contestant's way through a step: the loss, the gradients, the update."""

    model: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor], object]
    update: Callable[[], object]
    optimizer: Optimizer | None = None  # where it is one of torch's kind


def adamw(model: nn.Module) -> Optimizer:
    import torch

    return torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)


def plain_loop(model: nn.Module, optimizer: Optimizer) -> Trainer:
    """The loop of torch's tutorials, which most contestants leave as it is."""

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Trainer(model, lambda loss: loss.backward(), update, optimizer)


def alone(model: nn.Module) -> Trainer:
    return plain_loop(model, adamw(model))


def no_update(model: nn.Module) -> Trainer:
    """Forward and backward only: what is over in another's step is communication and optimizer."""
    return Trainer(model, lambda loss: loss.backward(), model.zero_grad)


def torch_ddp(model: nn.Module, group: Any = None, *, views: bool = False) -> Trainer:
    """``group``: the process group to average over; None: the default one.

    ``views``: gradients are views of what is communicated, which torch leaves to the user.
    """
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=views)
    return plain_loop(wrapped, adamw(model))


def torch_zero1(model: nn.Module) -> Trainer:
    """torch's ZeRO-1: the optimizer's state is cut, parameters are broadcast after the update."""
    import torch
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(),
        torch.optim.AdamW,
        parameters_as_bucket_view=True,  # one broadcast a rank, not one a parameter
        lr=RATE,
        fused=True,
    )
    return plain_loop(wrapped, optimizer)


def fsdp2(
    model: nn.Module, *, reshard: bool, group: Any = None, from_group: bool = False
) -> Trainer:
    """``fully_shard`` for each block, then for what is left, as torch's tutorial has it.

    ``group``: the process group to shard over; None: the default one. ``from_group``: its memory
    is what torch communicates from.

    With ``reshard``, blocks give their parameters back after the forward pass (ZeRO-3), without,
    after the backward pass (ZeRO-2). What is left is needed again first, so torch keeps it.
    """
    import torch.distributed as dist
    from models import blocks
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = DeviceMesh.from_group(group or dist.group.WORLD, "cpu")
    for block in blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=None if reshard else False)
    if from_group:
        for part in [*chain.from_iterable(blocks(model)), model]:
            if isinstance(part, FSDPModule):
                part.set_allocate_memory_from_process_group_for_comm(True)
    return plain_loop(model, adamw(model))


def deepspeed(model: nn.Module, *, stage: int) -> Trainer:
    """DeepSpeed without its launcher, on the process group that is there."""
    import torch.distributed as dist

    # It asks the environment, even where a process group has been made.
    for name, value in (("RANK", dist.get_rank()), ("WORLD_SIZE", dist.get_world_size())):
        os.environ[name] = str(value)
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed as ds

    ds.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,  # only for its own statistics: we feed it batches
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,  # its default clips to a norm of 1
    }
    engine, *_ = ds.initialize(model=model, optimizer=adamw(model), config=config)
    return Trainer(engine, engine.backward, engine.step)


def mpizero_ddp(model: nn.Module) -> Trainer:
    import mpizero_torch as mz

    wrapped = mz.DistributedDataParallel(model)
    return plain_loop(wrapped, adamw(model))


def mpizero_zero(model: nn.Module, *, stage: int, share: bool = True) -> Trainer:
    import mpizero_torch as mz

    return plain_loop(*mz.zero(model, adamw(model), stage=stage, share_parameters=share))


@dataclass(frozen=True)
class Contestant:
    """The name in figures, how to build it, and whether it averages gradients over the ranks."""

    name: str
    build: Callable[[nn.Module], Trainer]
    averages: bool = True


# By the name on the command line.
CONTESTANTS = {
    "alone": Contestant("alone", alone, averages=False),
    "no-update": Contestant("alone, no optimizer", no_update, averages=False),
    "torch-ddp": Contestant("torch DDP, gloo", torch_ddp),
    "torch-zero1": Contestant("torch ZeroRedundancyOptimizer, gloo", torch_zero1),
    "fsdp2": Contestant("torch FSDP2, gloo", partial(fsdp2, reshard=True)),
    "fsdp2-keep": Contestant("torch FSDP2, gloo, no reshard", partial(fsdp2, reshard=False)),
    "deepspeed1": Contestant("DeepSpeed ZeRO-1, gloo", partial(deepspeed, stage=1)),
    "deepspeed2": Contestant("DeepSpeed ZeRO-2, gloo", partial(deepspeed, stage=2)),
    "deepspeed3": Contestant("DeepSpeed ZeRO-3, gloo", partial(deepspeed, stage=3)),
    "mpizero-ddp": Contestant("mpizero DDP", mpizero_ddp),
    "zero1": Contestant("mpizero ZeRO-1", partial(mpizero_zero, stage=1)),
    "zero2": Contestant("mpizero ZeRO-2", partial(mpizero_zero, stage=2)),
    "zero3": Contestant("mpizero ZeRO-3", partial(mpizero_zero, stage=3)),
    "zero3-private": Contestant(
        "mpizero ZeRO-3, parameters not shared", partial(mpizero_zero, stage=3, share=False)
    ),
}
REFERENCE = "torch-ddp"


def keys(text: str) -> list[str]:
    """What ``--contestants a,b,c`` means; for argparse."""
    chosen = [key.strip() for key in text.split(",") if key.strip()]
    for key in chosen:
        if key not in CONTESTANTS:
            raise ArgumentTypeError(f"no contestant {key!r}; there are {', '.join(CONTESTANTS)}")
    return list(dict.fromkeys(chosen))


def missing(key: str) -> str | None:
    """Why a contestant cannot take part here, if it cannot."""
    if key.startswith("deepspeed") and find_spec("deepspeed") is None:
        return "DeepSpeed is not installed"
    if key.startswith("zero"):
        import mpizero_torch as mz

        if not hasattr(mz, "zero"):
            return "this mpizero has no mz.zero"
    return None
