"""A small training that saves itself, and that something happens to: what the kill campaign starts.

    mpirun -n 2 python tests/support/killed_training.py '[{"folder": ..., "log": ..., ...}]'

Rank 0 writes a line into the log for each thing that it has done, so that what a killed run did is
known to the last line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.data import TensorDataset

# Making an optimizer imports torch's compiler, which takes longer than the whole training does.
torch._dynamo = sys.modules["torch._dynamo"] = types.ModuleType("torch._dynamo")
torch._dynamo.disable = lambda function=None, recursive=True, **_: function
torch._dynamo.graph_break = lambda *_, **__: None

import mpizero_torch as mz  # noqa: E402
from mpizero.checkpoint import files  # noqa: E402

SAMPLES, BATCH = 40, 2


def build(stage: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Linear(6, 300), nn.Dropout(0.1), nn.Linear(300, 200), nn.Linear(200, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if stage:
        return mz.zero(model, optimizer, stage=stage)
    return mz.DistributedDataParallel(model), optimizer


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit("not reached")


class Fault:
    """What happens to this rank: nothing, unless it is one of ``ranks``."""

    def __init__(self, described: dict[str, Any] | None, rank: int) -> None:
        mine = described is not None and rank in described["ranks"]
        self._described = described if mine else None
        if self._described is not None and "call" in self._described:
            self._replace(self._described)

    def begin(self, step: int) -> None:
        """A step begins: some faults come so many seconds later."""
        fault = self._described
        if fault is not None and fault.get("step") == step:
            killer = threading.Timer(fault["after"], die)
            killer.daemon = True
            killer.start()

    def _replace(self, fault: dict[str, Any]) -> None:
        """Let the n-th call of a function of the file layer be the last, or fail; or slow all."""
        function = getattr(files, fault["call"])
        calls = 0

        def faulty(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            time.sleep(fault.get("slow", 0.0))
            if not fault["first"] <= calls < fault["first"] + fault["calls"]:
                return function(*arguments)
            if "errno" in fault:
                raise OSError(fault["errno"], os.strerror(fault["errno"]))
            if fault["moment"] == "half":  # only of writes
                handle, data, place = arguments
                half = memoryview(data).cast("B")[: memoryview(data).nbytes // 2]
                function(handle, half, place)
            elif fault["moment"] == "after":
                function(*arguments)
            die()

        setattr(files, fault["call"], faulty)


def train(config: dict[str, Any], world: mz.World) -> None:
    """From the last checkpoint, or the beginning, to the end."""
    log = os.open(config["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(*what: object) -> None:
        if world.rank == 0:
            os.write(log, (" ".join(map(str, what)) + "\n").encode())

    fault = Fault(config["fault"], world.rank)
    model, optimizer = build(config["stage"])
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["steps"])
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.rand(SAMPLES, 6, generator=generator))
    loader = mz.shard(data, batch_size=BATCH, seed=5)
    manager = mz.CheckpointManager(
        config["folder"], keep=config["keep"], every_steps=config["every"],
        asynchronous=config["asynchronous"],
        model=model, optimizer=optimizer, scheduler=rate, loader=loader,
    )  # fmt: skip
    first = manager.restore_latest() or 0
    tell("from", first)
    under_way = None
    for step, (x,) in zip(range(first, config["steps"]), endless(loader), strict=False):
        fault.begin(step)
        loss = (model(x).squeeze() - x.sum(1)).square().mean()
        loss.backward()
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        tell("loss", step, mz.mean(loss).hex())
        try:
            saved = manager.step(step + 1)
        except mz.CheckpointError:
            tell("failed", step + 1)
            under_way = None
        else:
            if saved and config["asynchronous"]:  # it has waited for the one before
                saved, under_way = under_way is not None, step + 1
            if saved:
                tell("saved", step + 1 - (config["every"] if config["asynchronous"] else 0))
    try:
        manager.wait()
    except mz.CheckpointError:
        tell("failed", config["steps"])
    tell("done")


def main() -> None:
    world = mz.init()
    for config in json.loads(sys.argv[1]):
        train(config, world)


if __name__ == "__main__":
    main()
