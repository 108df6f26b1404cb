"""A small elastic training that ranks are killed in, and the same without: for the elastic tests.

    mpirun --with-ft ulfm -n 3 python tests/support/elastic_training.py '{"stage": 2, ...}'

Rank 0 of whoever is left writes a line into the log for each thing that has been done. A list of
configurations asks for references: each has "segments", [first step, ranks] in turn, every one on
so many ranks, from what the one before has saved on disk. Nobody dies there.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import types
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.data import TensorDataset

# Making an optimizer imports torch's compiler, which takes longer than the whole training does.
torch._dynamo = sys.modules["torch._dynamo"] = types.ModuleType("torch._dynamo")
torch._dynamo.disable = lambda function=None, recursive=True, **_: function
torch._dynamo.graph_break = lambda *_, **__: None
torch._dynamo.OptimizedModule = type("OptimizedModule", (), {})

import mpizero_torch as mz  # noqa: E402
from mpizero.elastic.store import Slot  # noqa: E402

SAMPLES, BATCH = 61, 4  # an epoch is no whole number of steps


class Centre(nn.Module):
    """What batch norm does to buffers, for batches of one sample too."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


class Net(nn.Module):
    """Every kind of state: dropout draws, there is a buffer, and two layers are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 200)
        self.norm = Centre(200)
        self.middle = nn.Linear(200, 200)
        self.tied = nn.Linear(200, 200)
        self.tied.weight = self.middle.weight
        self.last = nn.Linear(200, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(self.norm(self.first(x)), 0.1, self.training)
        return self.last(torch.tanh(self.tied(torch.tanh(self.middle(x))))).squeeze(1)


def build(config: dict[str, Any], world: mz.World) -> dict[str, Any]:
    torch.manual_seed(7)
    model: Any = Net()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    options = {"share_parameters": config.get("share")} if config["stage"] else {}
    model, optimizer = mz.zero(
        model, optimizer, config["stage"], world=world, segment_mb=0.05, **options
    )
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["steps"])
    data = TensorDataset(torch.rand(SAMPLES, 6, generator=torch.Generator().manual_seed(3)))
    loader = mz.shard(data, batch_size=BATCH, seed=5, world=world)
    return {"model": model, "optimizer": optimizer, "scheduler": rate, "loader": loader}


def one_step(run: Any, x: torch.Tensor, world: mz.World) -> float:
    loss = (run["model"](x) - x.sum(1)).square().mean()
    loss.backward()
    run["optimizer"].step()
    run["scheduler"].step()
    run["optimizer"].zero_grad()
    return float(mz.mean(loss, world=world))


def die(log: Path) -> NoReturn:
    tell(log, "killed", time.time())
    os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit("not reached")


def tell(log: Path, *what: object) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, (" ".join(map(str, what)) + "\n").encode())
    os.close(handle)


class Kill:
    """When this process dies, if it is to; ``who`` it was at first."""

    def __init__(self, kills: list[dict[str, Any]], who: int, log: Path) -> None:
        self._kills = [each for each in kills if who in each["ranks"]]
        self._log = log

    def prepare(self, run: dict[str, Any], step: int) -> None:
        """A step begins: see to it that this process dies at its moment, if it is in this one."""
        for kill in self._kills:
            if kill["step"] != step:
                continue
            if kill["moment"] == "between":
                die(self._log)
            elif kill["moment"] == "backward":
                middle = run["model"].module.last
                middle.bias.register_hook(lambda _: die(self._log))
            elif kill["moment"] == "update":
                self._in_the_middle_of(run["optimizer"])
            elif kill["moment"] == "commit":
                Slot.write = lambda slot, *_: self._half_a_commit(slot)  # type: ignore[method-assign]
            else:
                killer = threading.Timer(float(kill["moment"]), die, (self._log,))
                killer.daemon = True
                killer.start()

    def _in_the_middle_of(self, optimizer: Any) -> None:
        inner = getattr(optimizer, "inner", optimizer)
        inner.register_step_post_hook(lambda *_: die(self._log))

    def _half_a_commit(self, slot: Slot) -> NoReturn:
        slot.memory[:8] = 0
        slot.memory[64 : len(slot.memory) // 2] = 255
        die(self._log)


def survive(config: dict[str, Any]) -> None:
    """Train under ``elastic``, and be killed."""
    world = mz.init(elastic=True)
    log = Path(config["log"])
    kill = Kill(config["kills"], world.rank, log)

    @mz.elastic
    def train(state: mz.ElasticState) -> None:
        world = state.world
        if world.rank == 0:
            tell(log, "begin", state.step, world.size, state.loader.global_batch_size)
        run = {name: getattr(state, name) for name in ("model", "optimizer", "scheduler")}
        while state.step < config["steps"]:
            for (x,) in state.loader:
                kill.prepare(run, state.step)
                loss = one_step(run, x, world)
                if world.rank == 0:
                    tell(log, "loss", state.step, loss.hex(), time.time())
                state.step += 1
                state.seen = [*state.seen[-2:], state.step]
                if state.step % config.get("every", 1) == 0:
                    state.commit()
                if state.step == config["steps"]:
                    break

    state = mz.ElasticState(
        lambda world: build(config, world),
        redundancy=config.get("redundancy", 0), checkpoints=config.get("checkpoints"),
        step=0, seen=[],
    )  # fmt: skip
    train(state)
    if state.world.rank == 0:
        tell(log, "done", state.world.size, *state.seen, state.committed_bytes)


def reference(config: dict[str, Any]) -> None:
    """The same on smaller and smaller worlds, by way of checkpoints on disk."""
    everyone = mz.init()
    log, folder = Path(config["log"]), Path(config["folder"])
    segments = [*config["segments"], [config["steps"], 0]]
    for (first, ranks), (stop, _) in pairwise(segments):
        world = everyone.split(0 if everyone.rank < ranks else None)
        if world is not None:
            run = build(config, world)
            run["loader"].global_batch_size = config["batch"]
            if first > 0:
                mz.load(folder / f"step-{first:08}", world=world, **run)
            step = first
            while step < stop:
                for (x,) in run["loader"]:
                    loss = one_step(run, x, world)
                    if world.rank == 0:
                        tell(log, "loss", step, loss.hex(), time.time())
                    step += 1
                    if step == stop:
                        break
            mz.save(folder / f"step-{stop:08}", world=world, extra={"step": stop}, **run)
        everyone.barrier()


if __name__ == "__main__":
    # Where it hangs, if it does; by a thread of Python's: faulthandler's own crashes slow ranks.
    alarm = threading.Timer(40, faulthandler.dump_traceback)
    alarm.daemon = True
    alarm.start()
    settings = json.loads(sys.argv[1])
    if isinstance(settings, list):
        for each in settings:
            reference(each)
    else:
        survive(settings)
