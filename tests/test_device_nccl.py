"""NCCL's way, over a stand-in for NCCL: every collective, dtype and operation against numpy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import mpizero
from mpizero import World
from mpizero.memory.order import on_stream
from mpizero.reduction.operation import SUM
from mpizero.world.device import CudaDevice
from support.fake_cuda import FakeCupy

several_ranks = pytest.mark.parallel([2, 3, 4])

DTYPES = [
    np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.complex64, np.int8, np.uint8,
    np.int16, np.int64, np.uint32, np.bool_,
]  # fmt: skip
SIZES = [0, 1, 300]


@pytest.fixture(params=["late", "early"])
def cupy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy(order=request.param)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setenv("MPIZERO_CUDA_AWARE", "0")
    monkeypatch.setenv("NCCL_HOSTID", str(mpizero.init().rank))
    return fake


@pytest.fixture
def world(cupy: FakeCupy) -> Iterator[World]:
    made = World(mpizero.init().comm, CudaDevice(0, cupy))
    assert "nccl" in made.algorithms("all_reduce", on_device=True)
    yield made
    made.close()


def values(rank: int, count: int, dtype: Any) -> np.ndarray:
    rng = np.random.default_rng((rank, count))
    if dtype is np.bool_:
        return rng.integers(0, 2, count).astype(bool)
    if dtype is np.complex64:
        return (rng.integers(-4, 5, count) + 1j * rng.integers(-4, 5, count)).astype(dtype)
    low = 0 if np.dtype(dtype).kind == "u" else -3
    return rng.integers(low, 4, count).astype(dtype)


def put(cupy: FakeCupy, numbers: np.ndarray) -> Any:
    """A device array that a kernel, queued and not yet run, will fill."""
    array = cupy.empty(numbers.shape, numbers.dtype)
    place = array.host
    cupy.launch(lambda: np.copyto(place, numbers))
    return array


def combined(op: str, rows: list[np.ndarray]) -> np.ndarray:
    wide = [row.astype(np.float32) if row.dtype.itemsize == 2 and row.dtype.kind in "fV" else row
            for row in rows]  # fmt: skip
    functions = {
        "sum": np.add, "mean": np.add, "product": np.multiply, "max": np.maximum,
        "min": np.minimum, "band": np.bitwise_and, "bor": np.bitwise_or, "bxor": np.bitwise_xor,
    }  # fmt: skip
    total = wide[0]
    for row in wide[1:]:
        total = functions[op](total, row).astype(total.dtype)
    if op == "mean":
        total = total / total.dtype.type(len(rows))
    return np.asarray(total).astype(rows[0].dtype)


def operations(dtype: Any) -> list[str]:
    kind = np.dtype(dtype).kind
    if dtype is ml_dtypes.bfloat16 or kind == "f":
        return ["sum", "mean", "product", "max", "min"]
    if kind == "c":
        return ["sum", "mean", "product"]
    if kind == "b":
        return ["max", "min", "band", "bor", "bxor"]
    return ["sum", "product", "max", "min", "band", "bor", "bxor"]


def check(found: Any, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    if expected.dtype.kind in "fVc":
        found, expected = (np.asarray(x, np.complex128) for x in (found, expected))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    else:
        np.testing.assert_array_equal(found, expected)


@several_ranks
@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions(cupy: FakeCupy, world: World, dtype: Any) -> None:
    for count in SIZES:
        every = [values(r, count * world.size, dtype) for r in range(world.size)]
        for op in operations(dtype):
            expected = combined(op, every)
            x = put(cupy, every[world.rank])
            handle = world.allreduce(x, op, algorithm="nccl", asynchronous=True)
            handle.wait()
            check(x.get(), expected)
            part = world.reduce_scatter(put(cupy, every[world.rank]), op, algorithm="nccl")
            check(part.get(), expected[count * world.rank : count * (world.rank + 1)])


@several_ranks
def test_numbers_that_are_none_are_kept(cupy: FakeCupy, world: World) -> None:
    for op in ("sum", "max", "min"):
        mine = np.arange(5, dtype=np.float32)
        mine[world.rank % 5] = np.nan
        x = put(cupy, mine)
        world.allreduce(x, op, algorithm="nccl")
        assert np.isnan(x.get()[: world.size]).all()


@several_ranks
def test_sixteen_bit_numbers_are_rounded_once(cupy: FakeCupy, world: World) -> None:
    """2048 + 1 + ... has no float16, but the sum of all ranks has."""
    mine = np.array([2048.0 if world.rank == 0 else 2.0 / (world.size - 1)], np.float16)
    x = put(cupy, np.repeat(mine, 9))
    world.allreduce(x, algorithm="nccl")
    assert (x.get() == np.float16(2050)).all()


@several_ranks
def test_what_is_moved(cupy: FakeCupy, world: World) -> None:
    size, rank = world.size, world.rank
    for count in SIZES:
        every = [values(r, count * size, np.int16) for r in range(size)]
        mine = slice(count * rank, count * (rank + 1))
        gathered = world.allgather(put(cupy, every[rank][:count]), algorithm="nccl")
        check(gathered.get(), np.concatenate([each[:count] for each in every]))
        whole = put(cupy, np.zeros(count * size, np.int16))
        whole[mine] = put(cupy, every[rank][:count])
        world.allgather(whole[mine], out=whole)
        check(whole.get(), np.concatenate([each[:count] for each in every]))
        exchanged = world.all_to_all(put(cupy, every[rank]), algorithm="nccl")
        check(exchanged.get(), np.concatenate([each[mine] for each in every]))
        for root in range(size):
            x = put(cupy, every[rank])
            world.broadcast(x, root, algorithm="nccl")
            check(x.get(), every[root])
            world.reduce(y := put(cupy, every[rank]), root)
            check(y.get(), combined("sum", every) if rank == root else every[rank])
            out = world.gather(put(cupy, every[rank]), root)
            if rank == root:
                check(out.get(), np.concatenate(every))
            part = cupy.empty(count, np.int16)
            world.scatter(put(cupy, every[rank]) if rank == root else None, root, out=part)
            check(part.get(), every[root][mine])
    rows = [values(r, 3 * r, np.float64) for r in range(size)]
    check(world.allgather_uneven(put(cupy, rows[rank])).get(), np.concatenate(rows))
    sent = np.concatenate([values(rank + 9 * r, r, np.int64) for r in range(size)])
    came = world.all_to_all_uneven(put(cupy, sent), list(range(size)))
    check(came.get(), np.concatenate([values(s + 9 * rank, rank, np.int64) for s in range(size)]))


@several_ranks
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_blocks_of_the_engine(cupy: FakeCupy, world: World, dtype: Any) -> None:
    """Uneven, and empty ones."""
    size, rank = world.size, world.rank
    ends = [0, *np.cumsum([5 * r for r in range(size)]).tolist()]
    blocks = [slice(a, b) for a, b in pairwise(ends)]
    every = [values(r, ends[-1], dtype) for r in range(size)]
    x = put(cupy, every[rank])
    total = cupy.empty(blocks[rank].stop - blocks[rank].start, np.float32)

    def use(rows: list[Any]) -> None:
        SUM.accumulate(rows, total)

    def work(run: Any, parts: Any) -> None:
        run.combine_block(x, blocks, SUM, parts, use)

    world.submit("a test", work, on_stream(lambda: None, x, total)).wait()
    check(total.get(), np.sum([e.astype(np.float32) for e in every], 0)[blocks[rank]])
    world.submit(
        "a test",
        lambda run, parts: run.gather_blocks(x, blocks, parts),
        on_stream(lambda: None, x),
    ).wait()
    check(x.get(), np.concatenate([e[b] for e, b in zip(every, blocks, strict=True)]))


@several_ranks
def test_auto_takes_it_and_the_host_does_not_wait(cupy: FakeCupy, world: World) -> None:
    world.allreduce(put(cupy, np.ones(5, np.float32)))  # connects
    x, y = (put(cupy, values(world.rank, 500, np.float32)) for _ in range(2))
    cupy.log.clear()
    handles = [world.allreduce(x, "mean", asynchronous=True), world.allgather(y, asynchronous=True)]
    for handle in handles:
        handle.wait()
    x += 1
    assert cupy.host_waits() == 0
    assert {entry[0] for entry in cupy.log} <= {"kernel", "stream waits"}
    every = [values(r, 500, np.float32) for r in range(world.size)]
    check(x.get(), combined("mean", every) + 1)
    del x, y
    handles[0].wait(blocking=True)
    assert handles[0].done()


@several_ranks
def test_parts_of_the_world_have_their_own(cupy: FakeCupy, world: World) -> None:
    part = world.split(world.rank % 2)
    assert part is not None
    x = put(cupy, np.full(10, world.rank, np.float32))
    part.allreduce(x)
    mates = [r for r in range(world.size) if r % 2 == world.rank % 2]
    assert (x.get() == sum(mates)).all()
    part.close()


@several_ranks
def test_ranks_that_share_a_gpu(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_HOSTID")
    world = World(mpizero.init().comm, CudaDevice(0, cupy))
    assert "nccl" not in world.algorithms("all_reduce", on_device=True)
    with pytest.raises(mpizero.ArgumentError, match="algorithm"):
        world.allreduce(put(cupy, np.ones(5)), algorithm="nccl")
    x = put(cupy, np.ones(5))
    world.allreduce(x)  # through the host
    assert (x.get() == world.size).all()
    world.close()


@several_ranks
def test_it_is_for_device_memory(world: World) -> None:
    with pytest.raises(mpizero.ArgumentError, match="algorithm"):
        world.allreduce(np.ones(5), algorithm="nccl")


@several_ranks
def test_an_nccl_that_does_not_start_on_one_rank(
    cupy: FakeCupy, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cupy.cuda.nccl.NcclCommunicator

    def fails(*given: Any) -> Any:
        made = real(*given)
        if world.rank == world.size - 1:
            raise cupy.cuda.nccl.NcclError("NCCL_ERROR_SYSTEM_ERROR")
        return made

    monkeypatch.setattr(cupy.cuda.nccl, "NcclCommunicator", fails)
    x = put(cupy, np.ones(5))
    world.allreduce(x)  # "auto": another way
    assert (x.get() == world.size).all()
    with pytest.raises(mpizero.ArgumentError, match="algorithm"):
        world.allreduce(x, algorithm="nccl")


@several_ranks
def test_errors_that_come_later_are_told(cupy: FakeCupy, world: World) -> None:
    world.allreduce(put(cupy, np.ones(5)))
    cupy.cuda.nccl.broken = "NCCL_ERROR_REMOTE_ERROR"
    with pytest.raises(mpizero.MpizeroError, match=r"NCCL: NCCL_ERROR_REMOTE_ERROR.*NCCL_DEBUG"):
        world.allreduce(put(cupy, np.ones(5)))
    cupy.cuda.nccl.broken = ""
