"""What a program makes again and again does not add up: it goes as often as it likes."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mpizero
import mpizero_torch as mz
import mpizero_torch.distributed
import mpizero_torch.horovod as hvd
from mpizero.diagnostics.current import recorder
from mpizero.world import holdings

two_ranks = pytest.mark.parallel([2])

_ROUNDS = 12
_PROBES = 600  # more communicators than there have ever been


class Facts(NamedTuple):
    """What the process has. None of it may grow with every round."""

    held: int
    files: int
    threads: int
    maps: int
    shared_kib: int
    texts: int
    objects: int

    @classmethod
    def now(cls) -> Facts:
        gc.collect()
        mpizero.init().split(None)  # makes nothing, and gives back what there is
        maps = Path("/proc/self/maps").read_text().splitlines()
        shared = [line.split()[0].split("-") for line in maps if "/dev/shm/" in line]
        return cls(
            holdings.held(),
            len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")),
            len(maps),
            sum(int(end, 16) - int(start, 16) for start, end in shared) >> 10,
            recorder().texts.nbytes,
            len(gc.get_objects()),
        )


def last_communicator() -> int:
    """MPI's number for the last of many new communicators: all that were given back are among them.

    So it grows by one for each that was not. Which numbers are in use is of no matter.
    """
    probes = [MPI.COMM_SELF.Dup() for _ in range(_PROBES)]
    last = max(probe.py2f() for probe in probes)
    for probe in probes:
        probe.Free()
    return last


def nothing_adds_up(once: Callable[[], None]) -> None:
    def rounds() -> tuple[Facts, int]:
        gc.disable()  # or when cycles go would be chance
        try:
            for _ in range(_ROUNDS):
                once()
        finally:
            gc.enable()
        return Facts.now(), last_communicator()

    before, last = rounds()
    after, last_after = rounds()
    grown = {name: b - a for name, a, b in zip(Facts._fields, before, after, strict=True)}
    objects, texts = grown.pop("objects"), grown.pop("texts")
    # Half of a thing a round, or a text's bytes, is less than anything has. Of objects a World has
    # dozens; torch keeps up to four for each group that there has been.
    assert max(grown.values()) < _ROUNDS / 2, grown
    assert last_after - last < _ROUNDS / 2
    assert texts < 2 * _ROUNDS and objects < 5 * _ROUNDS, (texts, objects)


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))


def step(wrapped: torch.nn.Module, optimizer: Any = None) -> None:
    wrapped(torch.ones(4, 64)).sum().backward()
    if optimizer is not None:
        optimizer.step()


def ddp() -> None:
    wrapped = mz.DistributedDataParallel(model())
    step(wrapped, torch.optim.SGD(wrapped.parameters(), 0.1))


def zero(stage: int) -> None:
    made = model()
    step(*mz.zero(made, torch.optim.AdamW(made.parameters()), stage=stage))


def split() -> None:
    world = mpizero.init()
    part = world.split(0, world.rank)
    assert part is not None
    part.allreduce(np.ones(3))
    part.close()


def subworld(in_order: bool = False, asynchronous: bool = False) -> None:
    world = mpizero.init()
    part = world.subworld([0, 1], in_order=in_order)
    assert part is not None
    handle = part.allreduce(np.ones(3), asynchronous=asynchronous)
    if asynchronous:
        assert (handle.wait() == 2).all()
        part.send(np.ones(2), part.rank, asynchronous=True)  # and nobody receives it


def of_a_communicator() -> None:
    comm = MPI.COMM_WORLD.Dup()
    mpizero.init(comm).barrier()
    comm.Free()


def mesh() -> None:
    made = mz.mesh(tp=2)
    made.tp.allreduce(np.ones(3))
    made["tp", "sp"].barrier()


def refused() -> None:
    world = mpizero.init()
    with pytest.raises(mpizero.MismatchError):
        world.subworld([world.rank, 1 - world.rank])


def failed() -> None:
    """An error on all ranks, and another that only one has; whoever keeps it keeps the World."""
    world = mpizero.init()
    part = world.subworld([0, 1])
    assert part is not None
    with pytest.raises(mpizero.MismatchError):
        part.allreduce(np.ones(3 + part.rank), asynchronous=True).wait()
    with pytest.raises(mpizero.MismatchError if part.rank else mpizero.ArgumentError):
        part.allreduce(np.ones(3), op="sum" if part.rank else "nonsense")


CORE = {
    "ddp": ddp,
    "zero1": lambda: zero(1),
    "zero2": lambda: zero(2),
    "zero3": lambda: zero(3),
    "split": split,
    "subworld": subworld,
    "subworld in order": lambda: subworld(in_order=True, asynchronous=True),
    "subworld asynchronous": lambda: subworld(asynchronous=True),
    "communicator": of_a_communicator,
    "mesh": mesh,
    "refused": refused,
    "failed": failed,
}


@two_ranks
@pytest.mark.parametrize("mode", CORE)
def test_worlds_and_wrapped_models(mode: str) -> None:
    nothing_adds_up(CORE[mode])


@two_ranks
def test_saved_models(tmp_path: Path) -> None:
    folder = mpizero.init().broadcast_object(str(tmp_path / "run"))

    def save() -> None:
        wrapped = mz.DistributedDataParallel(model())
        optimizer = torch.optim.AdamW(wrapped.parameters())
        step(wrapped, optimizer)
        mz.save(folder, model=wrapped, optimizer=optimizer)

    nothing_adds_up(save)
    mpizero.init().barrier()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def horovod() -> Iterator[None]:
    hvd.init()
    yield
    hvd.shutdown()


def process_set() -> None:
    some = hvd.add_process_set([0, 1])
    hvd.allreduce(torch.ones(3), process_set=some)
    hvd.remove_process_set(some)


def optimizer() -> None:
    made = model()
    named = made.named_parameters()
    step(made, hvd.DistributedOptimizer(torch.optim.SGD(made.parameters(), 0.1), named))


def start_anew() -> None:
    hvd.shutdown()
    hvd.init([0, 1], [hvd.ProcessSet([0]), hvd.ProcessSet([1])])
    hvd.allreduce(torch.ones(3))


HOROVOD = {"process set": process_set, "optimizer": optimizer, "start anew": start_anew}


@two_ranks
@pytest.mark.parametrize("mode", HOROVOD)
def test_horovod(horovod: None, mode: str) -> None:
    nothing_adds_up(HOROVOD[mode])


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("mpizero")
    yield
    dist.destroy_process_group()


def new_group() -> None:
    group = dist.new_group([0, 1])
    dist.all_reduce(torch.ones(3), group=group)
    dist.all_reduce(torch.ones(3), group=group, async_op=True).wait()
    dist.destroy_process_group(group)


def c10d_ddp() -> None:
    step(torch.nn.parallel.DistributedDataParallel(model()))


def fsdp() -> None:
    made = model()
    fully_shard(made)
    step(made)


def all_groups_anew() -> None:
    dist.new_group([0, 1])
    dist.destroy_process_group()
    dist.init_process_group("mpizero")


def device_mesh() -> None:
    made = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    dist.all_reduce(torch.ones(3), group=made.get_group("tp"))
    dist.destroy_process_group(made.get_group("dp"))  # the other is the default one


def mesh_for_torch() -> None:
    made = mz.mesh(tp=2)
    dist.all_reduce(torch.ones(3), group=made.device_mesh.get_group("dp"))
    made.close()


DISTRIBUTED = {
    "new group": new_group,
    "ddp": c10d_ddp,
    "fsdp": fsdp,
    "all anew": all_groups_anew,
    "device mesh": device_mesh,
    "mesh": mesh_for_torch,
}


@two_ranks
@pytest.mark.parametrize("mode", DISTRIBUTED)
def test_torch_distributed(process_group: None, mode: str) -> None:
    nothing_adds_up(DISTRIBUTED[mode])


@two_ranks
def test_more_groups_than_mpi_has_communicators(process_group: None) -> None:
    """MPICH has 2048; a group takes six."""
    for _ in range(360):
        group = dist.new_group([0, 1])
        dist.destroy_process_group(group)
