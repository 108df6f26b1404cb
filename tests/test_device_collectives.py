"""Collectives on device arrays, through the World: directly and staged, against the stand-in.

The stand-in executes queued kernels only when they are waited for, so a collective that reads
before the kernel that fills its array, or returns before its result is there, shows wrong numbers.
"""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import mpizero
from mpizero import World
from mpizero.memory import staging
from mpizero.memory.order import on_host
from mpizero.reduction.operation import SUM
from mpizero.world.device import CudaDevice
from support.fake_cuda import FakeCupy

several_ranks = pytest.mark.parallel([2, 3, 4])
ways = pytest.mark.parametrize("aware", ["0", "1"], ids=["staged", "direct"])


@pytest.fixture(params=["late", "early"])
def cupy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy(order=request.param)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(staging, "CHUNK_BYTES", 4096)
    return fake


def make_world(cupy: FakeCupy, aware: str, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("MPIZERO_CUDA_AWARE", aware)
    world = World(mpizero.init().comm, CudaDevice(0, cupy))
    assert world.cuda_awareness.enabled == (aware == "1")
    return world


def filled(cupy: FakeCupy, values: np.ndarray) -> Any:
    """A device array that a kernel, queued and not yet run, will fill."""
    array = cupy.empty(values.shape, values.dtype)
    place = array.host

    def kernel() -> None:
        place[...] = values

    cupy.launch(kernel)
    return array


def pattern(rank: int, count: int) -> np.ndarray:
    return ((np.arange(count) * (rank + 2)) % 9 - 3).astype(np.float32)


@several_ranks
@ways
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("op", ["sum", "mean", "max"])
def test_all_reduce(
    cupy: FakeCupy, aware: str, asynchronous: bool, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(cupy, aware, monkeypatch)
    every = np.stack([pattern(r, 5000) for r in range(world.size)])
    expected = {"sum": every.sum(0), "mean": every.mean(0), "max": every.max(0)}[op]
    for algorithm in ("auto", "ring", "halving_doubling"):
        x = filled(cupy, every[world.rank])
        got = world.allreduce(x, op, asynchronous=asynchronous, algorithm=algorithm)
        if asynchronous:
            got = got.wait()
        assert got is x
        np.testing.assert_allclose(x.get(), expected, rtol=1e-6)


@several_ranks
@ways
def test_the_others(cupy: FakeCupy, aware: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(cupy, aware, monkeypatch)
    size, rank = world.size, world.rank
    every = [pattern(r, 3001 * size) for r in range(size)]
    mine = slice(rank * 3001, (rank + 1) * 3001)
    x = filled(cupy, every[rank])
    np.testing.assert_array_equal(world.reduce_scatter(x).get(), sum(every)[mine])
    gathered = world.allgather(filled(cupy, every[rank][:3001]))
    np.testing.assert_array_equal(gathered.get(), np.concatenate([e[:3001] for e in every]))
    exchanged = world.all_to_all(x).get()
    np.testing.assert_array_equal(exchanged, np.concatenate([e[mine] for e in every]))
    for root in range(size):
        y = filled(cupy, every[rank])
        world.broadcast(y, root)
        np.testing.assert_array_equal(y.get(), every[root])


@several_ranks
def test_host_and_device_arrays_must_not_mix(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(cupy, "0", monkeypatch)
    x = filled(cupy, pattern(0, 10)) if world.rank == 0 else pattern(0, 10)
    with pytest.raises(mpizero.MismatchError, match=r"rank 0: .*on a GPU"):
        world.allreduce(x)
    assert (world.allreduce(np.ones(3)) == world.size).all()  # host arrays go their own way


@several_ranks
@ways
def test_uneven_parts_and_roots(
    cupy: FakeCupy, aware: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(cupy, aware, monkeypatch)
    size, rank = world.size, world.rank
    rows = [pattern(r, 10 * (r + 1)) for r in range(size)]
    gathered = world.allgather_uneven(filled(cupy, rows[rank]))
    np.testing.assert_array_equal(gathered.get(), np.concatenate(rows))
    del gathered
    sent = filled(cupy, np.concatenate([pattern(rank + r, r + 1) for r in range(size)]))
    exchanged = world.all_to_all_uneven(sent, [r + 1 for r in range(size)])
    expected = np.concatenate([pattern(s + rank, rank + 1) for s in range(size)])
    np.testing.assert_array_equal(exchanged.get(), expected)
    for root in range(size):
        x = filled(cupy, pattern(rank, 300))
        world.reduce(x, root)
        total = sum(pattern(r, 300) for r in range(size))
        np.testing.assert_array_equal(x.get(), total if rank == root else pattern(rank, 300))
        out = world.gather(filled(cupy, pattern(rank, 7)), root)
        if rank == root:
            every = np.concatenate([pattern(r, 7) for r in range(size)])
            np.testing.assert_array_equal(out.get(), every)
        part = cupy.empty(5, np.float32)
        world.scatter(filled(cupy, pattern(1, 5 * size)) if rank == root else None, root, out=part)
        np.testing.assert_array_equal(part.get(), pattern(1, 5 * size)[5 * rank : 5 * rank + 5])


@several_ranks
@ways
def test_messages(cupy: FakeCupy, aware: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(cupy, aware, monkeypatch)
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    leaving, arriving = filled(cupy, pattern(world.rank, 99)), cupy.empty(99, np.float32)
    arriving.fill(-1)
    handle = world.recv(arriving, source, asynchronous=True)
    sending = world.send(leaving, to, asynchronous=True)
    assert handle.wait() == source
    sending.wait()
    assert np.array_equal(arriving.host, pattern(source, 99))  # for whatever stream


@several_ranks
@ways
def test_parts_of_one_array_are_told_apart(
    cupy: FakeCupy, aware: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place or not: by where arrays lie, not by where they start."""
    world = make_world(cupy, aware, monkeypatch)
    every = np.concatenate([pattern(r, 50) for r in range(world.size)])
    whole = cupy.empty(50 * world.size, np.float32)
    own = whole[50 * world.rank : 50 * world.rank + 50]
    own[...] = filled(cupy, pattern(world.rank, 50))
    world.allgather(own, out=whole)
    np.testing.assert_array_equal(whole.get(), every)
    with pytest.raises(mpizero.ArgumentError, match="memory of its own"):
        world.allgather(whole[1:51], out=whole)


@several_ranks
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@ways
def test_sixteen_bit_numbers(
    cupy: FakeCupy, aware: str, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(cupy, aware, monkeypatch)
    every = np.stack([(pattern(r, 700) * 0.3).astype(dtype) for r in range(world.size)])
    every[0, :2] = np.nan, np.inf
    expected = every.astype(np.float32).sum(0).astype(dtype)
    for algorithm in ("native", "ring", "halving_doubling"):
        x = filled(cupy, every[world.rank])
        world.allreduce(x, algorithm=algorithm)
        found = x.get().astype(np.float32)
        np.testing.assert_allclose(found, expected.astype(np.float32), rtol=2**-7)


@several_ranks
@ways
def test_a_result_is_waited_for_by_streams(
    cupy: FakeCupy, aware: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits on another stream sees the result there; a handle tells when it is there."""
    world = make_world(cupy, aware, monkeypatch)
    cupy.use_stream("compute")
    x = filled(cupy, pattern(world.rank, 4000))
    handle = world.allreduce(x, "mean", asynchronous=True)
    cupy.use_stream("another")
    handle.wait()
    expected = sum(pattern(r, 4000) for r in range(world.size)) / world.size
    doubled = x + x
    np.testing.assert_allclose(doubled.get(), 2 * expected, rtol=1e-6)
    handle.wait(blocking=True)
    np.testing.assert_allclose(x.host, expected, rtol=1e-6)
    assert handle.done()


@several_ranks
@ways
def test_memory_that_work_has_not_named_is_refused(
    cupy: FakeCupy, aware: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(cupy, aware, monkeypatch)
    x = filled(cupy, pattern(0, 10))
    handle = world.submit("hidden", lambda run, parts: run.all_reduce(x, SUM), on_host())
    with pytest.raises(RuntimeError, match="submitted without it"):
        handle.wait()


@several_ranks
def test_results_go_where_the_array_lies(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(cupy, "0", monkeypatch)
    x = filled(cupy, pattern(0, 10))
    with pytest.raises(mpizero.ArgumentError, match=r"in host memory; allowed: .*on a GPU"):
        world.allreduce(x, out=np.empty(10, np.float32))
    with pytest.raises(mpizero.ArgumentError, match=r"on a GPU; allowed: .*in host memory"):
        world.allgather(np.ones(5), out=cupy.empty(5 * world.size))
