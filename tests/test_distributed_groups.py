"""Groups, messages, works and errors of torch.distributed on the backend "mpizero"."""

from __future__ import annotations

import itertools
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import mpizero
import mpizero_torch as mz
from mpizero_torch.distributed import MpiProcessGroup
from support.launch import mpirun
from support.process_groups import Pair, pair

__all__ = ["pair"]

several_ranks = pytest.mark.parallel([2, 3, 4])


@several_ranks
def test_destroy_and_start_anew() -> None:
    for number in range(5):
        backend = "cpu:mpizero,cuda:mpizero" if number % 2 else "mpizero"
        dist.init_process_group(backend)
        with pytest.raises(ValueError, match="twice"):
            dist.init_process_group(backend)
        tensor = torch.ones(2)
        dist.all_reduce(tensor)
        other = dist.new_group(list(range(dist.get_world_size())))
        dist.all_reduce(tensor, group=other)
        assert tensor.tolist() == [dist.get_world_size() ** 2] * 2
        if number % 3 == 0:
            dist.destroy_process_group(other)
        dist.destroy_process_group()
        assert not dist.is_initialized()


@several_ranks
def test_who_and_where(pair: Pair) -> None:
    world = mz.init()
    assert dist.get_backend() == "mpizero" and dist.is_initialized()
    assert (dist.get_rank(), dist.get_world_size()) == (world.rank, world.size)
    group = dist.GroupMember.WORLD
    assert isinstance(group, MpiProcessGroup) and group.group_name == "0"
    assert group.world is not world  # its calls do not mix with those of the program's own world
    assert group._device_types == [torch.device("cpu")]


@several_ranks
def test_the_store_is_shared(pair: Pair) -> None:
    store = dist.distributed_c10d._get_default_store()
    store.set(f"from {dist.get_rank()}", "here")
    for rank in range(dist.get_world_size()):
        assert store.get(f"from {rank}") == b"here"


@several_ranks
def test_groups_made_by_some_ranks_only(pair: Pair) -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    groups = []
    for pair_of_ranks in itertools.combinations(range(size), 2):
        group = dist.new_group(pair_of_ranks)  # called by all, made by two
        groups.append((pair_of_ranks, group))
        if rank in pair_of_ranks:
            alone = dist.new_group(pair_of_ranks, use_local_synchronization=True)  # called by two
            groups.append((pair_of_ranks, alone))
    works = []
    for ranks, group in groups:
        if rank in ranks:
            assert dist.get_process_group_ranks(group) == list(ranks)
            tensor = torch.full((1000,), float(rank))
            works.append((ranks, tensor, dist.all_reduce(tensor, group=group, async_op=True)))
        else:
            assert group == dist.GroupMember.NON_GROUP_MEMBER
    for ranks, tensor, work in works:
        work.wait()
        assert (tensor == sum(ranks)).all()
    halves, _ = dist.new_subgroups(size // 2) if size % 2 == 0 else (dist.group.WORLD, None)
    total = torch.ones(1)
    dist.all_reduce(total, group=halves)
    assert total.item() == dist.get_world_size(halves)
    for ranks, group in groups:
        if rank in ranks:
            dist.destroy_process_group(group)


@several_ranks
def test_split_group(pair: Pair) -> None:
    ranks = list(range(1, dist.get_world_size()))
    part = pair.ours.split_group(ranks, group_name="behind the first")
    assert (part is None) == (dist.get_rank() == 0)
    if part is not None:
        tensor = torch.ones(3)
        part.allreduce([tensor]).wait()
        assert tensor.tolist() == [len(ranks)] * 3
        part.shutdown()


@several_ranks
def test_messages(pair: Pair) -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int8):
        to, source = (rank + 1) % size, (rank - 1) % size
        sent = torch.full((200_000,), rank).to(dtype)
        got = torch.zeros(200_000, dtype=dtype)
        ops = [dist.P2POp(dist.isend, sent, to), dist.P2POp(dist.irecv, got, source)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        assert torch.equal(got, torch.full((200_000,), source).to(dtype))
    if rank == 0:
        tensors = {(r, tag): torch.zeros(2) for r in range(1, size) for tag in (7, 3)}
        for (source, tag), tensor in tensors.items():
            assert dist.recv(tensor, source, tag=tag) == source
            assert tensor.tolist() == [source, tag]
        senders = set()
        for _ in range(1, size):
            tensor = torch.zeros(1)
            sender = dist.recv(tensor, tag=5)
            assert tensor.item() == sender
            senders.add(sender)
        assert senders == set(range(1, size))
        with pytest.raises(ValueError, match="rank"):
            dist.send(torch.zeros(1), 0)
    else:
        for tag in (3, 7):
            dist.send(torch.tensor([float(rank), float(tag)]), 0, tag=tag)
        dist.send(torch.tensor([float(rank)]), 0, tag=5)


@several_ranks
def test_works_and_futures(pair: Pair) -> None:
    size = dist.get_world_size()
    tensors = [torch.full((n,), 1.0) for n in (1, 100, 300_000)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    futures = [work.get_future().then(lambda done: done.value()[0] * 2) for work in works]
    assert [future.wait()[0].item() for future in futures] == [2.0 * size] * 3
    for work, tensor in zip(works, tensors, strict=True):
        assert work.wait() and work.is_completed() and work.exception() is None
        assert work.result()[0] is tensor and (tensor == size).all()
    # What a future sets off may itself be a call, and wait for it.
    first = dist.all_reduce(torch.ones(3), async_op=True).get_future()

    def another(done: Any) -> torch.Tensor:
        work = dist.all_reduce(done.value()[0], async_op=True)
        return work.get_future().wait()[0]

    assert first.then(another).wait().tolist() == [size**2] * 3
    barrier = dist.barrier(async_op=True)
    barrier.wait()
    assert barrier.is_completed()


@several_ranks
def test_monitored_barrier(pair: Pair) -> None:
    dist.monitored_barrier()
    rank, late = dist.get_rank(), dist.get_world_size() - 1
    message = f"Rank {late} failed to pass monitoredBarrier in 500 ms"
    if rank != late:
        with pytest.raises(RuntimeError, match=message if rank == 0 else "Rank 0|rank 0"):
            dist.monitored_barrier(timeout=timedelta(milliseconds=500))
    pair.gloo.barrier().wait()
    group = dist.new_group()
    if rank == 0:  # who has no time cannot tell of others that they are late
        with pytest.raises(RuntimeError, match="Rank 0 timed out in monitoredBarrier"):
            dist.monitored_barrier(group, timeout=timedelta(0))
    pair.gloo.barrier().wait()


@several_ranks
def test_calls_are_shown_in_the_profiler(pair: Pair) -> None:
    """As gloo's are, once each, also one that consists of others; with shapes; asynchronous."""

    def shown(group: Any) -> list[tuple[str, Any, bool]]:
        x, size = torch.ones(2, 3), dist.get_world_size()
        listed = [[torch.zeros(2, 3), torch.zeros(1)] for _ in range(size)]
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, record_shapes=True) as profile:
            dist.all_reduce(x, group=group)
            dist.broadcast(x, 0, group=group, async_op=True).wait()
            dist.all_gather([torch.zeros(4, dtype=torch.cfloat)] * size, torch.ones(4) * 1j, group)
            group.allgather_coalesced(listed, [x, torch.ones(1)]).wait()
            sent = dist.isend(x, (dist.get_rank() + 1) % size, group)
            dist.recv(torch.zeros(2, 3), (dist.get_rank() - 1) % size, group)
            sent.wait()
        name = group.name()
        return [
            (event.name.removeprefix(name), event.input_shapes, event.is_async)
            for event in profile.events()
            if event.name.startswith(f"{name}:")
        ]

    assert sorted(shown(pair.ours)) == sorted(shown(pair.gloo))


@several_ranks
def test_errors(pair: Pair) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    with pytest.raises(mpizero.MismatchError, match="rank 0"):
        dist.all_reduce(torch.ones(3 if rank else 4))
    with pytest.raises(mpizero.MismatchError, match="rank 0"):
        dist.all_reduce(torch.ones(3 if rank else 4), async_op=True).wait()
    with pytest.raises(mpizero.MismatchError, match=r"allreduce\("):
        dist.barrier() if rank else dist.all_reduce(torch.ones(3))
    with pytest.raises(ValueError, match="elements"):
        dist.all_gather_single(torch.zeros(size + 1), torch.zeros(1))
    with pytest.raises(ValueError, match="all_gather"):
        dist.all_gather([torch.zeros(1)] * (size + 1), torch.zeros(1))
    tensor = torch.zeros(1)
    waiting = dist.irecv(tensor, (rank + 1) % size)
    with pytest.raises(RuntimeError, match="Timed out"):
        waiting.wait(timedelta(milliseconds=100))
    dist.barrier()
    dist.send(torch.ones(1), (rank - 1) % size)
    waiting.wait()
    assert tensor.item() == 1


WITH_TORCHS_VARIABLES = """
import torch.distributed as dist, mpizero_torch.distributed
store = dist.HashStore()
try:
    dist.init_process_group("mpizero", store=store, rank=0, world_size=3)
except RuntimeError as error:
    print(error)
dist.init_process_group("mpizero")
print("size", dist.get_world_size())
dist.destroy_process_group()
"""


def test_a_job_of_another_size_than_torch_was_told_is_refused() -> None:
    result = mpirun(1, WITH_TORCHS_VARIABLES, timeout=60)
    assert "rank 0 of 3 is what torch was told, but MPI says rank 0 of 1" in result.stdout
    assert "size 1" in result.stdout and result.returncode == 0, result.stderr


def test_a_port_that_is_left_over_does_not_matter() -> None:
    program = """
import torch.distributed as dist, mpizero_torch.distributed
dist.init_process_group("mpizero")
print("size", dist.get_world_size())
dist.destroy_process_group()
"""
    result = mpirun(1, program, timeout=60, env={"MASTER_PORT": "29500"})
    assert "size 1" in result.stdout and result.returncode == 0, result.stderr
