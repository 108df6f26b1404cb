"""Replicas, shards and checkpoints, with ranks on nodes in any order and number."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_mpi import parallel_assert
from torch import nn

import mpizero_torch as mz
from mpizero import World
from support import recut
from support.models import KINDS, loss
from support.placements import HERE, SEVERAL_NODES, Placement, placed
from support.recut import Way

several_ranks = pytest.mark.parallel([2, 3, 4])

TIED = next(kind for kind in KINDS if kind.name == "tied")
STEPS, EACH = 2, 3  # samples of a rank

# Every second way to shard in every placement; with MPIZERO_TEST_ALL=1 all in all.
THIN = 1 if os.environ.get("MPIZERO_TEST_ALL") == "1" else 2

# (shard_group, stage, share_parameters)
ZERO: list[tuple[str | int, int, bool | None]] = [
    ("world", 1, True), ("world", 1, False), ("world", 2, True), ("world", 2, False),
    ("world", 3, True), ("world", 3, False), ("node", 1, False), ("node", 2, True),
    ("node", 3, True), ("node", 3, False), (2, 1, None), (2, 2, True), (2, 3, False), (1, 3, True),
]  # fmt: skip


@several_ranks
@pytest.mark.parametrize("placement", HERE, ids=str)
def test_replicas(placement: Placement) -> None:
    with placed(placement) as world:
        model: nn.Module = mz.DistributedDataParallel(wide(), world=world)
        optimizer = sgd(model)
        for step in range(STEPS):
            x, y = batch(world.size, step)
            mine = slice(world.rank * EACH, (world.rank + 1) * EACH)
            train(model, optimizer, x[mine], y[mine])
        mz.assert_in_sync(model, optimizer, world=world)
        assert_close(model.state_dict(), wide_alone(world.size), str(placement))


@several_ranks
@pytest.mark.parametrize("placement", SEVERAL_NODES, ids=str)
def test_shards(placement: Placement) -> None:
    """Among all ranks, those of a node, or some: with parameters that a node has once, or not."""
    with placed(placement) as world:
        for shard_group, stage, share in ZERO[SEVERAL_NODES.index(placement) % THIN :: THIN]:
            if shard_group == "node" and not world.even_nodes:
                with pytest.raises(mz.ArgumentError, match="shard_group"):
                    shard(world, shard_group, stage, share)
                continue
            if isinstance(shard_group, int) and world.size % shard_group:
                continue
            if share and not can_share(placement, shard_group):
                with pytest.raises(mz.ArgumentError, match="share_parameters"):
                    shard(world, shard_group, stage, share)
                share = None  # as it can be
            model, optimizer = shard(world, shard_group, stage, share)
            for step in range(STEPS):
                x, y = TIED.batch(world.size * EACH, step)
                mine = slice(world.rank * EACH, (world.rank + 1) * EACH)
                optimizer.zero_grad()
                loss(model, x[mine], y[mine]).backward()
                optimizer.step()
            what = f"{placement}: {shard_group}, stage {stage}, shared: {share}"
            state, momentum = tied_alone(world.size)
            assert_close(model.state_dict(), state, what)
            assert_close(momentum_of(optimizer), momentum, what)


@several_ranks
def test_saved_on_some_nodes_and_loaded_on_others(tmp_path: Path) -> None:
    folder = Path(mz.init().broadcast_object(str(tmp_path)))
    wrong: list[str] = []
    for at, (source, target) in enumerate(zip(HERE, reversed(HERE), strict=True)):
        if at % THIN:
            continue
        one, other = (ways(each)[at % len(ways(each))] for each in (source, target))
        path = folder / str(at)
        with placed(source) as world:
            writers = (None, 1, 2)[at // 2 % 3]
            saved = recut.save(path, one, world, recut.adamw, at, writers_per_node=writers)
        after = recut.next_step(saved, recut.adamw, at)
        with placed(target) as world:
            model, optimizer = recut.spread(other, world, recut.adamw, 77)
            found = recut.loaded(path, model, optimizer, world, saved, after, at)
            told = [each for theirs in world.gather_objects(found) for each in theirs]
            wrong += [f"{source}, {one}; {target}, {other}: {each}" for each in told]
    assert wrong == []


def shard(world: World, shard_group: str | int, stage: int, share: bool | None) -> tuple[Any, Any]:
    """In segments so small that the model has several."""
    model = TIED.build(torch.float64)
    return mz.zero(
        model, sgd(model), stage, world=world, shard_group=shard_group, share_parameters=share,
        segment_mb=0.002,
    )  # fmt: skip


def can_share(placement: Placement, shard_group: str | int) -> bool:
    """Are there groups of ranks of one node each?"""
    names = placement.node_of
    if isinstance(shard_group, int):
        names.sort(key=names.copy().index)  # node by node
        starts = range(0, len(names), shard_group)
        return all(len({*names[start : start + shard_group]}) == 1 for start in starts)
    return len({names.count(name) for name in names}) == 1


def ways(placement: Placement) -> list[Way]:
    """How a run may be spread there."""
    found = [Way(0), *(Way(stage, shared=None) for stage in (1, 2, 3)), Way(3, shared=False)]
    if can_share(placement, "node"):
        found += [Way(stage, shard_group="node") for stage in (3, 1, 2)]
        found.append(Way(2, False, "parameter", shard_group="node"))
    return found


def wide() -> nn.Module:
    """With gradients that are more than what "auto" gives to the MPI library."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 9001), nn.Tanh(), nn.Linear(9001, 3)).double()


def batch(size: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size * EACH, 16, generator=generator, dtype=torch.float64)
    return x, torch.randn(size * EACH, 3, generator=generator, dtype=torch.float64)


def sgd(model: nn.Module) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model: nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()


@cache
def wide_alone(size: int) -> dict[str, torch.Tensor]:
    """What one process makes of all ranks' samples."""
    model = wide()
    optimizer = sgd(model)
    for step in range(STEPS):
        train(model, optimizer, *batch(size, step))
    return model.state_dict()


@cache
def tied_alone(size: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model = TIED.build(torch.float64)
    optimizer = sgd(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, *TIED.batch(size * EACH, step)).backward()
        optimizer.step()
    return model.state_dict(), momentum_of(optimizer)


def momentum_of(optimizer: Any) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {str(number): values["momentum_buffer"] for number, values in state.items()}


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], what: str) -> None:
    """Up to the rounding of float64 sums in another order. Fails on all ranks if on one."""
    wrong = [
        name
        for name, each in theirs.items()
        if name not in ours or not torch.allclose(ours[name], each, rtol=1e-9, atol=1e-12)
    ]
    wrong += [name for name in ours if name not in theirs]
    parallel_assert(bool(theirs) and not wrong, f"{what}: {wrong}")
