"""What fails on one rank in what all ranks do with a training: the others are told, and go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import mpizero
import mpizero_torch as mz
import mpizero_torch.horovod as hvd
from mpizero import ArgumentError, CheckpointError, MismatchError, MpizeroError, World, checkpoint
from mpizero.checkpoint.aside import Aside
from mpizero.optim import SGD
from mpizero_torch.process_group import ensure_process_group

several_ranks = pytest.mark.parallel([2, 3, 4])
each_rank = pytest.mark.parametrize("culprit", [0, -1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same on all ranks: rank 0's."""
    return Path(mz.init().broadcast_object(str(tmp_path)))


class Scheduler:
    def __init__(self, bad: bool = False) -> None:
        self.bad = bad

    def state_dict(self) -> dict[str, int]:
        return {"step": 1 // (not self.bad)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert not self.bad, "not this state"


class StateLess(torch.optim.SGD):
    """An optimizer whose state cannot be had, or taken over."""

    def state_dict(self) -> Any:
        raise OSError("no state here")

    def load_state_dict(self, state_dict: Any) -> None:
        raise OSError("no state here")


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    return model, torch.optim.AdamW(model.parameters())


def plain_zero(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = build()
    found: tuple[nn.Module, torch.optim.Optimizer] = mz.zero(model, optimizer, **options)
    return found


def zero_of_others(bad: bool) -> None:
    model, optimizer = build()
    mz.zero(model, build()[1] if bad else optimizer)


def initialise(bad: bool, **options: Any) -> None:
    def fill(module: nn.Module) -> None:
        if bad and isinstance(module, nn.Linear) and module.out_features == 2:
            raise OSError("no numbers")
        module.reset_parameters()  # type: ignore[operator]

    with mz.deferred():
        model, optimizer = build()
    mz.zero(model, optimizer, initialise=fill, **options)


def load_state(bad: bool) -> None:
    model, _ = plain_zero(stage=3)
    model.load_state_dict({"w": torch.zeros(1)} if bad else build()[0].state_dict())


def change_whole(bad: bool) -> None:
    model, _ = plain_zero(stage=3, share_parameters=False)
    with mz.gathered(model, modify=True) as inner:
        if bad:
            raise OSError("no change")
        next(inner.parameters()).data.zero_()


def step_of_arrays(bad: bool) -> None:
    world = mz.init()
    parameters = mpizero.ShardedState.scatter({"w": np.ones(4)}, world)
    SGD(parameters).step({"w": [1.0] * 4 if bad else np.ones(4)})


def scatter(bad: bool) -> None:
    mpizero.ShardedState.scatter({"w": [1.0] if bad else np.ones(1)}, mz.init())


def managed(folder: Path, **options: Any) -> mz.CheckpointManager:
    return mz.CheckpointManager(folder / "run", **options)


Do = Callable[[World, bool, Path], Any]

# (what all ranks do, the culprit's own error, what the others hear of it)
FAULTS: dict[str, tuple[Do, type[Exception], str]] = {
    "save: a function": (
        lambda w, bad, f: mz.save(f / "c", extra={"f": len if bad else 1}), ArgumentError, "pickle"
    ),
    "save: deep": (
        lambda w, bad, f: mz.save(f / "c", extra={"x": nested(150 if bad else 50)}),
        ArgumentError, "nested",
    ),
    "save: a scheduler": (
        lambda w, bad, f: mz.save(f / "c", scheduler=Scheduler(bad)), ZeroDivisionError, "division"
    ),
    "save: a writer": (
        lambda w, bad, f: mz.save(f / "c", writer="pen" if bad else "posix"), ArgumentError, "pen"
    ),
    "save: no path": (lambda w, bad, f: mz.save(None if bad else f / "c"), TypeError, "None"),
    "save of the core": (
        lambda w, bad, f: checkpoint.save(f / "c", {"x": len if bad else 1}, w),
        ArgumentError, "pickle",
    ),
    "load: no path": (lambda w, bad, f: mz.load(None if bad else f / "saved"), TypeError, "None"),
    "load: a scheduler": (
        lambda w, bad, f: mz.load(f / "saved", scheduler=Scheduler(bad)), AssertionError, "not this"
    ),
    "load: what was not saved": (
        lambda w, bad, f: mz.load(f / "saved", loader=Scheduler() if bad else None),
        ArgumentError, "loader",
    ),
    "manager": (lambda w, bad, f: managed(f, keep=0 if bad else 1), ArgumentError, "keep"),
    "manager: save": (
        lambda w, bad, f: managed(f).save(1, x=len if bad else 1), ArgumentError, "pickle"
    ),
    "zero: stage": (lambda w, bad, f: plain_zero(stage=5 if bad else 2), ArgumentError, "stage"),
    "zero: optimizer": (lambda w, bad, f: zero_of_others(bad), ArgumentError, "not the model's"),
    "zero: initialise": (lambda w, bad, f: initialise(bad), OSError, "no numbers"),
    "zero: initialise, sharded": (
        lambda w, bad, f: initialise(bad, stage=3, share_parameters=False), OSError, "no numbers"
    ),
    "state_dict": (
        lambda w, bad, f: plain_zero()[0].state_dict(root=99 if bad else 0), ArgumentError, "99"
    ),
    "load_state_dict": (lambda w, bad, f: load_state(bad), RuntimeError, "Missing key"),
    "gathered": (lambda w, bad, f: change_whole(bad), OSError, "no change"),
    "mean": (lambda w, bad, f: mz.mean("much" if bad else 1.0), Exception, "'str'"),
    "mean: weight": (
        lambda w, bad, f: mz.mean(1.0, weight="all" if bad else 1.0), ValueError, "all"  # type: ignore[arg-type]
    ),
    "clip": (
        lambda w, bad, f: mz.clip_grad_norm_(plain_zero()[0], "x" if bad else 1.0),  # type: ignore[arg-type]
        ValueError, "'x'",
    ),
    "in sync": (
        lambda w, bad, f: mz.assert_in_sync(3 if bad else build()[0], world=w),  # type: ignore[arg-type]
        AttributeError, "'int'",
    ),
    "arrays: scatter": (lambda w, bad, f: scatter(bad), AttributeError, "dtype"),
    "arrays: step": (lambda w, bad, f: step_of_arrays(bad), ArgumentError, "a list"),
    "hvd: number": (
        lambda w, bad, f: hvd.allreduce(3.0 if bad else torch.ones(2)),  # type: ignore[arg-type]
        ArgumentError, "float",
    ),
    "hvd: op": (
        lambda w, bad, f: hvd.synchronize(
            hvd.allreduce_async_(torch.ones(2), name="x", op="sum" if bad else hvd.Sum)  # type: ignore[arg-type]
        ),
        ArgumentError, "hvd.Sum",
    ),
    "hvd: root": (
        lambda w, bad, f: hvd.broadcast(torch.ones(2), 99 if bad else 0), ArgumentError, "99"
    ),
    "hvd: rows": (
        lambda w, bad, f: hvd.allgather([1] if bad else torch.ones(2)),  # type: ignore[arg-type]
        ArgumentError, "tensors",
    ),
    "hvd: splits": (
        lambda w, bad, f: hvd.alltoall(torch.ones(w.size), [0] if bad else [1] * w.size),
        ArgumentError, "splits",
    ),
    "hvd: parts": (
        lambda w, bad, f: hvd.reducescatter(None if bad else torch.ones(4)),  # type: ignore[arg-type]
        ArgumentError, "NoneType",
    ),
    "hvd: sparse": (
        lambda w, bad, f: hvd.sparse_allreduce_async(
            torch.ones(3) if bad else torch.ones(3).to_sparse()
        ).wait(),
        ArgumentError, "sparse",
    ),
    "hvd: objects": (
        lambda w, bad, f: hvd.allgather_object((lambda: 1) if bad else 1), Exception, "lambda"
    ),
    "hvd: parameters": (
        lambda w, bad, f: hvd.broadcast_parameters({"w": 1.0 if bad else torch.ones(2)}, 0),
        ArgumentError, "float",
    ),
    "hvd: optimizer": (
        lambda w, bad, f: hvd.DistributedOptimizer(build()[1], op=3 if bad else hvd.Sum),  # type: ignore[arg-type]
        ArgumentError, "op",
    ),
    "hvd: set": (lambda w, bad, f: hvd.add_process_set([0, 99 if bad else 1]), ArgumentError, "99"),
    "torch: list": (
        lambda w, bad, f: dist.all_gather(
            [torch.ones(2) for _ in range(w.size + bad)], torch.ones(2)
        ),
        ValueError, "by rank",
    ),
    "torch: dtype": (
        lambda w, bad, f: dist.all_reduce(
            torch.ones(2).to(torch.float8_e4m3fnuz if bad else torch.float32)
        ),
        Exception, "Float8_e4m3fnuz",
    ),
    "torch: reduce_scatter": (
        lambda w, bad, f: dist.reduce_scatter(
            torch.ones(2), [torch.ones(2) for _ in range(w.size + bad)]
        ),
        ValueError, "tensors for",
    ),
}  # fmt: skip


@pytest.fixture
def _started() -> Iterator[None]:
    hvd.init()
    yield
    hvd.shutdown()


def goes_on(world: World) -> None:
    world.barrier()
    assert world.allreduce(1) == world.size
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum, name="x").item() == world.size
    if dist.is_initialized():
        x = torch.ones(2)
        dist.all_reduce(x)
        assert x.tolist() == [world.size] * 2


@several_ranks
@each_rank
@pytest.mark.parametrize("case", FAULTS)
@pytest.mark.usefixtures("_started")
def test_the_others_hear_of_it(case: str, culprit: int, folder: Path) -> None:
    world = mz.init()
    do, own, message = FAULTS[case]
    culprit %= world.size
    if case.startswith("load"):
        mz.save(folder / "saved", scheduler=Scheduler())
    if case.startswith("torch"):
        ensure_process_group(world)
    try:
        if world.rank == culprit:
            with pytest.raises(own, match=message):
                do(world, True, folder)
        else:
            with pytest.raises(MpizeroError, match=rf"rank {culprit}\b(.|\n)*{message}"):
                do(world, False, folder)
        goes_on(world)
        if case.startswith("save"):
            assert list(folder.iterdir()) == []  # nor is anything left of it
        world.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@several_ranks
@each_rank
@pytest.mark.usefixtures("_started")
def test_objects_and_state_of_an_optimizer_from_a_root_that_has_none(culprit: int) -> None:
    world = mz.init()
    culprit %= world.size
    model, _ = build()
    stateless, plain = StateLess(model.parameters(), lr=1), torch.optim.SGD(model.parameters())
    mine = stateless if world.rank == culprit else plain
    for root in (culprit, (culprit + 1) % world.size):  # it fails to give, and to take
        with pytest.raises(OSError if world.rank == culprit else MismatchError, match="no state"):
            hvd.broadcast_optimizer_state(mine, root)
        goes_on(world)
    with pytest.raises(Exception, match="lambda"):
        hvd.broadcast_object((lambda: 1) if world.rank == culprit else 1, culprit)
    goes_on(world)


@several_ranks
@each_rank
@pytest.mark.usefixtures("_started")
def test_a_refused_operation_leaves_those_before_it(culprit: int) -> None:
    """What else is under way is found by name, as ever."""
    world = mz.init()
    before = hvd.allreduce_async(torch.ones(1), name="before", op=hvd.Sum)
    with pytest.raises(ArgumentError if world.rank == culprit % world.size else MismatchError):
        hvd.broadcast_(torch.ones(1), 99 if world.rank == culprit % world.size else 0, name="b")
    assert hvd.synchronize(before).item() == world.size
    hvd.broadcast_(torch.ones(1), 0, name="b")
    goes_on(world)


@several_ranks
@each_rank
@pytest.mark.usefixtures("_started")
def test_a_copy_that_one_rank_has_no_memory_for(
    culprit: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = mz.init()
    culprit %= world.size
    extra = {"x": torch.ones(4 << 20)}  # enough for every rank to have a part of it
    if world.rank == culprit:

        def full(self: Aside, values: Any) -> Any:
            raise MemoryError("no room")

        monkeypatch.setattr(Aside, "put", full)
    with pytest.raises(MemoryError if world.rank == culprit else MismatchError, match="no room"):
        mz.save(folder / "c", extra=extra, asynchronous=True)
    monkeypatch.undo()
    goes_on(world)
    assert list(folder.iterdir()) == []
    mz.save(folder / "c", extra=extra)


@several_ranks
@each_rank
@pytest.mark.parametrize("writer", ["posix", "mpi-io"])
@pytest.mark.usefixtures("_started")
def test_bytes_that_one_rank_cannot_read(
    culprit: int, folder: Path, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = mz.init()
    culprit %= world.size
    extra = {"x": torch.ones(4 << 20)}
    mz.save(folder / "c", extra={"old": 1})
    if world.rank == culprit:

        def full(values: Any) -> Any:
            raise MemoryError("no room")

        monkeypatch.setattr("mpizero.checkpoint.write._on_host", full)
    with pytest.raises(CheckpointError, match=rf"rank {culprit}\] MemoryError: no room"):
        mz.save(folder / "c", extra=extra, writer=writer)
    monkeypatch.undo()
    goes_on(world)
    assert [each.name for each in folder.iterdir()] == ["c"]
    assert mz.load(folder / "c") == {"old": 1}
