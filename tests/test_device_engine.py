"""The engine on device memory: DDP's buckets and ZeRO's shards, over the stand-in for CuPy.

As under torch, gradients are computed on a stream of the framework's, which is not the one that
CuPy would use in this thread. The stand-in runs queued kernels as late, or as early, as it may, and
gives memory out again at once: what is not ordered shows wrong numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import mpizero
from mpizero import World
from mpizero.engine import (
    SHARDED,
    WHOLE,
    Filling,
    GradientReducer,
    GradientSharder,
    ParameterMemory,
    ParameterSpec,
    ShardGroup,
    Weight,
    cut_flat,
    take_lane,
)
from mpizero.memory import staging
from mpizero.world.device import CudaDevice
from support.fake_cuda import FakeCupy

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])
both_dtypes = pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])

SHAPES = [(3,), (4, 5), (), (3_000,), (0,), (7,)]


class Site:
    """A World on a device, and a framework that computes there on a stream of its own."""

    def __init__(self, order: str, way: str) -> None:
        self.cupy = FakeCupy(order=order)
        self.world = World(mpizero.init().comm, CudaDevice(0, self.cupy))
        assert self.world.cuda_awareness.enabled == (way == "direct")
        ways = self.world.algorithms("all_reduce", on_device=True)
        assert ("nccl" in ways) == (way == "nccl" or self.world.size == 1)
        self.compute = self.cupy.new_stream("framework")

    def stream(self) -> int:
        return self.compute.ptr

    def allocate(self, count: int, dtype: Any) -> Any:
        with self.compute:
            return self.cupy.zeros(count, dtype)

    def put(self, values: Any, into: Any) -> None:
        """A kernel of the framework's, which will write ``values``."""
        place = into.host
        self.compute.add(lambda: np.copyto(place, values.reshape(place.shape)))

    def read(self, array: Any) -> np.ndarray:
        """After what the framework has queued."""
        return np.array(array.get(stream=self.compute), np.float32)


@pytest.fixture(params=["late-staged", "early-direct", "late-nccl", "early-nccl"])
def site(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    order, way = request.param.split("-")
    monkeypatch.setenv("MPIZERO_CUDA_AWARE", str(int(way == "direct")))
    if way == "nccl":  # which wants a GPU for each rank, or so it must seem
        monkeypatch.setenv("NCCL_HOSTID", str(mpizero.init().rank))
    monkeypatch.setattr(staging, "CHUNK_BYTES", 4096)
    made = Site(order, way)
    monkeypatch.setitem(sys.modules, "cupy", made.cupy)
    yield made
    made.world.close()


def gradient(index: int, rank: int, step: int) -> np.ndarray:
    rng = np.random.default_rng((index, rank, step))
    return rng.integers(-8, 9, SHAPES[index]).astype(np.float32)


def specs(dtype: Any) -> list[ParameterSpec]:
    return [ParameterSpec(f"p{i}", shape, np.dtype(dtype)) for i, shape in enumerate(SHAPES)]


@ranks
@both_dtypes
@pytest.mark.parametrize("weighed", [False, True])
def test_buckets(site: Site, dtype: Any, weighed: bool) -> None:
    """Also of parameters that only some ranks use, and that some passes leave out."""
    lane = take_lane(site.world)
    reducer = GradientReducer(
        lane, specs(dtype), site.allocate, bucket_bytes=2000, stream=site.stream
    )
    size, rank = site.world.size, site.world.rank
    for step in range(3):
        users = [[r for r in range(size) if i != 1 and (i + r + step) % 3] for i in range(6)]
        weights = [float(1 + (r + step) % 2) for r in range(size)]
        weight = Weight(weights[rank], stated=True) if weighed else Weight()
        reducer.open(reducer.plan(weight, kept=False))
        for index in range(5, -1, -1):
            if rank in users[index]:
                site.put(gradient(index, rank, step), reducer.view(index))
                reducer.ready(index)
        found = reducer.close()
        assert found == [bool(u) for u in users]
        shares = [w / sum(weights) for w in weights] if weighed else [1 / size] * size
        for index in range(6):
            if users[index]:
                expected = sum(shares[r] * gradient(index, r, step) for r in users[index])
                np.testing.assert_allclose(
                    site.read(reducer.view(index)),
                    expected,
                    rtol=1e-6 if dtype == np.float32 else 2**-7,
                    atol=1e-6,
                )


@several_ranks
def test_the_host_does_not_wait_for_buckets(site: Site) -> None:
    """Where what is reduced is enqueued: between the first gradient and what uses the means."""
    if "nccl" not in site.world.algorithms("all_reduce", on_device=True):
        pytest.skip("MPI touches what it sends on the host")
    lane = take_lane(site.world)
    reducer = GradientReducer(lane, specs(np.float32), site.allocate, stream=site.stream)
    for step in range(4):
        site.cupy.log.clear()
        reducer.open(reducer.plan(Weight(), kept=False))
        for index in range(5, -1, -1):
            site.put(gradient(index, site.world.rank, step), reducer.view(index))
            reducer.ready(index)
        reducer.close()
        assert site.cupy.host_waits() == 0
        np.testing.assert_allclose(
            site.read(reducer.view(3)),
            sum(gradient(3, r, step) for r in range(site.world.size)) / site.world.size,
            rtol=1e-6,
        )


@ranks
@both_dtypes
@pytest.mark.parametrize("whole", [True, False], ids=["stage 1", "stage 2"])
def test_shards_of_gradients(site: Site, dtype: Any, whole: bool) -> None:
    """Two passes, the second added to the first; segments filled from memory that is soon free."""
    lane = take_lane(site.world)
    group = ShardGroup(lane.world)
    space = cut_flat(specs(dtype), [5, 4, 3, 2, 1, 0], group.parts, 2048)
    own: list[int] = []

    def fill(key: tuple[int, int], fillings: Sequence[Filling]) -> list[int]:
        missing = []
        for at, filling in enumerate(fillings):
            if filling.index not in own:
                missing.append(at)
                continue
            values = gradient(filling.index, site.world.rank, step).reshape(-1)
            part = values if filling.elements is None else values[filling.elements]
            site.put(part, filling.memory)
        return missing

    sharder = GradientSharder(
        lane, group, specs(dtype), [space], [np.dtype(np.float32)], site.allocate,
        whole=whole, on_the_way=[np.dtype(dtype)], stream=site.stream, fill=fill,
        has=lambda: [i in own for i in range(6)],
    )  # fmt: skip
    if whole and dtype != np.float32:
        pytest.skip("stage 1 sends what it keeps")
    expected = [np.zeros(shape, np.float32) for shape in SHAPES]
    for step in range(2):
        own[:] = [i for i in range(6) if (i + site.world.rank + step) % 3]
        sharder.open(sharder.plan(Weight(), kept=False))
        for index in own:
            sharder.ready(index)
        sharder.close()
        sharder.keeps = True
        for index in range(6):
            users = [r for r in range(site.world.size) if (index + r + step) % 3]
            for r in users:
                expected[index] += gradient(index, r, step) / site.world.size
    squares = 0.0
    for segment, shard in zip(space.segments, sharder.shard(0), strict=True):
        block, values = segment.block(group.part), site.read(shard)
        squares += float((values.astype(np.float64) ** 2).sum())
        for index in segment.members:
            found = space.layout.overlap(str(index), block)
            if found is not None:
                elements, place = found
                np.testing.assert_allclose(
                    values[place], expected[index].reshape(-1)[elements], rtol=1e-5, atol=1e-5
                )
    assert sharder.own_squares == pytest.approx(squares, rel=1e-5)


@ranks
@both_dtypes
@pytest.mark.parametrize("how", [WHOLE, SHARDED])
@pytest.mark.parametrize("masters", ["none", "device", "host"])
def test_parameters(site: Site, dtype: Any, how: str, masters: str) -> None:
    """Updates reach all ranks; sharded ones are gathered right behind the kernels that fill them.

    With copies that the optimizer updates: on the device, or (offload) in host memory.
    """
    group = ShardGroup(site.world)
    plan = specs(dtype)
    space = cut_flat(plan, [5, 4, 3, 2, 1, 0], group.parts, 2048)
    private = np.zeros if masters == "host" else site.allocate
    memory = ParameterMemory(group, how, site.allocate, private, site.stream)
    memory.add(space, master=None if masters == "none" else np.dtype(np.float32))
    for index, spec in enumerate(plan):
        count = int(np.prod(spec.shape))
        values = (np.arange(count) % 50 + index).astype(np.float32 if masters != "none" else dtype)
        given = site.allocate(count, values.dtype)
        site.put(values, given)
        memory.store(0, index, given)
        del given  # its memory is given out again
    memory.settle()
    for step in range(2):
        for block in memory.updated(0):
            values = (site.read(block) if masters != "host" else block) + 4.0
            if masters == "host":
                block[...] = values
            else:
                site.put(values.astype(block.dtype), block)
        memory.publish()
        whole = site.allocate(space.size, dtype)
        if how == SHARDED:
            handle = memory.gather(0, whole, "a test")
            if handle is not None:
                handle.wait()
        for index, spec in enumerate(plan):
            expected = np.arange(int(np.prod(spec.shape))) % 50 + index + 4.0 * (step + 1)
            kept = space.layout.view(whole, str(index)) if how == SHARDED else memory.view(0, index)
            np.testing.assert_array_equal(site.read(kept).reshape(-1), expected)
            collected = memory.collect(0, index)
            found = collected if masters == "host" else site.read(collected)
            np.testing.assert_array_equal(found, expected)
        memory.settle()
