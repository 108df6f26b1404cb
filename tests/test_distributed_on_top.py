"""What of torch runs on torch.distributed gives on the backend "mpizero" what it gives on gloo."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from support.process_groups import Pair, pair

__all__ = ["pair"]

several_ranks = pytest.mark.parallel([2, 3, 4])
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own warn of torch's own

STEPS = 4
# Sums of a few gradients in another order, amplified by a few steps of an optimizer.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)
    )


def batch(step: int, rows: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randn(rows, 6, generator=generator)


def parameters_after(model: nn.Module, optimizer: Any = None) -> list[torch.Tensor]:
    """Train for a few steps; the whole parameters."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
    return [
        (each.full_tensor() if isinstance(each, DTensor) else each).detach().clone()
        for each in model.parameters()
    ]


def same(pair: Pair, train: Callable[[Any], list[torch.Tensor]]) -> None:
    ours, theirs = (train(group) for group in pair)
    assert len(ours) == len(theirs) > 0
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


def mesh_of(group: Any) -> DeviceMesh:
    return DeviceMesh.from_group(group, "cpu")


@several_ranks
def test_data_parallel(pair: Pair) -> None:
    def plain(group: Any) -> list[torch.Tensor]:
        return parameters_after(DistributedDataParallel(network(), process_group=group))

    def in_small_buckets(group: Any) -> list[torch.Tensor]:
        model = DistributedDataParallel(
            network(), process_group=group, bucket_cap_mb=0.001, gradient_as_bucket_view=True
        )
        return parameters_after(model)

    same(pair, plain)
    same(pair, in_small_buckets)


class Branches(nn.Module):
    """Of two branches each rank uses one, and a buffer counts the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = network(1), nn.Linear(3, 2), nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.left if dist.get_rank() else self.right
        return branch(self.norm(self.stem(x)))


@several_ranks
def test_data_parallel_with_unused_parameters_and_buffers(pair: Pair) -> None:
    def train(group: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = DistributedDataParallel(
            Branches(), process_group=group, find_unused_parameters=True
        )
        # Before the norm, a bias has no gradient but noise, which AdamW would make steps of.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return [*parameters_after(model, optimizer), *(b.float() for b in model.buffers())]

    same(pair, train)


@several_ranks
def test_data_parallel_communication_hooks(pair: Pair) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    def compressed(group: Any) -> list[torch.Tensor]:
        model = DistributedDataParallel(network(), process_group=group)
        model.register_comm_hook(group, default_hooks.fp16_compress_hook)
        return parameters_after(model)

    def by_power_sgd(group: Any) -> list[torch.Tensor]:
        model = DistributedDataParallel(network(), process_group=group)
        state = powerSGD_hook.PowerSGDState(group, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return parameters_after(model)

    ours, theirs = (compressed(group) for group in pair)
    for got, expected in zip(ours, theirs, strict=True):  # gloo sums in float16
        torch.testing.assert_close(got, expected, rtol=0.01, atol=0.01)
    same(pair, by_power_sgd)


@several_ranks
def test_data_parallel_join(pair: Pair) -> None:
    """Ranks with fewer batches than others."""

    def train(group: Any) -> list[torch.Tensor]:
        model = DistributedDataParallel(network(), process_group=group)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Join([model]):
            for step in range(2 + dist.get_rank()):
                optimizer.zero_grad()
                model(batch(step)).square().mean().backward()
                optimizer.step()
        return [each.detach() for each in model.parameters()]

    same(pair, train)


@several_ranks
def test_data_parallel_with_sparse_gradients(pair: Pair) -> None:
    def train(group: Any) -> list[torch.Tensor]:
        torch.manual_seed(3)
        embedding = nn.Embedding(10, 4, sparse=True)
        model = DistributedDataParallel(embedding, process_group=group)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with torch.sparse.check_sparse_tensor_invariants(False):
            for step in range(3):
                optimizer.zero_grad()
                model(torch.tensor([dist.get_rank(), step])).square().sum().backward()
                optimizer.step()
        return [each.detach() for each in model.parameters()]

    same(pair, train)


@several_ranks
def test_zero_redundancy_optimizer(pair: Pair) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def train(group: Any) -> list[torch.Tensor]:
        model = DistributedDataParallel(network(), process_group=group)
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), torch.optim.AdamW, process_group=group, lr=1e-2
        )
        found = parameters_after(model, optimizer)
        optimizer.consolidate_state_dict(to=0)
        return found

    same(pair, train)


@several_ranks
@pytest.mark.parametrize("reshard", [True, False])
def test_fully_shard(pair: Pair, reshard: bool) -> None:
    def train(group: Any) -> list[torch.Tensor]:
        model, mesh = network(), mesh_of(group)
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh)
        return parameters_after(model)

    same(pair, train)


@several_ranks
@pytest.mark.parametrize("how", ["allocated", "custom"])
def test_fully_shard_from_node_shared_memory(pair: Pair, how: str) -> None:
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    def train(group: Any) -> list[torch.Tensor]:
        model, mesh = network(), mesh_of(group)
        for part in (model[0], model[2], model):
            sharded: Any = fully_shard(part, mesh=mesh)
            if group is not pair.ours:
                continue
            if how == "allocated":
                sharded.set_allocate_memory_from_process_group_for_comm(True)
            else:
                sharded.set_custom_all_gather(collectives.ProcessGroupAllocAllGather(group))
                sharded.set_custom_reduce_scatter(collectives.ProcessGroupAllocReduceScatter(group))
        return parameters_after(model)

    same(pair, train)
    buffers = pair.ours._get_backend(torch.device("cpu"))._buffers
    assert 0 < sum(map(len, buffers._buffers.values())) < 20  # used again, not made anew
    memory = pair.ours.world._node_memory
    assert all(memory.spot(each) >= 0 for of_size in buffers._buffers.values() for each in of_size)


@several_ranks
def test_dtensor_redistribution(pair: Pair) -> None:
    def move(group: Any) -> list[torch.Tensor]:
        mesh = mesh_of(group)
        whole = torch.arange(35.0).reshape(7, 5)
        rows = distribute_tensor(whole, mesh, [Shard(0)])
        columns = rows.redistribute(placements=[Shard(1)])
        product = distribute_tensor(whole.t(), mesh, [Shard(0)]) @ rows.redistribute(
            placements=[Replicate()]
        )
        inner = columns @ distribute_tensor(whole.t(), mesh, [Shard(0)])  # partial sums
        return [
            rows.to_local(), columns.to_local(), rows.full_tensor(), product.full_tensor(),
            inner.full_tensor(), inner.redistribute(placements=[Shard(0)]).to_local(),
        ]  # fmt: skip

    same(pair, move)


@several_ranks
def test_tensor_parallel(pair: Pair) -> None:
    def train(group: Any) -> list[torch.Tensor]:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        model = parallelize_module(network(), mesh_of(group), plan)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(STEPS):
            optimizer.zero_grad()
            torch.manual_seed(step)  # the same batch on every rank
            model(torch.randn(5, 6)).square().mean().backward()
            optimizer.step()
        return [
            (each.full_tensor() if isinstance(each, DTensor) else each).detach()
            for each in model.parameters()
        ]

    same(pair, train)


@several_ranks
def test_pipelining(pair: Pair) -> None:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    size, rank = dist.get_world_size(), dist.get_rank()

    def of_stage(at: int) -> nn.Module:
        torch.manual_seed(at)
        return nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - target).square().mean()

    torch.manual_seed(99)
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    whole = nn.Sequential(*(of_stage(at) for at in range(size)))
    loss_of(whole(x), y).backward()
    expected = [each.grad for each in whole[rank].parameters()]
    for schedule_of in (ScheduleGPipe, Schedule1F1B):
        stage_module = of_stage(rank)
        stage = PipelineStage(stage_module, rank, size, torch.device("cpu"), group=pair.ours)
        schedule = schedule_of(stage, n_microbatches=4, loss_fn=loss_of)
        if rank == 0:
            schedule.step(x, **({"target": y} if size == 1 else {}))
        elif rank == size - 1:
            schedule.step(target=y)
        else:
            schedule.step()
        for got, wanted in zip(stage_module.parameters(), expected, strict=True):
            torch.testing.assert_close(got.grad, wanted, **CLOSE)


@several_ranks
def test_distributed_checkpoint(pair: Pair, tmp_path: Path) -> None:
    (folder,) = [str(tmp_path)]
    shared = [folder]
    dist.broadcast_object_list(shared)
    mesh = mesh_of(pair.ours)
    torch.manual_seed(5)
    whole = torch.randn(9, 4)
    state = {"w": distribute_tensor(whole, mesh, [Shard(0)]), "step": torch.tensor(7)}
    state_dict_saver.save(state, checkpoint_id=shared[0], process_group=pair.ours)
    again = {
        "w": distribute_tensor(torch.zeros(9, 4), mesh, [Shard(1)]), "step": torch.tensor(0)
    }  # fmt: skip
    state_dict_loader.load(again, checkpoint_id=shared[0], process_group=pair.ours)
    assert torch.equal(again["w"].full_tensor(), whole) and again["step"] == 7


@several_ranks
def test_functional_collectives_and_compilation(pair: Pair) -> None:
    from torch.distributed import _functional_collectives as functional

    def step(x: torch.Tensor, group: Any) -> torch.Tensor:
        total = functional.all_reduce(x * 2, "sum", group)
        rows = functional.all_gather_tensor(total + dist.get_rank(), 0, group)
        return functional.reduce_scatter_tensor(rows, "sum", 0, group) + 1

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    x = torch.arange(6.0).reshape(2, 3) + dist.get_rank()
    ours, theirs = step(x, pair.ours), step(x, pair.gloo)
    torch.testing.assert_close(functional.wait_tensor(ours), functional.wait_tensor(theirs))
    torch.testing.assert_close(functional.wait_tensor(compiled(x, pair.ours)), ours)


@several_ranks
def test_a_copied_model_and_a_deepcopied_group_name(pair: Pair) -> None:
    """What holds a group by its name finds it again."""
    group = dist.distributed_c10d._resolve_process_group(pair.ours.group_name)
    assert group is pair.ours
    assert copy.copy(dist.get_process_group_ranks(group)) == list(range(dist.get_world_size()))
