"""Checkpoints of torch training: saved at one stage, loaded at another, and trained on."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import mpizero_torch as mz
from mpizero.checkpoint import files
from mpizero_torch.checkpointing import random_state

ranks = pytest.mark.parallel([1, 2, 3, 4])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same on all ranks: rank 0's."""
    return Path(mz.init().broadcast_object(str(tmp_path)))


def build(stage: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(9, 7), torch.nn.Dropout(0.2), torch.nn.Linear(7, 3)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    if stage:
        return mz.zero(model, optimizer, stage=stage)
    return mz.DistributedDataParallel(model), optimizer


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.rand(4, 9)).square().mean().backward()
        optimizer.step()


@ranks
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("saved_at", [0, 1, 2, 3])
def test_training_goes_on_at_any_stage(folder: Path, saved_at: int, asynchronous: bool) -> None:
    """Dropout and inputs are drawn from torch's generator, which goes on too."""
    model, optimizer = build(saved_at)
    train(model, optimizer, 3)
    pending = mz.save(
        folder / "c", model=model, optimizer=optimizer, extra={"epoch": 1},
        asynchronous=asynchronous,
    )  # fmt: skip
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, optimizer, 2)
    if pending is not None:
        pending.wait()
    for name, value in load_file(folder / "c" / "model.safetensors").items():
        torch.testing.assert_close(value, plain[name], rtol=0, atol=0)
    expected = model.state_dict()
    for stage in range(4):
        other, its = build(stage)
        assert mz.load(folder / "c", model=other, optimizer=its) == {"epoch": 1}
        train(other, its, 2)
        exact = stage == saved_at
        for name, value in other.state_dict().items():
            tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(value, expected[name], **tolerance)


@ranks
def test_the_manager_keeps_the_newest(folder: Path) -> None:
    model, optimizer = build(2)
    run = {"model": model, "optimizer": optimizer}
    manager = mz.CheckpointManager(folder, keep=2, every_steps=2, asynchronous=True, **run)
    assert manager.restore_latest() is None
    for step in range(1, 9):
        train(model, optimizer, 1)
        assert manager.step(step) == (step % 2 == 0)
    manager.wait()
    model.world.barrier()
    assert manager.steps() == [6, 8]
    assert manager.restore_latest() == 8


@ranks
def test_what_a_killed_run_had_yet_to_remove_goes_when_it_is_resumed(folder: Path) -> None:
    """Killed between a save and the removal of the oldest, and with no save left to do."""
    model, optimizer = build(1)
    run = {"model": model, "optimizer": optimizer}
    killed = mz.CheckpointManager(folder, keep=9, **run)
    for step in (1, 2, 3):
        killed.save(step)
    resumed = mz.CheckpointManager(folder, keep=2, **run)
    assert resumed.restore_latest() == 3
    model.world.barrier()
    assert resumed.steps() == [2, 3]


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_what_one_rank_cannot_read_no_rank_goes_on_without(
    folder: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = build(stage)
    train(model, optimizer, 1)
    mz.save(folder / "c", model=model, optimizer=optimizer)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        if mz.init().rank == 1:
            patch.setattr(files, "read_at", fail)
        with pytest.raises(mz.CheckpointError, match="Input/output error"):
            mz.load(folder / "c", model=model, optimizer=optimizer)
    mz.load(folder / "c", model=model, optimizer=optimizer)


@pytest.mark.once
def test_cupys_generator_goes_on_from_the_seed_that_was_saved(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in: what follows a save and what follows a load is drawn from the same seed."""
    seeds: list[int] = []
    stand_in = SimpleNamespace(random=SimpleNamespace(seed=seeds.append))
    monkeypatch.setattr(random_state, "_cupy", lambda world: stand_in)
    model = torch.nn.Linear(2, 2)
    mz.save(folder / "a", model=model)
    mz.save(folder / "b", model=model)
    mz.load(folder / "a", model=model)
    assert len(seeds) == 3 and seeds[2] == seeds[0] != seeds[1]


class Peculiar(torch.nn.Module):
    """With what modules have beside parameters of the usual kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(5))
        self.tables: dict[str, object] = {}
        dtypes = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.complex64, torch.bool)
        for number, dtype in enumerate(dtypes):
            self.register_buffer(f"buffer{number}", torch.zeros(3).to(dtype))

    def get_extra_state(self) -> dict[str, object]:
        return self.tables

    def set_extra_state(self, state: dict[str, object]) -> None:
        self.tables = state


@ranks
def test_peculiar_modules_come_back(folder: Path) -> None:
    module = Peculiar()
    module.tables = {"past": [torch.arange(3.0), (1, None)], "name": "x"}
    for buffer in module.buffers():
        buffer.copy_(torch.tensor([0.0, 1.0, 0.5]).to(buffer.dtype))
    mz.save(folder / "c", model=mz.DistributedDataParallel(module))
    other = Peculiar()
    mz.load(folder / "c", model=mz.DistributedDataParallel(other))
    for saved, loaded in zip(module.buffers(), other.buffers(), strict=True):
        assert (saved.float() == loaded.float()).all() if saved.dtype.is_floating_point else True
        assert saved.dtype == loaded.dtype and saved.tolist() == loaded.tolist()
    past, name = other.tables["past"], other.tables["name"]
    assert name == "x" and past[1] == (1, None) and past[0].tolist() == [0, 1, 2]  # type: ignore[index]


@ranks
def test_another_model_is_refused(folder: Path) -> None:
    model, optimizer = build(1)
    mz.save(folder / "c", model=model)
    other = mz.DistributedDataParallel(torch.nn.Linear(9, 7))
    with pytest.raises(mz.ArgumentError, match="weight"):
        mz.load(folder / "c", model=other)
    with pytest.raises(mz.ArgumentError, match="optimizer"):
        mz.load(folder / "c", model=model, optimizer=optimizer)
