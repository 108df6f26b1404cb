"""Who takes part in checkpoint.py: each saves and loads a model with its optimizer its own way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import disk
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from contestants import Trainer
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import mpizero_torch as mz


class Pending(Protocol):
    """A save under way."""

    def running(self) -> bool: ...

    def wait(self) -> None: ...


class Saver(Protocol):
    """All collective. ``begin`` is None for those who cannot save while training goes on."""

    begin: Callable[[Path], Pending] | None

    def save(self, path: Path) -> None: ...

    def load(self, path: Path) -> None: ...


class Ours:
    """``mz.save``: on the disk when it returns."""

    def __init__(self, trainer: Trainer) -> None:
        self.run: dict[str, Any] = {"model": trainer.model, "optimizer": trainer.optimizer}

    def save(self, path: Path) -> None:
        mz.save(path, **self.run)

    def load(self, path: Path) -> None:
        mz.load(path, **self.run)

    def begin(self, path: Path) -> Pending:
        pending = mz.save(path, **self.run, asynchronous=True)
        assert pending is not None
        return _Ours(pending)


class _Ours:
    def __init__(self, pending: Any) -> None:
        self.pending = pending

    def running(self) -> bool:
        return bool(self.pending.running)

    def wait(self) -> None:
        self.pending.wait()


class DistributedCheckpoint:
    """``torch.distributed.checkpoint`` as its tutorial has it; its files are fsynced."""

    def __init__(self, trainer: Trainer) -> None:
        self.model, self.optimizer = trainer.model, trainer.optimizer
        self.group = dist.new_group(backend="gloo")  # a thread must not meet the steps' messages

    def save(self, path: Path) -> None:
        dcp.save(self._state(), checkpoint_id=path)

    def load(self, path: Path) -> None:
        state = self._state()
        dcp.load(state, checkpoint_id=path)
        set_state_dict(
            self.model, self.optimizer,
            model_state_dict=state["model"], optim_state_dict=state["optimizer"],
        )  # fmt: skip

    def begin(self, path: Path) -> Pending:
        return _Future(dcp.async_save(self._state(), checkpoint_id=path, process_group=self.group))

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}


class _Future:
    def __init__(self, future: Any) -> None:
        self.future = future

    def running(self) -> bool:
        return not self.future.done()

    def wait(self) -> None:
        self.future.result()


class OneFile:
    """``torch.save`` on rank 0, with the fsync that it leaves out; every rank loads the file."""

    begin = None

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.model = trainer.model.module  # type: ignore[attr-defined]  # in torch's DDP

    def save(self, path: Path) -> None:
        if dist.get_rank() == 0:
            state = {"model": self.model, "optimizer": self.trainer.optimizer}
            torch.save({name: each.state_dict() for name, each in state.items()}, path)
            disk.sync(path)
        dist.barrier()

    def load(self, path: Path) -> None:
        found = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(found["model"])
        self.trainer.optimizer.load_state_dict(found["optimizer"])


@dataclass(frozen=True)
class Contestant:
    """The name in tables, who trains (a key of ``contestants.CONTESTANTS``), and who saves."""

    name: str
    trainer: str
    build: Callable[[Trainer], Saver]


# By the name on the command line.
SAVERS = {
    "ddp": Contestant("mpizero, DDP", "mpizero-ddp", Ours),
    "zero1": Contestant("mpizero, ZeRO-1", "zero1", Ours),
    "zero3": Contestant("mpizero, ZeRO-3", "zero3", Ours),
    "dcp-fsdp2": Contestant("torch DCP, FSDP2", "fsdp2", DistributedCheckpoint),
    "dcp-ddp": Contestant("torch DCP, DDP", "torch-ddp", DistributedCheckpoint),
    "torch-save": Contestant("torch.save on rank 0, DDP", "torch-ddp", OneFile),
}
