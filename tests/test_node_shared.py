"""Node-shared memory, and the collectives that work in it."""

from __future__ import annotations

import gc
import os
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import mpizero
from mpizero.memory.board import PAYLOAD_BYTES
from mpizero.memory.node_shared import NOWHERE

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])


def pattern(rank: int, count: int, dtype: object) -> np.ndarray:
    """Small whole numbers: their sums are exact in every dtype, in any order."""
    return ((np.arange(count) * (rank + 3)) % 7 - 2).astype(dtype)


@several_ranks
def test_every_rank_can_address_every_part() -> None:
    world = mpizero.init()
    array = world.allocate(1000, np.float64)
    assert array.ctypes.data % 4096 == 0 and not array.any()
    array[...] = world.rank
    memory = world._node_memory
    spot = memory.spot(array)
    window = memory._windows[spot >> 44]
    window.sync()
    world.barrier()
    window.sync()
    assert spot % (1 << 44) == 0
    for rank, part in enumerate(window.parts):
        assert (part.view(np.float64) == rank).all()
    assert memory.spot(array[10:20]) == spot + 80
    assert memory.spot(np.zeros(5)) == NOWHERE
    world.barrier()


@ranks
@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int32]
)
@pytest.mark.parametrize(
    "count", [1, 7, 5000, 90_001, PAYLOAD_BYTES[0] // 4 + 13, PAYLOAD_BYTES[0] + 1]
)
@pytest.mark.parametrize("place", ["shared", "private", "mixed"])
def test_all_reduce_wherever_the_array_lies(place: str, count: int, dtype: object) -> None:
    world = mpizero.init()
    shared = place == "shared" or (place == "mixed" and world.rank % 2 == 0)
    room = world.allocate(count + 3, dtype)  # collective, whoever uses it
    array = room[3:] if shared else np.empty(count, dtype)
    expected = sum(pattern(r, count, np.float64) for r in range(world.size))
    for _ in range(2):
        array[...] = pattern(world.rank, count, dtype)
        world.allreduce(array, algorithm="auto" if world.size == 1 else "node_shared")
        assert (array.astype(np.float64) == expected).all()
        if shared:
            assert not room[:3].any()


@several_ranks
@pytest.mark.parametrize("place", ["shared", "private"])
@pytest.mark.parametrize("count", [1, 3000, PAYLOAD_BYTES[0] // 4 + 5])
def test_the_other_collectives(place: str, count: int) -> None:
    world = mpizero.init()
    size, rank = world.size, world.rank

    def make(length: int) -> np.ndarray:
        array = world.allocate(length, np.float32)
        return array if place == "shared" else np.empty(length, np.float32)

    wide, block = make(size * count), make(count)
    everyone = [pattern(r, size * count, np.float32) for r in range(size)]
    wide[...], block[...] = everyone[rank], everyone[rank][:count]
    mine = slice(rank * count, (rank + 1) * count)
    options = {"algorithm": "node_shared"}
    assert (world.reduce_scatter(wide, **options) == sum(everyone)[mine]).all()
    assert (wide == everyone[rank]).all()
    gathered = world.allgather(block, **options)
    assert (gathered == np.concatenate([e[:count] for e in everyone])).all()
    exchanged = world.all_to_all(wide, **options)
    assert (exchanged == np.concatenate([e[mine] for e in everyone])).all()
    for root in range(size):
        wide[...] = everyone[rank]
        world.broadcast(wide, root, **options)
        assert (wide == everyone[root]).all()


@several_ranks
def test_memory_is_freed_when_the_last_rank_lets_go() -> None:
    world = mpizero.init()
    gc.collect()
    world.allocate(1, np.int8)  # notes what is dead; the next allocation frees it
    before = world._node_memory.nbytes
    array = world.allocate(1000, np.float32)
    view = array[5:7]
    if world.rank > 0:
        del array, view  # on rank 0 it lives on
    gc.collect()
    other = world.allocate(1, np.int8)
    assert world._node_memory.nbytes >= before + 4000
    if world.rank == 0:
        del array
        other2 = world.allocate(1, np.int8)
        assert view.size == 2  # a view keeps the memory
        view[0] = 1.0
        del view
    else:
        other2 = world.allocate(1, np.int8)
    del other, other2
    gc.collect()
    world.allocate(1, np.int8)
    world.allocate(1, np.int8)
    assert world._node_memory.nbytes <= before + 2


def _resources() -> tuple[int, int, int]:
    files = len(os.listdir("/proc/self/fd"))
    maps = Path("/proc/self/maps").read_text().count("\n")
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return files, maps, resident


@pytest.mark.parallel([2])
def test_a_thousand_cycles_leave_nothing_behind() -> None:
    world = mpizero.init()

    def cycle() -> None:
        array = world.allocate(50_000, np.float32)
        array[...] = 1
        world.allreduce(array, algorithm="node_shared")

    for _ in range(50):  # caches fill
        cycle()
    files, maps, resident = _resources()
    for _ in range(1000):
        cycle()
    files_after, maps_after, resident_after = _resources()
    assert files_after <= files + 2
    assert maps_after <= maps + 10
    # 1000 forgotten windows would be 200 MB; allocators may keep a few MB.
    assert resident_after - resident < 16 << 20


@several_ranks
def test_without_room_it_goes_on_in_private_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIZERO_SHM_FREE", str(64 << 20))
    world = mpizero.init().split(0)
    assert world is not None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = world.allocate(30 << 20, np.float32)
        second = world.allocate(30 << 20, np.float32)
    assert world._node_memory.spot(first) == NOWHERE and second.size == 30 << 20
    messages = [str(warning.message) for warning in caught]
    if world.local_rank == 0:
        assert len(messages) == 1 and "64 MiB free" in messages[0] and "--shm-size" in messages[0]
        assert f"{120 * world.local_size} MiB are needed" in messages[0]
    else:
        assert not messages
    small = world.allocate(100, np.float32)
    assert world._node_memory.spot(small) != NOWHERE
    world.close()


@several_ranks
@pytest.mark.parametrize("free", [16 << 20, (16 << 20) + 900_000])
def test_without_room_for_anything_mpi_does_it_all(
    free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None at all, or just enough for small payloads, through which large arrays go in pieces."""
    monkeypatch.setenv("MPIZERO_SHM_FREE", str(free))
    world = mpizero.init().split(0)
    assert world is not None
    names = world.algorithms("all_reduce")
    assert ("node_shared" in names) == (free > 16 << 20)
    for count in (5, 70_001):
        for name in ("auto", *names):
            array = pattern(world.rank, count, np.float32)
            expected = sum(pattern(r, count, np.float32) for r in range(world.size))
            assert (world.allreduce(array, algorithm=name) == expected).all()
    with pytest.raises(mpizero.MismatchError):
        world.allreduce(np.ones(2 if world.rank else 3))
    world.close()


@pytest.mark.parallel([2, 4])
@pytest.mark.timeout(240)
@pytest.mark.parametrize("mode", ["thread", "inline"])
def test_ten_thousand_small_collectives(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random sizes and operations in an agreed order, several handles in flight."""
    monkeypatch.setenv("MPIZERO_PROGRESS", mode)
    world = mpizero.init().split(0)
    assert world is not None
    rng = np.random.default_rng(11)  # the same on every rank
    flying: list[tuple[object, np.ndarray]] = []
    algorithms = ("native", "node_shared", "auto", "ring", "halving_doubling")
    for _ in range(10_000 if world.size == 2 else 400):
        count = int(rng.integers(0, 600))
        name = algorithms[rng.integers(len(algorithms))]
        array = pattern(world.rank, count, np.float32)
        expected = sum(pattern(r, count, np.float32) for r in range(world.size))
        if rng.integers(2):
            flying.append((world.allreduce(array, algorithm=name, asynchronous=True), expected))
        else:
            assert (world.allreduce(array, algorithm=name) == expected).all()
        while len(flying) > rng.integers(1, 6):
            handle, wanted = flying.pop(0)
            assert (handle.wait() == wanted).all()
    for handle, wanted in flying:
        assert (handle.wait() == wanted).all()
    world.close()


@several_ranks
@pytest.mark.parametrize("count", [7, 20_001, 60_001, 200_001, 400_001])
def test_ranks_may_hold_different_kinds_of_arrays(count: int) -> None:
    """What is kept of earlier calls, or where an array lies, must not lead ranks separate ways."""
    world = mpizero.init()
    room = world.allocate(count, np.float32)
    kinds = {
        "private": lambda: np.empty(count, np.float32),
        "shared": lambda: room,
        "every second": lambda: np.empty(2 * count, np.float32)[::2],
        "memoryview": lambda: memoryview(np.empty(count, np.float32)),
    }
    expected = sum(pattern(r, count, np.float32) for r in range(world.size))
    names = list(kinds)
    for turn in range(3 * len(names)):
        array = kinds[names[(turn * (1 + world.rank)) % len(names)]]()
        np.asarray(array)[...] = pattern(world.rank, count, np.float32)
        world.allreduce(array)
        assert (np.asarray(array) == expected).all()


@several_ranks
def test_an_array_that_takes_anothers_id_is_looked_up_again() -> None:
    world = mpizero.init()
    count = 300_000
    for step in range(6):
        array = world.allocate(count, np.float32) if step % 2 else np.empty(count, np.float32)
        array[...] = pattern(world.rank, count, np.float32) + step
        world.allreduce(array, "max")
        expected = np.max([pattern(r, count, np.float32) for r in range(world.size)], axis=0)
        assert (array == expected + step).all()
        del array


@several_ranks
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("who", ["all", "some"])
def test_results_beside_the_array_in_shared_memory(who: str, asynchronous: bool) -> None:
    """``out`` is filled before the ranks agree that they are ready, not after."""
    world = mpizero.init()
    count = 3_000_000
    room = world.allocate(count, np.float32)
    expected = sum(pattern(r, count, np.float32) for r in range(world.size))
    for _ in range(3):
        mine = pattern(world.rank, count, np.float32)
        room[...] = -1000
        world.barrier()
        if who == "all" or world.rank == 0:
            result = world.allreduce(mine, out=room, asynchronous=asynchronous)
        else:
            room[...] = mine
            result = world.allreduce(room, asynchronous=asynchronous)
        if asynchronous:
            result.wait()
        assert (room == expected).all()
