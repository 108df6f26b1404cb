"""Two levels: shared memory inside nodes, messages between them. Nodes are emulated by size."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

import mpizero
from mpizero import World
from mpizero.collectives.transport import MpiTransport


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A world of nodes with two ranks each (the last with one if the count is odd)."""
    monkeypatch.setenv("MPIZERO_RANKS_PER_NODE", "2")
    part = mpizero.init().split(0)
    assert part is not None
    yield part
    part.close()


def pattern(rank: int, count: int, dtype: object) -> np.ndarray:
    return ((np.arange(count) * (rank + 3)) % 7 - 2).astype(dtype)


@pytest.mark.parallel([3, 4])
def test_emulated_nodes(world: World) -> None:
    assert world.node_count == 2
    assert world.node_ranks == ((0, 1), tuple(range(2, world.size)))[world.rank // 2]
    assert world.node.size == world.local_size == len(world.node_ranks)
    assert world.node.allreduce(1) == world.local_size


@pytest.mark.parallel([3, 4])
@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64]
)
@pytest.mark.parametrize("count", [0, 1, 2, 4097, 400_003, 2_500_001])
@pytest.mark.parametrize("shared", [True, False])
def test_all_reduce(world: World, dtype: object, count: int, shared: bool) -> None:
    array = world.allocate(count, dtype) if shared else np.empty(count, dtype)
    array[...] = pattern(world.rank, count, dtype)
    world.allreduce(array, algorithm="hierarchical")
    expected = sum(pattern(r, count, np.float64) for r in range(world.size))
    assert (array.astype(np.float64) == expected).all()


@pytest.mark.parallel([3, 4])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_sums_are_rounded_once(world: World, dtype: object) -> None:
    rng = np.random.default_rng(3)
    everyone = rng.normal(size=(world.size, 5000)).astype(np.float32).astype(dtype)
    got = world.allreduce(everyone[world.rank].copy(), "mean", algorithm="hierarchical")
    exact = everyone.astype(np.float64).mean(axis=0)
    # The float32 sum is exact to 2^-22 or so; then one rounding to the nearest.
    unit = np.finfo(np.float16).eps if dtype == np.float16 else 2.0**-7
    scale = np.maximum(np.abs(exact), 1e-3)
    assert (np.abs(got.astype(np.float64) - exact) <= 0.501 * unit * scale + 1e-7).all()


@pytest.mark.parallel([3, 4])
def test_mean_max_and_bits(world: World) -> None:
    own = np.random.default_rng(world.rank).normal(size=100_001).astype(np.float32)
    everyone = np.stack(world.gather_objects(own))
    for op, expected in (("mean", everyone.mean(axis=0)), ("max", everyone.max(axis=0))):
        got = world.allreduce(own.copy(), op, algorithm="hierarchical")
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        assert len(set(world.gather_objects(got.tobytes()))) == 1


@pytest.mark.parallel([3, 4])
@pytest.mark.parametrize("count", [1, 5000, 700_000])
def test_broadcast_from_every_root(world: World, count: int) -> None:
    for root in range(world.size):
        array = pattern(world.rank, count, np.float32)
        world.broadcast(array, root, algorithm="hierarchical")
        assert (array == pattern(root, count, np.float32)).all()


@pytest.mark.parallel([4])
@pytest.mark.parametrize("count", [1, 5000, 300_000])
def test_gather_and_scatter_on_even_nodes(world: World, count: int) -> None:
    gathered = world.allgather(pattern(world.rank, count, np.int32), algorithm="hierarchical")
    assert (gathered == np.concatenate([pattern(r, count, np.int32) for r in range(4)])).all()
    wide = pattern(world.rank, 4 * count, np.float32)
    got = world.reduce_scatter(wide, algorithm="hierarchical")
    total = sum(pattern(r, 4 * count, np.float32) for r in range(4))
    assert (got == total[world.rank * count : (world.rank + 1) * count]).all()


@pytest.mark.parallel([3])
def test_uneven_nodes_refuse_what_they_cannot_do(world: World) -> None:
    with pytest.raises(mpizero.ArgumentError, match="hierarchical"):
        world.allgather(np.ones(3), algorithm="hierarchical")


@pytest.mark.parallel([4])
def test_a_byte_crosses_a_nodes_link_as_if_the_node_were_one_rank(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = 0
    exchange = MpiTransport.exchange

    def counting(self, outgoing, to, incoming, source):  # noqa: ANN001, ANN202
        nonlocal sent
        if to is not None:
            sent += outgoing.nbytes
        exchange(self, outgoing, to, incoming, source)

    monkeypatch.setattr(MpiTransport, "exchange", counting)
    array = np.ones(1_000_000, np.float32)
    world.allreduce(array, algorithm="hierarchical")  # messages go between nodes only
    per_node = world.node.allreduce(sent)
    nodes = world.node_count
    assert per_node == 2 * (nodes - 1) * array.nbytes // nodes
