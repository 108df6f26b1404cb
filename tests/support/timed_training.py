"""The seconds of training steps, and what to plan them with; a program for ranks on slow links.

    python timed_training.py '[[STAGE, PRECISION, SHARE], ...]' FOLDER

Rank 0 writes ``times.json``: seconds of forward and backward alone, and of a whole step for each
case, each the shortest of a few (what else the machine does only adds), on the rank that takes
longest; and the memory's bandwidth. With one rank a node also ``bench.json``, of ``mpizero bench``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import mpizero_torch as mz
from mpizero import World
from mpizero.cli import main as command

WIDTH, HEIGHT, DEPTH = 400, 1000, 3
STEPS = 2
_COPIED = 32 << 20


def build() -> nn.Module:
    """2.4 million parameters in six layers: two segments of the default size in float32."""
    return nn.Sequential(
        *(
            layer
            for _ in range(DEPTH)
            for layer in (nn.Linear(WIDTH, HEIGHT), nn.ReLU(), nn.Linear(HEIGHT, WIDTH))
        )
    )


def shortest(world: World, step: Callable[[], object], times: int = STEPS) -> float:
    """Seconds of ``step``, whose first call does not count."""
    step()
    seconds = []
    for _ in range(times):
        world.barrier()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return float(world.allreduce(np.array(seconds), "max").min())


def memory_bandwidth(world: World) -> float:
    """Bytes a second that the ranks of a node together read and write."""
    source, target = np.ones(_COPIED, np.uint8), np.empty(_COPIED, np.uint8)
    seconds = shortest(world, lambda: np.copyto(target, source), 5)
    return 2 * _COPIED * world.local_size / seconds


def compute(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    model(torch.ones(2, WIDTH, dtype=dtype)).float().square().mean().backward()


def whole_step(world: World, stage: int, precision: str, share: bool) -> float:
    torch.manual_seed(0)
    model: Any = build()
    optimizer: Any = torch.optim.AdamW(model.parameters(), fused=True)
    if stage == 0:
        model = mz.DistributedDataParallel(model, world=world)
    else:
        model, optimizer = mz.zero(
            model, optimizer, stage, world=world, share_parameters=share, precision=precision
        )
    dtype = torch.bfloat16 if stage and precision == "bf16" else torch.float32

    def step() -> None:
        compute(model, dtype)
        optimizer.step()
        optimizer.zero_grad()

    return shortest(world, step)


def main() -> None:
    cases, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    world = mz.init()
    if world.local_size == 1:
        options = ["--algorithm", "auto", "--to", "4M", "--seconds", "0.05"]
        command(["bench", *options, "--json", str(folder / "bench.json")], standalone_mode=False)
    alone = build()
    found = {
        "nodes": world.node_count,
        "memory_bandwidth": memory_bandwidth(world),
        "compute": shortest(world, lambda: compute(alone), 5),
        "steps": [whole_step(world, *case) for case in cases],
    }
    if world.rank == 0:
        (folder / "times.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
