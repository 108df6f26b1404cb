"""torch.distributed on mpizero beside torch.distributed on gloo, in one run.

    mpirun -n 2 python benchmarks/distributed.py [--only collectives|training]
                           [--json FILE] [--plot FILE]

Collectives are called as users call them, through ``torch.distributed``, for tensors in private
memory. Training is stock torch: ``DistributedDataParallel``, with and without
``gradient_as_bucket_view``, and ``fully_shard`` on GPT-2 124M (one sequence of 64 tokens a rank and
step), and only the process group differs; "alone" is the same step without communication. The
contestants take turns in an order drawn anew each time; medians of the slowest rank, and both must
arrive at the same loss.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import contestants
import machine
import numpy as np
import torch
import torch.distributed as dist
from models import TASKS

import mpizero_torch as mz
import mpizero_torch.distributed
from mpizero import World
from mpizero.measure import seconds_of

OURS, GLOO, ALONE = "mpizero", "gloo", "alone"
VIEWS = "DDP, gradient_as_bucket_view"
SIZES = (4, 1 << 10, 64 << 10, 1 << 20, 16 << 20)
WARM_UP = 2
TOLERANCE = 1e-4  # of the loss


def collectives(group: Any, nbytes: int) -> dict[str, Callable[[], object]]:
    """The collectives that training uses, on float32 tensors of so many bytes (of the whole)."""
    size = dist.get_world_size()
    whole = torch.ones(max(nbytes // 4, 1))
    part = torch.ones(max(nbytes // 4 // size, 1))
    wide = torch.ones(part.numel() * size)
    return {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather_single": lambda: dist.all_gather_single(wide, part, group=group),
        "reduce_scatter_single": lambda: dist.reduce_scatter_single(part, wide, group=group),
        "broadcast": lambda: dist.broadcast(whole, 0, group=group),
    }


def measure_collectives(
    world: World, groups: dict[str, Any], budget: float, largest: int
) -> list[dict[str, Any]]:
    """A row for each collective and size: seconds by backend."""
    rows = []
    for nbytes in (size for size in SIZES if size <= largest):
        calls = {name: collectives(group, nbytes) for name, group in groups.items()}
        for call in calls[OURS]:
            works = {name: of_group[call] for name, of_group in calls.items()}
            row = {"call": call, "bytes": nbytes, "seconds": seconds_of(world, works, budget)}
            rows.append(row)
            if world.rank == 0:
                print(line(f"{call:<22}{nbytes:>10} B", row["seconds"], 1e6, "us"), flush=True)
    return rows


def trainers(how: str, groups: dict[str, Any], model: Callable[[], Any]) -> dict[str, Any]:
    """Stock torch, by backend; "alone": the same model, which communicates nothing."""
    found = {ALONE: contestants.alone(model())}
    for name, group in groups.items():
        if how == "fully_shard":
            found[name] = contestants.fsdp2(
                model(), reshard=True, group=group, from_group=name == OURS
            )
        else:
            found[name] = contestants.torch_ddp(model(), group, views=how == VIEWS)
    return found


def measure_training(
    world: World, groups: dict[str, Any], model: str, steps: int
) -> list[dict[str, Any]]:
    """A row for each way to train: seconds a step by backend, and whether the losses are equal."""
    return [
        measure_one_way(world, how, groups, model, steps) for how in ("DDP", VIEWS, "fully_shard")
    ]


def measure_one_way(
    world: World, how: str, groups: dict[str, Any], model: str, steps: int
) -> dict[str, Any]:
    """One row: its contestants take turns at every step."""
    task = TASKS[model](64)
    every = trainers(how, groups, task.model)
    seconds: dict[str, list[float]] = {name: [] for name in every}
    losses: dict[str, float] = {}
    for step in range(steps + WARM_UP):
        x, y = task.batch(step * world.size + world.rank)
        for name in random.Random(step).sample(list(every), len(every)):
            trainer = every[name]
            world.barrier()
            start = time.perf_counter()
            loss = trainer.model(x, y)
            trainer.backward(loss)
            trainer.update()
            seconds[name].append(time.perf_counter() - start)
            losses[name] = loss.item()
    medians = {
        name: float(np.median(world.allreduce(np.array(found[WARM_UP:]), "max")))
        for name, found in seconds.items()
    }
    means = {name: world.allreduce(losses[name]) / world.size for name in groups}
    differs = abs(means[OURS] - means[GLOO]) > TOLERANCE * abs(means[GLOO])
    row = {"call": f"{model}, {how}", "seconds": medians, "differs": differs}
    if world.rank == 0:
        alone = f"   (alone {medians[ALONE] * 1e3:.1f} ms)"
        text = line(f"{row['call']:<36}", medians, 1e3, "ms")
        print(text + alone + ("  LOSSES DIFFER" if differs else ""), flush=True)
    return row


def line(title: str, seconds: dict[str, float], unit: float, name: str) -> str:
    """One row as text: both times, and how many times faster ours is."""
    times = "".join(f"{key:>10} {seconds[key] * unit:>10.1f} {name}" for key in (OURS, GLOO))
    return f"{title}{times}   x{seconds[GLOO] / seconds[OURS]:.2f}"


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """How many times faster than on gloo, a bar for each row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [row["call"] + (f", {row['bytes']} B" if "bytes" in row else "") for row in rows]
    ratios = [row["seconds"][GLOO] / row["seconds"][OURS] for row in rows]
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.25 * len(rows)))
    axes.bar_label(axes.barh(names, ratios), [f" {ratio:.2f}" for ratio in ratios])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as on gloo")
    axes.set_title(title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["collectives", "training"])
    parser.add_argument("--model", choices=list(TASKS), default="gpt2")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each size, at least")
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="bytes of collectives")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    world = mz.init()
    torch.set_num_threads(1)
    dist.init_process_group(mpizero_torch.distributed.BACKEND)
    groups = {OURS: dist.group.WORLD, GLOO: dist.new_group(backend="gloo")}
    parts = {
        "collectives": partial(
            measure_collectives, world, groups, options.seconds, options.largest
        ),
        "training": partial(measure_training, world, groups, options.model, options.steps),
    }
    if world.rank == 0:
        print(f"{world.size} ranks")
    rows = [row for name, part in parts.items() if options.only in (None, name) for row in part()]
    if world.rank == 0 and options.json:
        found = {
            "kind": "distributed", "machine": machine.describe(), "ranks": world.size, "rows": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(found, indent=1))
    if world.rank == 0 and options.plot:
        plot(rows, f"torch.distributed on mpizero, {world.size} ranks", options.plot)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
