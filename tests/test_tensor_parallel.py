"""Replicas and sharded state over the data axis, torch's tensor parallelism over another."""

from __future__ import annotations

from collections.abc import Iterator
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
