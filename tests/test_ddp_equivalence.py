"""n ranks train what one process trains on the concatenated batch; and what torch's DDP does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import mpizero_torch as mz
from support.models import KINDS, Kind, loss

MICRO_BATCH = 4

# Sums over ranks are rounded in another order than sums within one batch. 20 steps of AdamW
# amplify that by a few; the bounds are some hundred units in the last place.
RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-12}


def _distributed(model: nn.Module) -> nn.Module:
    return mz.DistributedDataParallel(mz.SyncBatchNorm.convert_sync_batchnorm(model))


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_losses_are_those_of_one_process(kind: Kind, dtype: torch.dtype) -> None:
    world = mz.init()
    alone, model = kind.build(dtype), _distributed(kind.build(dtype))
    its_optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    mine = slice(world.rank * MICRO_BATCH, (world.rank + 1) * MICRO_BATCH)
    for step in range(20):
        x, y = kind.batch(world.size * MICRO_BATCH, step)
        expected = loss(alone, x, y)
        own = loss(model, x[mine], y[mine])
        assert mz.mean(own) == pytest.approx(expected.item(), rel=RELATIVE[dtype])
        for each, optim in ((expected, its_optimizer), (own, optimizer)):
            optim.zero_grad()
            each.backward()
            optim.step()
    for (name, ours), theirs in zip(
        model.state_dict().items(), alone.state_dict().values(), strict=True
    ):
        if dtype == torch.float64:
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_are_bit_identical_over_ranks_and_runs(kind: Kind) -> None:
    world = mz.init()

    def gradients() -> list[torch.Tensor]:
        model = _distributed(kind.build())
        for step in range(3):  # the first step learns the order of the buckets
            model.zero_grad()
            x, y = kind.batch(MICRO_BATCH, 100 * world.rank + step)
            loss(model, x, y).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    ours, again = gradients(), gradients()
    flat = torch.cat([gradient.flatten() for gradient in ours])
    assert torch.equal(flat, torch.cat([gradient.flatten() for gradient in again]))
    for theirs in world.gather_objects(flat.numpy().tobytes()):
        assert theirs == flat.numpy().tobytes()


@pytest.fixture(scope="module")
def gloo(tmp_path_factory: pytest.TempPathFactory):  # noqa: ANN201
    world = mz.init()
    path = world.broadcast_object(str(tmp_path_factory.mktemp("gloo") / "store"))
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=world.rank, world_size=world.size
    )
    yield
    world.barrier()
    dist.destroy_process_group()
    world.barrier()
    Path(path).unlink(missing_ok=True)


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_are_those_of_torch_ddp(kind: Kind, gloo: None) -> None:
    world = mz.init()
    ours = mz.DistributedDataParallel(kind.build())
    theirs = nn.parallel.DistributedDataParallel(kind.build(), find_unused_parameters=True)
    for step in range(3):
        x, y = kind.batch(world.size * MICRO_BATCH, step)
        mine = slice(world.rank * MICRO_BATCH, (world.rank + 1) * MICRO_BATCH)
        for model in (ours, theirs):
            model.zero_grad()
            loss(model, x[mine], y[mine]).backward()
        for (name, p), q in zip(
            ours.module.named_parameters(), theirs.module.parameters(), strict=True
        ):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                # Both sum the same float32 numbers, in different orders.
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=name)
    # Buffers after a further forward, as torch's DDP has them then: rank 0's.
    for (name, b), c in zip(
        ours.module.named_buffers(), theirs.module.named_buffers(), strict=True
    ):
        if world.rank == 0:
            torch.testing.assert_close(b, c[1], msg=name)
        root = b.clone()
        world.broadcast(root)
        assert torch.equal(b, root), name
