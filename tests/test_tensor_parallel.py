"""Replicas and sharded state over the data axis, torch's tensor parallelism over another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mpizero_torch as mz
from support import hybrid

MICRO_BATCH = 2
pytestmark = pytest.mark.filterwarnings("ignore:.*distributed.*:UserWarning")

WAYS = [
    pytest.param({"stage": 0}, id="replicas"),
    pytest.param({"stage": 1}, id="1"),
    pytest.param({"stage": 1, "share_parameters": False, "partition": "parameter"}, id="1 private"),
    pytest.param({"stage": 2}, id="2"),
    pytest.param({"stage": 3}, id="3 shared"),
]


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with hybrid.process_group(tmp_path_factory.mktemp("group")):
        yield


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def distributed(mesh: mz.Mesh, dtype: torch.dtype = torch.float64, **way: Any) -> tuple[Any, Any]:
    model = hybrid.cut(hybrid.build(dtype), mesh)
    return mz.zero(model, adamw(model.parameters()), world=mesh.replicas, **way)


def own(mesh: mz.Mesh, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = hybrid.batch(mesh.dp.size * MICRO_BATCH, step)
    part = slice(mesh.dp.rank * MICRO_BATCH, (mesh.dp.rank + 1) * MICRO_BATCH)
    return x[part], y[part]


@pytest.mark.parallel([2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_losses_and_norms_are_those_of_one_process(way: dict[str, Any]) -> None:
    mesh = mz.mesh(tp=2)
    alone = hybrid.build()
    its = adamw(alone.parameters())
    model, optimizer = distributed(mesh, **way)
    for step in range(4):
        expected = hybrid.loss(alone, *hybrid.batch(mesh.dp.size * MICRO_BATCH, step))
        found = hybrid.loss(model, *own(mesh, step))
        assert mz.mean(found, world=mesh.dp) == pytest.approx(expected.item(), rel=1e-10)
        its.zero_grad()
        optimizer.zero_grad()
        expected.backward()
        found.backward()
        norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
        assert mz.clip_grad_norm_(model, 0.1) == pytest.approx(norm.item(), rel=1e-6)
        its.step()
        optimizer.step()
    mesh.close()


def train(model: Any, optimizer: Any, mesh: mz.Mesh, steps: range) -> list[float]:
    losses = []
    for step in steps:
        found = hybrid.loss(model, *own(mesh, step))
        losses.append(mz.mean(found, world=mesh.dp))
        optimizer.zero_grad()
        found.backward()
        mz.clip_grad_norm_(model, 0.1)
        optimizer.step()
    return losses


MESHES = [{"tp": 2}, {"tp": 1}, {"tp": 4}]


@pytest.mark.parallel([2, 4])
@pytest.mark.parametrize(
    ("way", "other"), [({"stage": 0}, {"stage": 1}), ({"stage": 2}, {"stage": 0})]
)
def test_checkpoints_of_one_mesh_load_under_another(
    way: dict[str, Any], other: dict[str, Any], tmp_path: Path
) -> None:
    """And are those of one process: whole tensors under plain names."""
    world = mz.init()
    path = Path(world.broadcast_object(str(tmp_path / "run")))
    mesh = mz.mesh(tp=2)
    batches = mesh.dp.size * MICRO_BATCH
    model, optimizer = distributed(mesh, **way)
    train(model, optimizer, mesh, range(2))
    mz.save(path, model=model, optimizer=optimizer, extra={"step": 2})
    mesh.close()
    alone = hybrid.build()
    its = adamw(alone.parameters())
    single = world.split(world.rank)
    assert single is not None
    assert mz.load(path, model=alone, optimizer=its, world=single) == {"step": 2}
    expected = []
    for step in range(2, 4):
        value = hybrid.loss(alone, *hybrid.batch(batches, step))
        its.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
        its.step()
        expected.append(value.item())
    for tp in (1, 2, 4):
        if world.size % tp:
            continue
        mesh = mz.mesh(tp=tp)
        model, optimizer = distributed(mesh, **other)
        for parameter in model.module.parameters():  # nothing of before shall be left
            assert parameter.shape
        assert mz.load(path, model=model, optimizer=optimizer) == {"step": 2}
        losses = []
        for step in range(2, 4):
            x, y = hybrid.batch(batches, step)
            count = batches // mesh.dp.size if batches % mesh.dp.size == 0 else batches
            part = slice(mesh.dp.rank * count, (mesh.dp.rank + 1) * count)
            x, y = (x[part], y[part]) if count < batches else (x, y)
            found = hybrid.loss(model, x, y)
            losses.append(mz.mean(found, world=mesh.dp))
            optimizer.zero_grad()
            found.backward()
            mz.clip_grad_norm_(model, 0.1)
            optimizer.step()
        assert losses == pytest.approx(expected, rel=1e-9)
        mesh.close()
    single.close()
