"""Saving and loading: ours beside torch.distributed.checkpoint, torch.save and the bare disk.

    mpirun -n 2 python benchmarks/checkpoint.py [--model gpt2] [--contestants zero3,dcp-fsdp2]

A model with fused AdamW's moments, all in float32. In every round each contestant, in an order
drawn anew, saves (until the checkpoint is on the disk), trains while it saves asynchronously, loads
with the kernel's cache of the files dropped ("cold"), loads again ("warm"), and must then be at the
loss that it had when it saved. Medians over the rounds; times are of the slowest rank, GB/s of the
checkpoint's bytes, also where every rank reads all of them. "Extra memory" is the most that saving
takes, and loading, over all ranks.

The bound is what plain calls make of as many bytes: blocks of 4 MiB written, then fsync, by one
process and by all at once into files of their own; the same read.

Of asynchronous saves: "blocked" is the time that the call takes; "slower" is how much longer steps
take that begin while the writing goes on; "durable" is the time from the call until the checkpoint
is on the disk (where steps are long, until the end of the one that was under way).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import disk
import machine
import numpy as np
import torch
import torch.distributed as dist
from contestants import CONTESTANTS, Trainer
from models import TASKS, Task
from savers import SAVERS, Saver

import mpizero_torch as mz
from mpizero import World

ROOT = Path(__file__).resolve().parents[1]
STEPS = 2  # before each asynchronous save, to compare with
BOUNDS = ("one process", "all ranks")
TOLERANCE = 1e-6  # of the loss after loading
CALLS = ("write", "cold", "warm")


class Lane:
    """A contestant in this run, and what it took in each round."""

    def __init__(self, key: str, trainer: Trainer) -> None:
        self.key, self.name = key, SAVERS[key].name
        self.trainer = trainer
        self.saver: Saver = SAVERS[key].build(trainer)
        self.rounds: list[dict[str, float]] = []
        self.nbytes = 0
        self.differs = False


class Bench:
    """What measures: the ranks, the folder, and the batches."""

    def __init__(self, world: World, folder: Path, task: Task) -> None:
        self.world, self.folder, self.task = world, folder, task
        self.batch = task.batch(world.rank)

    def timed(self, act: Callable[[], object]) -> float:
        """Seconds of the slowest rank, from a start in step; the disk is at rest before."""
        if self.world.rank == 0:
            os.sync()
        self.world.barrier()
        start = time.perf_counter()
        act()
        return float(self.world.allreduce(time.perf_counter() - start, "max"))

    def step(self, trainer: Trainer) -> float:
        start = time.perf_counter()
        trainer.backward(trainer.model(*self.batch))
        trainer.update()
        return time.perf_counter() - start

    def loss(self, trainer: Trainer) -> float:
        with torch.no_grad():
            found = trainer.model(*self.batch)
        return float(self.world.allreduce(found.item()) / self.world.size)

    def forget(self, path: Path) -> None:
        if self.world.rank == 0:
            disk.forget(path)

    def remove(self, path: Path) -> None:
        self.world.barrier()
        if self.world.rank == 0:
            disk.remove(path)
        self.world.barrier()

    def turn(self, lane: Lane) -> None:
        """One contestant's part of a round."""
        path, other = self.folder / lane.key, self.folder / f"{lane.key}-asynchronous"
        found: dict[str, float] = {}
        extra = disk.ExtraMemory()
        found["save"] = self.timed(lambda: lane.saver.save(path))
        found["save memory"] = self.world.allreduce(extra.most())
        lane.nbytes = disk.nbytes(path)
        before = self.loss(lane.trainer)
        if lane.saver.begin is not None:
            found.update(self.asynchronous(lane, other))
            self.remove(other)
        self.forget(path)
        extra = disk.ExtraMemory()
        found["cold"] = self.timed(lambda: lane.saver.load(path))
        found["load memory"] = self.world.allreduce(extra.most())
        found["warm"] = self.timed(lambda: lane.saver.load(path))
        # Not "greater than": a loss that is no number differs too.
        lane.differs |= not abs(self.loss(lane.trainer) - before) <= TOLERANCE * abs(before)
        self.remove(path)
        lane.rounds.append(found)

    def asynchronous(self, lane: Lane, path: Path) -> dict[str, float]:
        """Train while saving."""
        begin = lane.saver.begin
        assert begin is not None
        usual = statistics.mean(self.step(lane.trainer) for _ in range(STEPS))
        pending: list[Any] = []
        blocked = self.timed(lambda: pending.append(begin(path)))
        start = time.perf_counter() - blocked
        during = []
        while self.world.allreduce(int(pending[0].running()), "max"):
            during.append(self.step(lane.trainer))
        pending[0].wait()
        durable = time.perf_counter() - start
        slower = statistics.mean(during) / usual if during else 1.0
        each = self.world.allreduce(np.array([durable, slower]), "max")
        return {"blocked": blocked, "durable": float(each[0]), "slower": float(each[1])}

    def bounds(self, nbytes: int) -> dict[str, float]:
        """Seconds of plain calls for ``nbytes``, by who and what."""
        path = self.folder / f"plain-{self.world.rank}"
        found = {}
        for who, writers in zip(BOUNDS, (1, self.world.size), strict=True):
            own = nbytes // writers if self.world.rank < writers else 0
            acts = (partial(disk.write, path, own), partial(disk.read, path))
            found[f"{who}, write"] = self.timed(acts[0])
            disk.forget(path)
            found[f"{who}, cold"] = self.timed(acts[1])
            found[f"{who}, warm"] = self.timed(acts[1])
            disk.remove(path)
        return found


def main() -> None:
    options = parse()
    world = mz.init()
    torch.set_num_threads(1)
    store = world.broadcast_object(tempfile.mktemp())
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=world.rank, world_size=world.size
    )
    folder = tempfile.mkdtemp(prefix=".checkpoints-", dir=options.folder) if not world.rank else ""
    bench = Bench(world, Path(world.broadcast_object(folder)), TASKS[options.model](64))
    try:
        lanes, bounds = measure(bench, options)
    finally:
        bench.remove(bench.folder)
    rows = [row_of(lane) for lane in lanes]
    if world.rank == 0:
        report(options, world.size, rows, median_of(bounds))
    world.barrier()
    dist.destroy_process_group()


def measure(bench: Bench, options: argparse.Namespace) -> tuple[list[Lane], list[dict[str, float]]]:
    """All rounds. Whoever trains the same way shares a model, as memory is dear."""
    trainers: dict[str, Trainer] = {}
    lanes = []
    for key in options.contestants:
        name = SAVERS[key].trainer
        if name not in trainers:
            trainers[name] = CONTESTANTS[name].build(bench.task.model())
            bench.step(trainers[name])  # before that optimizers have no state
        lanes.append(Lane(key, trainers[name]))
    bounds = []
    order = random.Random(0)
    for turn in range(options.rounds):
        order.shuffle(lanes)
        for lane in lanes:
            bench.turn(lane)
        bounds.append(bench.bounds(lanes[0].nbytes))
        if bench.world.rank == 0:
            print(f"round {turn + 1} of {options.rounds} is over", flush=True)
    lanes.sort(key=lambda lane: options.contestants.index(lane.key))
    return lanes, bounds


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(TASKS), default="gpt2")
    parser.add_argument(
        "--contestants", type=keys, default=list(SAVERS), metavar="A,B,C",
        help=f"of {', '.join(SAVERS)}; default: all",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, default=ROOT, help="on the disk to measure; default: the project's"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def keys(text: str) -> list[str]:
    """What ``--contestants a,b,c`` means; for argparse."""
    chosen = [key.strip() for key in text.split(",") if key.strip()]
    for key in chosen:
        if key not in SAVERS:
            raise ArgumentTypeError(f"no contestant {key!r}; there are {', '.join(SAVERS)}")
    return list(dict.fromkeys(chosen))


def median_of(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}


def row_of(lane: Lane) -> dict[str, Any]:
    """Medians, and every round by itself."""
    found: dict[str, Any] = {"key": lane.key, "name": lane.name, "bytes": lane.nbytes}
    found.update(median_of(lane.rounds))
    return {**found, "differs": lane.differs, "rounds": lane.rounds}


def report(
    options: argparse.Namespace, ranks: int, rows: list[dict[str, Any]], bounds: dict[str, float]
) -> None:
    """Print a line for each contestant and bound, and write what was asked for."""
    nbytes = rows[0]["bytes"]
    title = f"{options.model}, {ranks} ranks, {nbytes / 1e9:.2f} GB"
    print(f"{title}; seconds (GB/s)")
    width = max(len(name) for name in (*(row["name"] for row in rows), *BOUNDS))
    for who in BOUNDS:
        cells = (speed(nbytes, bounds[f"{who}, {call}"]) for call in CALLS)
        print(
            f"  {who:<{width}}  " + "  ".join(f"{n} {c}" for n, c in zip(CALLS, cells, strict=True))
        )
    for row in rows:
        line = f"  {row['name']:<{width}}  "
        line += "  ".join(f"{n} {speed(row['bytes'], row[n])}" for n in ("save", *CALLS[1:]))
        line += (
            f"  extra memory {row['save memory'] / 2**20:.0f}, {row['load memory'] / 2**20:.0f} MiB"
        )
        if "blocked" in row:
            line += f"  blocked {row['blocked']:.2f} ({row['blocked'] / row['save']:.0%} of save)"
            line += f", durable {row['durable']:.2f}, steps x{row['slower']:.2f}"
        print(line + ("  DIFFERS" if row["differs"] else ""))
    if options.json:
        found = {
            "kind": "checkpoint", "machine": machine.describe(), "model": options.model,
            "ranks": ranks, "bounds": bounds, "rows": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(found, indent=1))
    if options.plot:
        plot(rows, bounds, title, options.plot)


def speed(nbytes: int, seconds: float) -> str:
    return f"{seconds:5.2f} ({nbytes / seconds / 1e9:4.2f})"


def plot(rows: list[dict[str, Any]], bounds: dict[str, float], title: str, path: Path) -> None:
    """Bars of GB/s for saving, loading, and of the seconds that training waits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 1.2 + 0.3 * len(rows)), sharey=True)
    names = [row["name"] for row in rows]
    for at, (what, call) in enumerate((("save", "write"), ("cold", "cold"))):
        axes[at].barh(names, [row["bytes"] / row[what] / 1e9 for row in rows])
        for who, style in zip(BOUNDS, (":", "--"), strict=True):
            bound = rows[0]["bytes"] / bounds[f"{who}, {call}"] / 1e9
            axes[at].axvline(bound, color="k", linestyle=style, label=f"plain {call}, {who}")
        axes[at].legend(fontsize=7)
    axes[0].set(xlabel="GB/s saved", title=title)
    axes[1].set(xlabel="GB/s loaded, cold")
    axes[2].barh(names, [row["save"] for row in rows], label="synchronous")
    axes[2].barh(names, [row.get("blocked", 0) for row in rows], height=0.5, label="asynchronous")
    axes[2].set(xlabel="seconds that training waits")
    axes[2].legend(fontsize=7)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
