"""Collectives on device arrays, through the World: directly and staged, against the stand-in.

The stand-in executes queued kernels only when they are waited for, so a collective that reads
before the kernel that fills its array, or returns before its result is there, shows wrong numbers.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import mpizero
from mpizero import World
from mpizero.memory import staging
from mpizero.world.device import CudaDevice
from support.fake_cuda import FakeCupy

several_ranks = pytest.mark.parallel([2, 3, 4])
ways = pytest.mark.parametrize("aware", ["0", "1"], ids=["staged", "direct"])


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy()
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
    array[...] = -77
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
        np.testing.assert_allclose(x.host, expected, rtol=1e-6)


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
        np.testing.assert_array_equal(y.host, every[root])


@several_ranks
def test_host_and_device_arrays_must_not_mix(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(cupy, "0", monkeypatch)
    x = filled(cupy, pattern(0, 10)) if world.rank == 0 else pattern(0, 10)
    with pytest.raises(mpizero.MismatchError, match=r"rank 0: .*on a GPU"):
        world.allreduce(x)
    assert (world.allreduce(np.ones(3)) == world.size).all()  # host arrays go their own way
