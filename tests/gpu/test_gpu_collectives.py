"""On a real GPU, which ranks share: every way of collectives against numpy, with CuPy and torch.

``make gpu-test`` runs these on 1, 2 and 4 ranks. The ways through the host are always there; NCCL
takes ranks that share a GPU for hosts of their own, by ``NCCL_HOSTID``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import mpizero
from mpizero import World
from mpizero.world.device import CudaDevice

pytestmark = pytest.mark.gpu
ranks = pytest.mark.parallel([1, 2, 4])

DTYPES = [np.float32, np.float64, np.float16, np.int64, np.int32, np.uint8, np.complex64]
SIZES = [0, 1, 1000, 1 << 20, 16 << 20]


@pytest.fixture(scope="module")
def cupy() -> Any:
    return pytest.importorskip("cupy")


@pytest.fixture(params=["nccl", "host"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    found: str = request.param
    if found == "nccl":
        monkeypatch.setenv("NCCL_HOSTID", f"rank{mpizero.init().rank}")
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
        monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    return found


@pytest.fixture
def world(cupy: Any, way: str) -> Iterator[World]:
    job = mpizero.init()
    if not isinstance(job.device, CudaDevice):
        pytest.skip("this rank is bound to the host")
    made = World(job.comm, job.device, job.cuda_awareness)
    able = "nccl" in made.algorithms("all_reduce", on_device=True)
    if way == "nccl" and not able:
        pytest.skip("CuPy finds no NCCL")
    yield made
    made.close()


def values(rank: int, count: int, dtype: Any) -> np.ndarray:
    rng = np.random.default_rng((rank, count))
    return rng.integers(0, 5, count).astype(dtype)


@ranks
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_reduce(cupy: Any, world: World, dtype: Any) -> None:
    for count in SIZES:
        expected = sum(values(r, count, np.complex128) for r in range(world.size)).astype(dtype)
        x = cupy.asarray(values(world.rank, count, dtype))
        world.allreduce(x, asynchronous=True).wait()
        np.testing.assert_allclose(x.get(), expected, rtol=1e-6)
        if np.dtype(dtype).kind in "fc":
            x = cupy.asarray(values(world.rank, count, dtype))
            world.allreduce(x, "mean")
            np.testing.assert_allclose(
                x.get(), expected / world.size, rtol=1e-3 if dtype is np.float16 else 1e-6
            )


@ranks
def test_sixteen_bit_numbers_of_torch(world: World) -> None:
    torch = pytest.importorskip("torch")
    import mpizero_torch  # noqa: F401  (tensors come in as arrays)

    for dtype in (torch.bfloat16, torch.float16):
        x = torch.full((5000,), 1.5 + world.rank, dtype=dtype, device="cuda")
        world.allreduce(x)
        total = sum(1.5 + r for r in range(world.size))
        assert (x == torch.tensor(total, dtype=dtype, device="cuda")).all()
    x = torch.arange(12.0, device="cuda").reshape(3, 4).t()
    world.allreduce(x)
    assert (x == torch.arange(12.0, device="cuda").reshape(3, 4).t() * world.size).all()


@ranks
def test_the_others(cupy: Any, world: World) -> None:
    size, rank = world.size, world.rank
    for dtype in (np.float32, np.int16):
        for count in (0, 3, 100_000):
            every = [values(r, count * size, dtype) for r in range(size)]
            mine = slice(rank * count, (rank + 1) * count)
            total = np.sum([each.astype(np.int64) for each in every], 0).astype(dtype)
            x = cupy.asarray(every[rank])
            np.testing.assert_array_equal(world.reduce_scatter(x).get(), total[mine])
            gathered = world.allgather(x[:count])
            np.testing.assert_array_equal(
                gathered.get(), np.concatenate([e[:count] for e in every])
            )
            exchanged = world.all_to_all(x)
            np.testing.assert_array_equal(exchanged.get(), np.concatenate([e[mine] for e in every]))
            for root in range(size):
                y = cupy.asarray(every[rank])
                world.broadcast(y, root)
                np.testing.assert_array_equal(y.get(), every[root])
                world.reduce(z := cupy.asarray(every[rank]), root)
                np.testing.assert_array_equal(z.get(), total if rank == root else every[rank])
    rows = [values(r, 5 * r, np.float32) for r in range(size)]
    found = world.allgather_uneven(cupy.asarray(rows[rank]))
    np.testing.assert_array_equal(found.get(), np.concatenate(rows))


@ranks
def test_stream_order(cupy: Any, world: World) -> None:
    """Long chains of kernels before and behind, on streams of the user's; many under way."""
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(3)]
    handles, arrays = [], []
    for number in range(30):
        with streams[number % 3]:
            x = cupy.zeros(300_000, cupy.float32)
            for _ in range(50):
                x += 1
            handles.append(world.allreduce(x, asynchronous=True))
            arrays.append(x)
    for number, (handle, x) in enumerate(zip(handles, arrays, strict=True)):
        with streams[number % 3]:
            handle.wait()
            x += number
            assert (x == 50 * world.size + number).all()


@ranks
def test_memory_lives_as_long_as_it_is_used(cupy: Any, world: World) -> None:
    expected = world.size * 7.0
    for _ in range(30):
        x = cupy.full(1_000_000, 7.0, cupy.float32)
        handle = world.allreduce(x, asynchronous=True)
        del x
        noise = [cupy.full(1_000_000, -1.0, cupy.float32) for _ in range(3)]
        found = handle.wait()
        del handle
        assert (found == expected).all()
        del noise, found


@ranks
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_torch_tensors_are_ordered_on_torchs_stream(world: World, dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    from mpizero_torch.tensors import torch_dtype

    side = torch.cuda.Stream()
    for number in range(10):
        with torch.cuda.stream(side):
            x = torch.zeros(500_000, device="cuda", dtype=torch_dtype(dtype))
            for _ in range(20):
                x += 1
            handle = world.allreduce(x, asynchronous=True)
            handle.wait()
            x += 1
            assert (x == 20 * world.size + 1).all(), number
