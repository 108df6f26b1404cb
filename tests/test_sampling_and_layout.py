"""Which samples a rank takes, and where arrays lie in flat memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpizero.errors import ArgumentError
from mpizero.layout import ALIGNMENT_BYTES, FlatLayout
from mpizero.sampling import ShardedBatches, Share

pytestmark = pytest.mark.once


@given(
    count=st.integers(0, 200),
    batch_size=st.integers(1, 9),
    size=st.integers(1, 9),
    shuffle=st.booleans(),
    speeds=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_parts_are_disjoint_complete_and_weighted_exactly(
    count: int, batch_size: int, size: int, shuffle: bool, speeds: bool, epoch: int
) -> None:
    given_speeds = [1.0 + rank for rank in range(size)] if speeds else None
    everyones = [
        list(
            ShardedBatches(
                count, batch_size, rank, size, shuffle=shuffle, speeds=given_speeds
            ).epoch(epoch)
        )
        for rank in range(size)
    ]
    assert {len(batches) for batches in everyones} == {-(-count // (batch_size * size))}
    counted = [i for batches in everyones for b in batches if b.weight for i in b.indices.tolist()]
    assert sorted(counted) == list(range(count))
    values = np.random.default_rng(0).normal(size=count)
    for step in zip(*everyones, strict=True):
        own = [(values[b.indices].mean(), b.weight) for b in step]
        together = np.concatenate([b.indices for b in step if b.weight])
        mean = sum(m * w for m, w in own) / size
        assert mean == pytest.approx(values[together].mean(), abs=1e-12)


@given(size=st.integers(1, 8), batch_size=st.integers(1, 5), epoch=st.integers(0, 5))
def test_n_ranks_see_the_global_batches_of_one(size: int, batch_size: int, epoch: int) -> None:
    alone = list(ShardedBatches(97, batch_size * size, 0, 1, seed=4).epoch(epoch))
    parts = [
        list(ShardedBatches(97, batch_size, r, size, seed=4).epoch(epoch)) for r in range(size)
    ]
    for step, batch in enumerate(alone):
        together = np.concatenate([p[step].indices for p in parts if p[step].weight])
        assert (together == batch.indices).all()


@given(
    count=st.integers(0, 1000),
    speeds=st.lists(st.floats(0.1, 10), min_size=1, max_size=12),
)
def test_shares_are_within_one_of_exact(count: int, speeds: list[float]) -> None:
    counts = Share.of(0, len(speeds), speeds, "test").cut(count)
    assert sum(counts) == count and min(counts) >= 0
    for got, speed in zip(counts, speeds, strict=True):
        assert abs(got - count * speed / sum(speeds)) <= 1 + 1e-6


def test_orders_depend_on_seed_and_epoch_alone() -> None:
    orders = [
        ShardedBatches(50, 3, rank, 4, seed=seed).order(epoch).tolist()
        for seed, epoch, rank in ((0, 0, 0), (0, 0, 3), (0, 1, 0), (1, 0, 0))
    ]
    assert orders[0] == orders[1] and orders[0] != orders[2] and orders[0] != orders[3]


def test_refusals() -> None:
    for options in ({"batch_size": 0}, {"count": -1}, {"speeds": [1.0]}, {"speeds": [1, 0]}):
        arguments = {"count": 5, "batch_size": 1, "rank": 0, "size": 2} | options
        with pytest.raises(ArgumentError, match=next(iter(options))):
            ShardedBatches(**arguments)  # type: ignore[arg-type]


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=12),
    dtype=st.sampled_from([np.float32, np.float64, np.float16, np.int8, np.complex128]),
)
def test_layout_is_aligned_disjoint_and_in_order(
    shapes: list[tuple[int, ...]], dtype: type
) -> None:
    layout = FlatLayout.of([(str(i), shape) for i, shape in enumerate(shapes)], dtype)
    flat = np.zeros(layout.size, dtype)
    end = 0
    for i, shape in enumerate(shapes):
        entry = layout.entries[str(i)]
        assert entry.offset * flat.itemsize % ALIGNMENT_BYTES == 0 and entry.offset >= end
        end = entry.offset + entry.count
        view = layout.view(flat, str(i))
        assert view.shape == shape
        view[...] = i + 1
    assert end <= layout.size
    for i, shape in enumerate(shapes):
        assert (layout.view(flat, str(i)) == i + 1).all() and layout.entries[str(i)].shape == shape
