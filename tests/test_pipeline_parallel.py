"""torch's pipeline schedules over stages that are replicated or sharded over the data axis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import mpizero_torch as mz
from support import hybrid

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")
MICRO_BATCHES, LAYERS = 2, 4


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with hybrid.process_group():
        yield


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def piped(mesh: mz.Mesh, **way: Any) -> tuple[Any, Any, Any]:
    """The model's stage, its optimizer, and a schedule that runs it."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    model = hybrid.build(layers=LAYERS)
    model = hybrid.stage_of(model, mesh.pp.rank, mesh.pp.size)
    if mesh.tp.size > 1:
        hybrid.cut(model, mesh)
    model, optimizer = mz.zero(model, adamw(model.parameters()), world=mesh.replicas, **way)
    stage = PipelineStage(
        model, mesh.pp.rank, mesh.pp.size, torch.device("cpu"),
        group=mesh.device_mesh["pp"].get_group(),
    )  # fmt: skip
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=loss_fn)
    return model, optimizer, schedule


def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(output.flatten(0, 1), target.flatten())


def train(mesh: mz.Mesh, model: Any, optimizer: Any, schedule: Any, steps: range) -> list[Any]:
    found = []
    for step in steps:
        x, y = hybrid.batch(4 * mesh.dp.size, step)
        part = slice(4 * mesh.dp.rank, 4 * mesh.dp.rank + 4)
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        with model.accumulate():
            if mesh.pp.rank == 0:
                schedule.step(x[part])
            elif mesh.pp.rank == mesh.pp.size - 1:
                schedule.step(target=y[part], losses=losses)
            else:
                schedule.step()
        norm = float(mz.clip_grad_norm_(model, 0.1))
        optimizer.step()
        own = float(torch.stack(losses).mean()) if losses else 0.0
        found.append((mz.mean(own, world=mesh["dp", "pp"]) * mesh.pp.size, norm))
    return found


def expected(ranks: int, steps: range, path: Path | None = None) -> list[tuple[float, float]]:
    alone = hybrid.build(layers=LAYERS)
    its = adamw(alone.parameters())
    found = []
    for step in range(steps.stop):
        loss = hybrid.loss(alone, *hybrid.batch(4 * ranks, step))
        its.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1))
        its.step()
        found.append((loss.item(), norm))
    return found[steps.start :]


WAYS = [
    pytest.param({"stage": 0}, id="replicas"),
    pytest.param({"stage": 1}, id="1"),
    pytest.param({"stage": 2}, id="2"),
    pytest.param({"stage": 3}, id="3 shared"),
]


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("way", WAYS)
def test_losses_and_norms_are_those_of_one_process(way: dict[str, Any]) -> None:
    """At 2 and 3 ranks a pipeline alone; at 4, two replicas of two stages."""
    mesh = mz.mesh(pp=mz.init().size if mz.init().size < 4 else 2)
    parts = piped(mesh, **way)
    found = train(mesh, *parts, range(3))
    for (loss, norm), (its, norms) in zip(found, expected(mesh.dp.size, range(3)), strict=True):
        assert loss == pytest.approx(its, rel=1e-10)
        assert norm == pytest.approx(norms, rel=1e-6)
    report = mz.memory_report(parts[0], parts[1])
    assert report.elements == sum(p.numel() for p in hybrid.build(layers=LAYERS).parameters())
    mesh.close()


@pytest.mark.parallel([4])
def test_stages_of_slices() -> None:
    mesh = mz.mesh(pp=2, tp=2)
    found = train(mesh, *piped(mesh, stage=2), range(3))
    for (loss, norm), (its, norms) in zip(found, expected(1, range(3)), strict=True):
        assert loss == pytest.approx(its, rel=1e-10)
        assert norm == pytest.approx(norms, rel=1e-6)
    mesh.close()


@pytest.mark.parallel([2, 4])
def test_checkpoints_of_stages_load_anywhere(tmp_path: Path) -> None:
    world = mz.init()
    path = Path(world.broadcast_object(str(tmp_path / "run")))
    mesh = mz.mesh(pp=2, dp=world.size // 2)
    model, optimizer, schedule = piped(mesh, stage=1)
    train(mesh, model, optimizer, schedule, range(2))
    mz.save(path, model=model, optimizer=optimizer, extra={"step": 2})
    mesh.close()
    whole = expected(mesh.dp.size, range(2, 4))
    single = world.split(world.rank)
    assert single is not None
    alone = hybrid.build(layers=LAYERS)
    its = adamw(alone.parameters())
    assert mz.load(path, model=alone, optimizer=its, world=single) == {"step": 2}
    losses = []
    for step in range(2, 4):
        loss = hybrid.loss(alone, *hybrid.batch(2 * world.size, step))
        its.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1))
        its.step()
        losses.append((loss.item(), norm))
    for ours, theirs in zip(losses, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    single.close()
    # And from one process's checkpoint to stages, in another mesh.
    mz.save(path, model=mz.DistributedDataParallel(alone), optimizer=its)
    mesh = mz.mesh(pp=2, tp=world.size // 2)
    model, optimizer, schedule = piped(mesh, stage=0)
    mz.load(path, model=model, optimizer=optimizer)
    (found,) = train(mesh, model, optimizer, schedule, range(4, 5))
    with torch.no_grad():
        value = hybrid.loss(alone, *hybrid.batch(4 * mesh.dp.size, 4)).item()
    assert found[0] == pytest.approx(value, rel=1e-10)
    mesh.close()


@pytest.mark.parallel([2])
def test_what_cannot_be_right_is_refused() -> None:
    mesh = mz.mesh(pp=2)
    with pytest.raises(mz.ArgumentError, match="for a stage of a pipeline"):
        piped(mesh, stage=3, share_parameters=False)
    for way in ({"stage": 0}, {"stage": 1}):
        model, _, _ = piped(mesh, **way)
        x = torch.randn(1, 2, hybrid.WIDTH, dtype=torch.float64)
        with pytest.raises(mz.MpizeroError, match=r"'embed\.weight' is also on another stage"):
            model(x).sum().backward()
    mesh.close()
