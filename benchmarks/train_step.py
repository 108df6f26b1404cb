"""Whole training steps: ours beside torch's and DeepSpeed's with gloo, in one run.

    mpirun -n 2 python benchmarks/train_step.py [--model gpt2] [--contestants torch-ddp,zero1]

The contestants take turns, step by step, on the same batches, so that what disturbs the machine
disturbs them alike; medians over steps, of the slowest rank. "alone" is forward and backward on
each rank without any communication, and AdamW on top: the bound of data parallelism. "no-update"
leaves AdamW out too: what another's step takes beyond that is its communication and optimizer.
All train with fused AdamW in float32, and all that average gradients must arrive at the same loss.
GPT-2 gets one sequence of 64 tokens a rank and step, which keeps a step on one core to a second or
two; on faster cores or with GPUs the communication is a larger share.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import torch.distributed as dist
from contestants import CONTESTANTS, REFERENCE, Trainer, keys, missing
from models import TASKS
from torch import Tensor

import mpizero_torch as mz

DEFAULT = "no-update,alone,torch-ddp,mpizero-ddp"
WARM_UP = 2  # steps in which optimizers and buckets are still being made
TOLERANCE = 1e-4  # of the loss; the order in which gradients are summed is not everyone's the same


class Lane:
    """A contestant in this run: the seconds that its steps took, and its losses."""

    def __init__(self, key: str, trainer: Trainer) -> None:
        self.key, self.trainer = key, trainer
        self.name, self.averages = CONTESTANTS[key].name, CONTESTANTS[key].averages
        self.samples: list[tuple[float, float]] = []
        self.losses: list[float] = []

    def step(self, x: Tensor, y: Tensor, world: Any) -> None:
        world.barrier()
        start = time.perf_counter()
        loss = self.trainer.model(x, y)
        self.trainer.backward(loss)
        middle = time.perf_counter()
        self.trainer.update()
        end = time.perf_counter()
        self.samples.append((middle - start, end - middle))
        self.losses.append(loss.item())


def main() -> None:
    options = parse()
    world = mz.init()
    torch.set_num_threads(1)
    store = world.broadcast_object(tempfile.mktemp())
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=world.rank, world_size=world.size
    )
    task = TASKS[options.model](options.context)
    lanes = []
    for key in options.contestants:
        reason = missing(key)
        if reason is None:
            lanes.append(Lane(key, CONTESTANTS[key].build(task.model())))
        elif world.rank == 0:
            print(f"left out: {CONTESTANTS[key].name}, since {reason}")
    for step in range((options.steps or task.steps) + WARM_UP):
        x, y = task.batch(step * world.size + world.rank)
        for lane in lanes:
            lane.step(x, y, world)
    rows = results(world, lanes)
    if world.rank == 0:
        report(options, world.size, rows)
    world.barrier()
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(TASKS), default="gpt2")
    parser.add_argument(
        "--contestants", type=keys, default=DEFAULT, metavar="A,B,C",
        help=f"of {', '.join(CONTESTANTS)}; default: {DEFAULT}",
    )  # fmt: skip
    parser.add_argument("--steps", type=int)
    parser.add_argument("--context", type=int, help="gpt2's tokens a rank and step; default: 64")
    parser.add_argument("--without-alone", action="store_true", help="where memory is short")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.context is not None and options.model != "gpt2":
        parser.error("--context goes with --model gpt2 only")
    options.context = options.context or 64
    if options.without_alone:
        options.contestants = [key for key in options.contestants if CONTESTANTS[key].averages]
    return options


def results(world: Any, lanes: list[Lane]) -> list[dict[str, Any]]:
    """A row for each contestant: median seconds after the warm-up, and the last loss."""
    rows: list[dict[str, Any]] = []
    for lane in lanes:
        slowest = world.allreduce(np.array(lane.samples[WARM_UP:]), "max")
        row = {
            "key": lane.key,
            "name": lane.name,
            "step": float(np.median(slowest.sum(1))),
            "optimizer": float(np.median(slowest[:, 1])),
            "loss": world.allreduce(lane.losses[-1]) / world.size,
            "averages": lane.averages,
        }
        rows.append(row)
    compare(rows)
    return rows


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to rows what is relative to others: speed, what communication costs, losses that differ.

    The loss that counts is torch DDP's, or the first that there is.
    """
    found = {row["key"]: row for row in rows}
    averaging = [row for row in rows if row["averages"]]
    right = found.get(REFERENCE, averaging[0] if averaging else None)
    for row in rows:
        if REFERENCE in found:
            row["speed"] = found[REFERENCE]["step"] / row["step"]
        if "no-update" in found:
            row["communication and optimizer"] = row["step"] - found["no-update"]["step"]
        if row["averages"] and right is not None:
            # Not "greater than": a loss that is no number differs too.
            near = abs(row["loss"] - right["loss"]) <= TOLERANCE * abs(right["loss"])
            row["differs"] = not near


def report(options: argparse.Namespace, ranks: int, rows: list[dict[str, Any]]) -> None:
    """Print a line for each contestant, and write what was asked for."""
    context = f" with {options.context} tokens" if options.model == "gpt2" else ""
    title = f"{options.model}{context}, {ranks} ranks"
    print(title)
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        line = f"  {row['name']:<{width}} step {row['step'] * 1e3:8.1f} ms"
        if "speed" in row:
            line += f"  (x{row['speed']:.2f})"
        if "communication and optimizer" in row:
            both = row["communication and optimizer"] * 1e3
            line += f"  communication and optimizer {both:7.1f} ms"
        line += f"  loss {row['loss']:.6f}" + ("  DIFFERS" if row.get("differs") else "")
        print(line)
    if options.json:
        found = {
            "machine": machine.describe(), "model": options.model, "context": options.context,
            "ranks": ranks, "rows": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(found, indent=1))
    if options.plot:
        plot(rows, title, options.plot)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """A bar for each contestant: the step, and in it the optimizer's part."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.3 * len(rows)))
    names = [row["name"] for row in rows]
    axes.barh(names, [row["step"] * 1e3 for row in rows], label="forward, backward, averaging")
    axes.barh(names, [row["optimizer"] * 1e3 for row in rows], label="optimizer")
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds a step", title=title)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
