"""On a real GPU, which ranks share: DDP and ZeRO train what one process trains, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import mpizero

torch = pytest.importorskip("torch")
mz = pytest.importorskip("mpizero_torch")

pytestmark = pytest.mark.gpu
ranks = pytest.mark.parallel([1, 2, 4])

STEPS, EACH = 5, 8


def model_and_batches(size: int) -> tuple[Any, list[tuple[Any, Any]]]:
    torch.manual_seed(5)
    module = torch.nn.Sequential(
        torch.nn.Linear(33, 100), torch.nn.GELU(), torch.nn.LayerNorm(100), torch.nn.Linear(100, 7)
    )
    batches = [
        (torch.randn(EACH * size, 33, dtype=torch.float64), torch.randint(7, (EACH * size,)))
        for _ in range(STEPS)
    ]
    return module.double().cuda(), [(x.cuda(), y.cuda()) for x, y in batches]


def optimizer_of(module: Any) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=1e-2)


def alone(module: Any, batches: list[tuple[Any, Any]]) -> list[Any]:
    optimizer = optimizer_of(module)
    for x, y in batches:
        torch.nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in module.parameters()]


@ranks
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training(stage: int) -> None:
    world = mz.init()
    if world.device.kind != "cuda":
        pytest.skip("this rank is bound to the host")
    module, batches = model_and_batches(world.size)
    expected = alone(copy.deepcopy(module), batches)
    if stage == 0:
        trained = mz.DistributedDataParallel(module)
        optimizer = optimizer_of(trained)
    else:
        trained, optimizer = mz.zero(module, optimizer_of(module), stage=stage)
    mine = slice(world.rank * EACH, (world.rank + 1) * EACH)
    for x, y in batches:
        torch.nn.functional.cross_entropy(trained(x[mine]), y[mine]).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = trained.state_dict()
    for (name, value), wanted in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(value.to(wanted.device), wanted, rtol=1e-9, atol=1e-11, msg=name)


@ranks
def test_the_job_has_a_device() -> None:
    assert mpizero.init().device.kind == "cuda"
