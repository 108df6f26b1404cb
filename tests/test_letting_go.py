"""Ranks let go of sub-worlds each at its own time; they are given back once all have."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import weakref
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import mpizero
from mpizero import World
from mpizero.diagnostics.current import recorder
from mpizero.memory import node_shared
from mpizero.memory.node_shared import NOWHERE
from mpizero.world import holdings
from mpizero_torch.distributed import MpiProcessGroup
from support.launch import mpirun

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])


@pytest.fixture(autouse=True)
def by_references_alone() -> Iterator[None]:
    """What tests say is dropped is, and nothing else: no collector of cycles comes in between."""
    gc.collect()  # what earlier tests left: ``settle`` might collect it in the middle
    gc.disable()
    mpizero.init().split(None)
    yield
    gc.enable()


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("mpizero")
    yield
    dist.destroy_process_group()


def held_with_a_group() -> int:
    """How much is held when there is one group more, of all ranks. It is destroyed."""
    group = dist.new_group()
    held = holdings.held()
    dist.destroy_process_group(group)
    return held


def of_all(world: World, in_order: bool = False) -> World:
    part = world.subworld(range(world.size), in_order=in_order)
    assert part is not None
    return part


def name_of(world: World) -> holdings.Name:
    name: holdings.Name = world._caller.hold.name
    return name


def is_held(name: holdings.Name) -> bool:
    return name in holdings._things


@ranks
@pytest.mark.parametrize("by", ["reference", "let_go"])
def test_a_sub_world_is_given_back_when_the_last_rank_has_let_go(by: str) -> None:
    world = mpizero.init()
    part: World | None = of_all(world)
    assert part is not None
    name = name_of(part)
    for last in range(world.size):
        assert is_held(name)
        if world.rank == last:
            if by == "let_go":
                part.let_go()
            part = None
        # Making one is what gives back; that the last rank has only just let go is no matter.
        of_all(world).close()
        assert is_held(name) == (last < world.size - 1)


@several_ranks
def test_ranks_that_are_not_of_it_are_not_asked() -> None:
    """Others are in another call, and would never come: this would not end."""
    world = mpizero.init()
    mine = [0, 1] if world.rank < 2 else [world.rank]
    names = []
    for _ in range(3):
        part = world.subworld(mine)
        assert part is not None
        assert part.allreduce(1) == len(mine)
        names.append(name_of(part))
        del part
    assert [is_held(name) for name in names] == [False, False, True]
    world.barrier()
    world.split(None)
    assert not is_held(names[-1])


@several_ranks
def test_making_what_has_not_all_of_its_ranks_gives_nothing_back() -> None:
    world = mpizero.init()
    name = name_of(of_all(world))  # dropped on all ranks at once
    part = world.subworld([0] if world.rank == 0 else list(range(1, world.size)))
    assert part is not None and is_held(name)
    world.split(None)
    assert not is_held(name)
    part.close()


@several_ranks
def test_overlapping_groups_go_in_any_order_at_any_time() -> None:
    """Each rank lets go in an order of its own, between makings that all of a group have."""
    world = mpizero.init()
    groups = [
        some
        for size in range(1, world.size + 1)
        for some in itertools.combinations(range(world.size), size)
    ]
    common, own = random.Random(7), random.Random(world.rank)
    mine: list[tuple[tuple[int, ...], World]] = []
    names = []
    before = holdings.held()
    for number in range(40):
        some = common.choice(groups)
        part = world.subworld(some, in_order=number % 2 == 0)
        if part is not None:
            names.append(name_of(part))
            assert part.allreduce(world.rank) == sum(some)
            mine.append((some, part))
        del part
        while len(mine) > own.randrange(4):
            del mine[own.randrange(len(mine))]
    assert len(names) > 10 and sum(map(is_held, names)) < len(names)
    mine.clear()
    world.barrier()
    world.split(None)
    assert not any(map(is_held, names)) and holdings.held() == before
    assert world.allreduce(1) == world.size


@several_ranks
def test_process_groups_are_destroyed_in_any_order(process_group: None) -> None:
    before = held_with_a_group()
    size, rank = dist.get_world_size(), dist.get_rank()
    pairs = list(itertools.combinations(range(size), 2)) * 3
    mine = [group for pair in pairs if isinstance(group := dist.new_group(pair), MpiProcessGroup)]
    del group
    assert len(mine) == 3 * (size - 1) and holdings.held() > before
    random.Random(rank).shuffle(mine)
    while mine:
        group = mine.pop()
        dist.destroy_process_group(group)
        with pytest.raises(mpizero.LaunchError, match="closed"):
            group.allreduce([torch.ones(1)])
        dist.all_reduce(torch.ones(1))  # the others are at another group
    assert held_with_a_group() == before


@ranks
@pytest.mark.parametrize("mode", ["inline", "thread"])
@pytest.mark.parametrize("in_order", [False, True])
def test_who_has_a_handle_has_its_world(
    mode: str, in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPIZERO_PROGRESS", mode)
    world = mpizero.init()
    part = of_all(world, in_order)
    name = name_of(part)
    array = np.full(100_000, float(world.rank))
    handle = part.allreduce(array, asynchronous=True)
    if world.rank == 0:
        part.let_go()
    del part
    of_all(world).close()
    if mode == "inline" and world.size > 1:
        assert is_held(name)  # nobody has carried it out
    assert (handle.wait() == sum(range(world.size))).all()
    of_all(world).close()
    assert not is_held(name)
    assert handle.done() and (handle.wait() is array)


@ranks
def test_what_nobody_waits_for_goes_with_its_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIZERO_PROGRESS", "inline")
    world = mpizero.init()
    part = of_all(world)
    name = name_of(part)
    part.allreduce(np.ones(3), asynchronous=True)  # and the handle is dropped
    del part
    gc.collect()
    world.split(None)
    assert not is_held(name)


@several_ranks
def test_the_thread_ends_with_its_world() -> None:
    world = mpizero.init()
    part = of_all(world, in_order=True)
    assert (part.allreduce(np.ones(9), asynchronous=True).wait() == world.size).all()
    threads = [each for each in threading.enumerate() if each.name == "mpizero"]
    assert part._worker._thread in threads
    thread = part._worker._thread
    assert thread is not None
    del part
    thread.join(20)  # before it has been given back: that wants the other ranks
    assert not thread.is_alive()


@ranks
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_error_of_a_call_does_not_keep_a_world(asynchronous: bool) -> None:
    world = mpizero.init()
    part = of_all(world)
    name = name_of(part)
    if world.size > 1:
        with pytest.raises(mpizero.MismatchError):
            handle = part.allreduce(np.ones(3 + part.rank), asynchronous=asynchronous)
            handle.wait()
        with pytest.raises(mpizero.MismatchError):
            part.subworld([(part.rank + at) % part.size for at in range(part.size)])
    with pytest.raises(mpizero.ArgumentError):
        part.allreduce(np.ones(3), op="nonsense")
    del part
    if asynchronous and world.size > 1:
        del handle
        gc.collect()  # a handle has its error, whose frames have the handle
    world.split(None)
    assert not is_held(name)


@ranks
def test_nothing_can_be_asked_of_what_was_let_go() -> None:
    world = mpizero.init()
    part = of_all(world)
    part.let_go()
    part.let_go()
    assert part.closed and part.size == world.size
    for ask in (
        lambda: part.allreduce(np.ones(3)),
        lambda: part.barrier(),
        lambda: part.send(np.ones(1), 0),
        lambda: part.recv(np.ones(1), 0),
        lambda: part.split(0),
        lambda: part.subworld([part.rank]),
        lambda: part.allocate(3, np.int8),
        lambda: part.allocate_common(3, np.int8),
        lambda: part.submit("x", lambda run, parts: None, ()),
    ):
        with pytest.raises(mpizero.LaunchError, match="closed"):
            ask()
    part.close()  # does nothing: asks no other rank
    world.split(None)


@ranks
def test_arrays_outlive_their_world() -> None:
    """Here and on other ranks; then their memory goes, too."""
    world = mpizero.init()
    before = holdings.held()
    part = of_all(world)
    array = part.allocate(5000, np.float32)
    array[...] = world.rank
    others = part.counterparts(array)
    del part
    world.split(None)
    assert holdings.held() == before + (world.local_size > 1)
    assert (array == world.rank).all()
    for rank, theirs in enumerate(others or ()):
        assert (theirs == rank).all()
    world.barrier()
    del others
    if world.rank == 0:
        del array
    world.split(None)
    assert holdings.held() == before + (world.local_size > 1)
    array = None
    world.split(None)
    assert holdings.held() == before


@ranks
def test_a_part_outlives_what_it_was_made_from() -> None:
    world = mpizero.init()
    middle = of_all(world)
    names = [name_of(middle)]
    inner = of_all(middle)
    named = middle.part("some", 0)
    names += [name_of(inner), name_of(named)]
    middle.let_go()
    del middle
    world.split(None)
    assert [is_held(name) for name in names] == [False, True, True]
    assert inner.allreduce(1) == named.allreduce(1) == world.size
    del named
    world.split(None)
    assert [is_held(name) for name in names] == [False, True, False]
    del inner


@several_ranks
@pytest.mark.parametrize("size", [3, 200_000])  # that go at once, and that want to be asked for
@pytest.mark.parametrize("by", ["drop", "close"])
def test_messages_do_not_come_to_who_is_next(by: str, size: int) -> None:
    """MPI may give the next communicator the place of one that still has messages."""
    world = mpizero.init()
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    for number in range(3):
        part = of_all(world)
        got = np.zeros(1)
        missed = part.recv(got, source, 5, asynchronous=True)  # never sent
        sent = part.send(np.full(size, -1.0), to, 6, asynchronous=True)  # never received
        part.barrier()
        if by == "close":
            part.close()
            with pytest.raises(mpizero.LaunchError, match="nothing had come"):
                missed.wait()
            assert sent is not None and sent.done()
        del part, missed, sent
        after = of_all(world)
        arrived = after.recv(np.zeros(size), source, 6, asynchronous=True)
        first = after.recv(np.zeros(1), None, None, asynchronous=True)
        after.barrier()
        assert not arrived.done() and not first.done()
        after.barrier()
        after.send(np.full(1, float(number)), to, 5)
        after.send(np.full(size, float(number)), to, 6)
        assert arrived.wait() == first.wait() == source
        assert (arrived._transfer.array.flat == number).all()
        assert (first._transfer.array.flat == number).all() and not got.any()
        after.close()


@several_ranks
def test_who_waits_for_a_message_has_its_world() -> None:
    world = mpizero.init()
    part: World | None = of_all(world)
    assert part is not None
    name = name_of(part)
    got = np.zeros(4)
    waiting = part.recv(got, 1, asynchronous=True) if world.rank == 0 else None
    if world.rank != 1:
        part = None
    world.split(None)
    assert is_held(name)
    if world.rank == 1:
        assert part is not None
        part.send(np.arange(4.0), 0)
        part = None
    world.split(None)
    assert is_held(name) or waiting is None  # rank 0 has not asked whether it has come
    if waiting is not None:
        assert waiting.wait() == 1 and (got == np.arange(4.0)).all()
    world.split(None)
    assert not is_held(name)


@several_ranks
def test_a_timeout_in_between(process_group: None) -> None:
    """Of a monitored barrier to which one rank does not come: messages stay under way."""
    before = held_with_a_group()
    for _ in range(3):
        group = dist.new_group()
        if dist.get_rank() == 0:
            with pytest.raises(RuntimeError, match="monitoredBarrier"):
                dist.monitored_barrier(group, timeout=timedelta(milliseconds=10))
        work = dist.irecv(torch.zeros(1), (dist.get_rank() + 1) % dist.get_world_size(), group)
        with pytest.raises(RuntimeError, match="Timed out"):
            work.wait(timedelta(milliseconds=10))
        del work
        dist.destroy_process_group(group)
        dist.monitored_barrier()
        del group
    assert held_with_a_group() == before


@several_ranks
def test_who_destroys_a_group_waits_for_nobody(process_group: None) -> None:
    """Here for a rank that comes to a call only after it has heard from who has destroyed."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group()
    total = torch.ones(3)
    if rank == 0:
        dist.all_reduce(total, group=group, async_op=True)  # and the work is dropped
        dist.destroy_process_group(group)
        for other in range(1, size):
            dist.send(torch.ones(1), other)
    else:
        dist.recv(torch.zeros(1), 0)
        dist.all_reduce(total, group=group)
        assert (total == size).all()
        dist.destroy_process_group(group)
    dist.barrier()


LEFT_UNDER_WAY = """
import time, torch, torch.distributed as dist, mpizero_torch.distributed
dist.init_process_group("mpizero")
total = torch.ones(300_000)
if dist.get_rank() == 1:
    time.sleep(0.5)
dist.all_reduce(total, async_op=True)
dist.destroy_process_group()
import atexit
atexit._run_exitfuncs()
print(f"rank has {total.sum().item():.0f}")
"""


def test_what_is_under_way_in_a_destroyed_group_is_finished_at_exit() -> None:
    result = mpirun(2, LEFT_UNDER_WAY, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("rank has 600000") == 2


class Cycle:
    """What refers to itself, as wrappers do."""

    def __init__(self, *what: Any) -> None:
        self.what, self.itself = what, self


@ranks
def test_cycles_are_looked_for_when_there_is_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the program has switched the collector off."""
    world = mpizero.init()
    before = holdings.held()
    monkeypatch.setattr(holdings, "_MANY", before + 6)
    monkeypatch.setattr(holdings, "_many", before + 6)
    most = 0
    for _ in range(15):
        Cycle(of_all(world))
        most = max(most, holdings.held())
    # Of 15 the first six are found; the next search comes at twice what remains, or at the end.
    assert most <= before + 10


@several_ranks
def test_cycles_are_looked_for_when_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    world = mpizero.init()
    size = 50_000
    memory, ranks_here = world._node_memory, world.local_size
    room = memory.nbytes * ranks_here + 2.5 * ranks_here * size + node_shared._SHM_RESERVE

    def free() -> int:
        return int(room - memory.nbytes * ranks_here)

    monkeypatch.setattr(node_shared, "_free_shared_memory", free)
    for _ in range(4):
        array = world.allocate(size, np.int8)
        assert memory.spot(array) != NOWHERE or ranks_here == 1
        Cycle(array)
        del array


@ranks
def test_a_communicator_of_the_users_takes_its_world_along() -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Dup()
    made = mpizero.init(comm)
    assert mpizero.init(comm) is made
    reference, name = weakref.ref(made), name_of(made)
    del made
    assert reference() is not None and is_held(name)
    comm.Free()
    assert reference() is None
    mpizero.init().split(None)
    assert not is_held(name)


@several_ranks
def test_a_name_of_a_lane_that_is_used_again_counts_on() -> None:
    """By their numbers calls are put beside each other; those of before are not to be taken for
    new ones. Ranks have different ones of before: here rank 0 has sent more than the others."""
    world = mpizero.init()
    seen, last = set(), -1
    for _ in range(4):
        part = of_all(world)
        lane = part._lanes.blocking
        seen.add(lane.name)
        starts = world.gather_objects(part._lanes.start)
        assert len({*starts}) == 1 and starts[0] >= last
        for _ in range(7 if part.rank == 0 else 2):
            part.send(np.ones(1), part.rank, asynchronous=True)
        part.allreduce(1)
        last = max(world.gather_objects(max(lane.sequence, part._lanes.start + 7)))
        del part, lane
    assert len(seen) <= 2
    texts = recorder().texts.nbytes
    for _ in range(3):
        of_all(world)
    assert recorder().texts.nbytes == texts
