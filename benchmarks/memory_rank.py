"""One rank of what memory.py watches: trains a few steps and says how far it is.

Started by memory.py: mpirun -n N python memory_rank.py CONTESTANT MODEL CONTEXT STEPS FOLDER
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from contestants import CONTESTANTS, missing
from models import TASKS

import mpizero_torch as mz
from mpizero import World

# How long a phase lasts at least, so that the sampler has looked several times.
REST_SECONDS = 0.5


def enter(phase: str, world: World, folder: Path) -> None:
    """Tell the watcher that all ranks have come to a phase."""
    world.barrier()
    if world.rank == 0:
        new = folder / "phase.new"
        new.write_text(phase)
        new.rename(folder / "phase")
    time.sleep(REST_SECONDS)
    world.barrier()


def train(key: str, model: str, context: int, steps: int, folder: Path) -> None:
    """Go through the phases: started, building, training, trained, ended."""
    reason = missing(key)
    if reason is not None:
        raise RuntimeError(reason)
    world = mz.init()
    torch.set_num_threads(1)
    store = world.broadcast_object(tempfile.mktemp())
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=world.rank, world_size=world.size
    )
    task = TASKS[model](context)
    enter("started", world, folder)
    enter("building", world, folder)
    trainer = CONTESTANTS[key].build(task.model())
    enter("training", world, folder)
    for step in range(steps):
        loss = trainer.model(*task.batch(step * world.size + world.rank))
        trainer.backward(loss)
        trainer.update()
        del loss
    enter("trained", world, folder)
    enter("ended", world, folder)
    dist.destroy_process_group()


def main() -> None:
    key, model, context, steps, folder = sys.argv[1:]
    # By these files memory.py knows whom to watch.
    (Path(folder) / f"{os.getpid()}.pid").touch()
    try:
        train(key, model, int(context), int(steps), Path(folder))
    except Exception as error:
        # Kept apart from stderr, where the launcher has the last word.
        line = " ".join(str(error).split())
        (Path(folder) / "failure").write_text(f"{type(error).__name__}: {line}")
        raise


if __name__ == "__main__":
    main()
