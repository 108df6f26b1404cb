"""The trainings of the fault campaign: replicas, shards, and one that survives deaths."""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

# Making an optimizer imports torch's compiler, which takes longer than the whole training does.
torch._dynamo = sys.modules["torch._dynamo"] = types.ModuleType("torch._dynamo")
torch._dynamo.disable = lambda function=None, recursive=True, **_: function
torch._dynamo.graph_break = lambda *_, **__: None
torch._dynamo.OptimizedModule = type("OptimizedModule", (), {})

import mpizero_torch as mz  # noqa: E402
from mpizero.checkpoint import files  # noqa: E402

BATCH, WIDTH, EVERY = 4, 200, 2
TENSORS = ("first", "middle", "last")


class Net(nn.Module):
    """Three layers, in the given order, of which the middle one may be ``width`` wide."""

    def __init__(self, order: tuple[str, ...] = TENSORS, width: int = WIDTH) -> None:
        super().__init__()
        shapes = {"first": (6, WIDTH), "middle": (WIDTH, width), "last": (width, 1)}
        for name in order:
            self.add_module(name, nn.Linear(*shapes[name]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.middle(x))).squeeze(1)


class Samples(Dataset[torch.Tensor]):
    """Of which one may be the last that a worker process of the loader reads."""

    def __init__(self, act: str, log: str, steps: int) -> None:
        self.act, self.log, self.steps = act, log, steps
        self.read = 0

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read += 1
        if self.act and self.read > self.steps * BATCH:
            with open(self.log, "a") as file:
                file.write(f"fault {time.time()} {self.steps}\n")
            if self.act == "raise":
                raise ValueError("injected: a sample cannot be read")
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((6,), index / 1000)


def build(fault: Any) -> tuple[Any, Any]:
    """Model and optimizer as the configuration says, this rank's its own if it is the culprit."""
    torch.manual_seed(7)
    model: Any = fault.at("model") or Net()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = fault.config
    kind = config["training"]
    if kind == "ddp":
        model = mz.DistributedDataParallel(model, bucket_cap_mb=0.05)
    else:
        model, optimizer = mz.zero(
            model, optimizer, int(kind[-1]), segment_mb=0.05, **config["zero"]
        )
    watch(fault, model, optimizer)
    return model, optimizer


def watch(fault: Any, model: Any, optimizer: Any) -> None:
    """Tell the fault of the moments within a step."""
    model.module.middle.register_forward_pre_hook(lambda *_: fault.at("forward"))
    model.module.middle.bias.register_hook(lambda _: fault.at("backward"))
    inner = getattr(optimizer, "inner", optimizer)
    inner.register_step_pre_hook(lambda *_: fault.at("update"))
    write_at = files.write_at

    def write(*arguments: Any) -> None:
        fault.at("save")
        write_at(*arguments)

    files.write_at = write


def train(fault: Any) -> None:
    """With a checkpoint every second step."""
    if fault.config["training"] == "elastic":
        survive(fault)
        return
    fault.acts.update(ACTS)
    config = fault.config
    world = fault.world = mz.init()
    fault.model, fault.optimizer = model, optimizer = build(fault)
    in_worker = fault.is_culprit and config["moment"] == "worker"
    samples = Samples(config["act"] if in_worker else "", config["log"], config["step"])
    loader: Any = mz.shard(
        DataLoader(samples, BATCH, num_workers=int(config["moment"] == "worker"))
    )
    guard = mz.PreemptionGuard() if config["act"] == "SIGTERM, guarded" else None
    manager = mz.CheckpointManager(
        config["folder"], keep=2, every_steps=EVERY, asynchronous=config["asynchronous"],
        guard=guard, model=model, optimizer=optimizer,
    )  # fmt: skip
    finite = config["act"] == "nan"
    for fault.step, x in zip(range(manager.restore_latest() or 0, config["steps"]), loader):  # noqa: B905
        if fault.at("before") == "leave":
            break
        with mz.detect_nonfinite(model) if finite else nullcontext():
            loss = (model(x) - x.sum(1)).square().mean()
            loss = loss * (fault.at("loss") or 1.0)
            if fault.at("instead of backward") != "skip":
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        fault.at("after")
        if config["act"] == "diverge":
            mz.assert_in_sync(model, optimizer)
        try:
            manager.step(fault.step + 1)
        except mz.CheckpointError as error:
            if not config["catches"]:
                raise
            print(f"caught on rank {world.rank}: {error}", file=sys.stderr, flush=True)
        fault.step_done()
    manager.wait()


def survive(fault: Any) -> None:
    """The training of the elastic campaign."""
    from elastic_training import build as build_elastic
    from elastic_training import one_step

    fault.acts.update(ACTS)
    fault.world = mz.init(elastic=True)
    config = {"stage": fault.config["stage"], "steps": fault.config["steps"]}

    @mz.elastic
    def train(state: mz.ElasticState) -> None:
        run = {name: getattr(state, name) for name in ("model", "optimizer", "scheduler")}
        watch(fault, state.model, state.optimizer)
        while state.step < config["steps"]:
            for (x,) in state.loader:
                fault.step = state.step
                fault.at("before")
                one_step(run, x, state.world)
                fault.at("after")
                fault.step_done()
                state.step += 1
                state.commit()
                if state.step == config["steps"]:
                    break

    train(mz.ElasticState(lambda world: build_elastic(config, world), step=0))


def save_alone(fault: Any) -> None:
    mz.save(Path(fault.config["folder"]) / "step-00000099", model=fault.model)


def evaluate_alone(fault: Any) -> None:
    with torch.no_grad():
        fault.model(torch.ones(1, 6))


def diverge(fault: Any) -> None:
    with torch.no_grad():
        fault.model.module.middle.weight[3, 4] += 1e-6


def send_sigterm(fault: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def frozen(fault: Any) -> Net:
    model = Net()
    model.first.weight.requires_grad_(False)
    return model


def freeze(fault: Any) -> None:
    fault.model.module.first.weight.requires_grad_(False)


# Of the moment "model" what is returned is the culprit's model.
ACTS = {
    "another order": lambda fault: Net(("middle", "first", "last")),
    "another width": lambda fault: Net(width=WIDTH + 1),
    "another layer": lambda fault: nn.Sequential(Net(), nn.Identity(), nn.Linear(1, 1)),
    "frozen": frozen,
    "freeze": freeze,
    "skip": lambda fault: "skip",
    "nan": lambda fault: float("nan"),
    "save alone": save_alone,
    "evaluate alone": evaluate_alone,
    "diverge": diverge,
    "SIGTERM, guarded": send_sigterm,
}
