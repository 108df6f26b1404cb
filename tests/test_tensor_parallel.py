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
    pytest.param({"stage": 3, "share_parameters": False, "segment_mb": 0.002}, id="3 private"),
]


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with hybrid.process_group():
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
        assert mz.load(path, model=model, optimizer=optimizer) == {"step": 2}
        losses = []
        for step in range(2, 4):
            x, y = hybrid.batch(batches, step)
            part = slice(mesh.dp.rank, None, mesh.dp.size)
            found = hybrid.loss(model, x[part], y[part])
            losses.append(mz.mean(found, world=mesh.dp))
            optimizer.zero_grad()
            found.backward()
            mz.clip_grad_norm_(model, 0.1)
            optimizer.step()
        assert losses == pytest.approx(expected, rel=1e-9)
        mesh.close()
    single.close()


@pytest.mark.parallel([2, 4])
def test_sixteen_bits() -> None:
    """The slices become bfloat16 in place, their float32 masters are what is saved."""
    mesh = mz.mesh(tp=2)
    alone = hybrid.build(torch.float32)
    its = adamw(alone.parameters())
    model, optimizer = distributed(mesh, torch.float32, stage=2, precision="bf16")
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.bfloat16}
    for step in range(2):
        expected = hybrid.loss(alone, *hybrid.batch(mesh.dp.size * MICRO_BATCH, step))
        its.zero_grad()
        expected.backward()
        torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
        its.step()
        (found,) = train(model, optimizer, mesh, range(step, step + 1))
        assert found == pytest.approx(expected.item(), rel=0.02)  # 8 bits of mantissa
    kept = model.state_dict()["blocks.0.project.weight"]
    assert kept.dtype == torch.float32 and tuple(kept.shape) == (hybrid.WIDTH, hybrid.WIDTH)
    assert tuple(kept.to_local().shape) == (hybrid.WIDTH, hybrid.WIDTH // 2)
    mesh.close()


@pytest.mark.parallel([2, 4])
def test_states_are_sliced_as_the_parameters_and_may_be_looked_at() -> None:
    mesh = mz.mesh(tp=2)
    model, optimizer = distributed(mesh, stage=2)
    train(model, optimizer, mesh, range(1))
    number = list(dict(model.module.named_parameters())).index("blocks.1.project.weight")
    moment = optimizer.state_dict()["state"][number]["exp_avg"]
    assert tuple(moment.shape) == (hybrid.WIDTH, hybrid.WIDTH)
    assert tuple(moment.to_local().shape) == (hybrid.WIDTH, hybrid.WIDTH // 2)
    before = model.state_dict()
    with mz.gathered(model, modify=True) as inner, torch.no_grad():
        inner.blocks["0"].project.weight.mul_(2)
        inner.norm.weight.mul_(2)
    for name in ("blocks.0.project.weight", "norm.weight"):
        now, then = model.state_dict()[name], before[name]
        assert torch.equal(getattr(now, "_local_tensor", now), getattr(then, "_local_tensor", then))
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, mesh, range(1, 2))
    mz.assert_in_sync(model, optimizer)
    norm = dict(model.module.named_parameters())["norm.weight"]
    mesh.world.barrier()  # all have compared
    if mesh.tp.rank == 1:
        with torch.no_grad():
            norm.add_(mesh.dp.rank == 0)  # replicas share their memory
    mesh.world.barrier()
    with pytest.raises(mz.MismatchError, match=r"differ in 'norm\.weight'"):
        mz.assert_in_sync(model, optimizer)
    mesh.close()


@pytest.mark.parallel([2, 4])
@pytest.mark.parametrize("stage", [0, 1])
def test_memory_is_counted_once_across_the_axes(stage: int) -> None:
    mesh = mz.mesh(tp=2)
    model, optimizer = distributed(mesh, stage=stage)
    train(model, optimizer, mesh, range(1))
    report = mz.memory_report(model, optimizer)
    alone = hybrid.build()
    count = sum(parameter.numel() for parameter in alone.parameters())
    cut = sum(
        module.weight.numel()
        for block in alone.blocks.values()
        for module in (block.query_key_value, block.project, *block.feed_forward[::2])
    ) + sum(
        b.query_key_value.bias.numel() + b.feed_forward[0].bias.numel()
        for b in alone.blocks.values()
    )
    own = count - cut // 2
    assert report.elements == count
    copies = 1 if stage and mesh.dp.size > 1 else mesh.dp.size
    padding = 8 * 64 * 4
    assert report.node.parameters == pytest.approx(8 * own * 2 * copies, abs=padding * 2 * copies)
    assert report.rank.parameters == pytest.approx(
        8 * own / (mesh.dp.size if stage else 1), abs=padding
    )
    for theirs in mz.init().gather_objects(report):
        assert theirs.rank == report.rank and theirs.formula == report.formula
    mesh.close()


@pytest.mark.parallel([2, 4])
def test_what_cannot_be_right_is_refused() -> None:
    world = mz.init()
    mesh = mz.mesh(tp=2)
    model = hybrid.cut(hybrid.build(), mesh)
    for wrong in (None, mesh.tp):
        with pytest.raises(mz.ArgumentError, match="'world' is ranks"):
            mz.DistributedDataParallel(model, world=wrong)
        with pytest.raises(mz.ArgumentError, match="'world' is ranks"):
            mz.zero(model, adamw(model.parameters()), world=wrong)
    with pytest.raises(mz.ArgumentError, match="every element on its own"):
        mz.zero(model, torch.optim.Adafactor(model.parameters()), world=mesh.replicas)
    with pytest.raises(mz.ArgumentError, match="'world' is ranks"):
        mz.save("nowhere", model=model)
    pair = world.split(world.rank // 2)  # no mesh knows of it
    assert pair is not None
    with pytest.raises(mz.ArgumentError, match="'world' is ranks"):
        mz.DistributedDataParallel(model, world=pair)
    pair.close()
    mesh.close()
