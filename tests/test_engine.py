"""The gradient engine without a framework: numpy as an adapter by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import mpizero
from mpizero.engine import GradientReducer, ParameterSpec, Weight, take_lane
from mpizero.engine.buckets import cut_into_buckets

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])

SHAPES = [(3,), (4, 5), (), (100_000,), (0,), (7,)]
DTYPES = [np.float32, np.float64]


def specs() -> list[ParameterSpec]:
    return [
        ParameterSpec(f"p{i}", shape, np.dtype(DTYPES[i % 2])) for i, shape in enumerate(SHAPES)
    ]


def make(world: mpizero.World, **options: object) -> GradientReducer:
    return reducer_of(world, specs(), **options)


def reducer_of(
    world: mpizero.World, plan: list[ParameterSpec], **options: object
) -> GradientReducer:
    lane = take_lane(world)
    return GradientReducer(lane, plan, lane.world.allocate, **options)  # type: ignore[arg-type]


def begin(reducer: GradientReducer, weight: Weight | None = None) -> None:
    reducer.open(reducer.plan(weight or Weight(), kept=False))


def gradient(index: int, rank: int, step: int) -> np.ndarray:
    rng = np.random.default_rng((index, rank, step))
    return rng.integers(-8, 9, SHAPES[index]).astype(DTYPES[index % 2])


def one_pass(
    reducer: GradientReducer, rank: int, step: int, order: list[int], weight: Weight | None = None
) -> list[bool]:
    begin(reducer, weight)
    for index in order:
        reducer.view(index)[...] = gradient(index, rank, step)
        reducer.ready(index)
    return reducer.close()


@ranks
@pytest.mark.parametrize("bucket_bytes", [1, 1000, 1 << 20])
@pytest.mark.parametrize("overlap", [True, False])
def test_means_whatever_the_order_in_which_gradients_come(bucket_bytes: int, overlap: bool) -> None:
    world = mpizero.init()
    reducer = make(world, bucket_bytes=bucket_bytes, overlap=overlap)
    for step in range(4):
        order = np.random.default_rng((step, world.rank)).permutation(len(SHAPES)).tolist()
        assert one_pass(reducer, world.rank, step, order) == [True] * len(SHAPES)
        for index in range(len(SHAPES)):
            every = [gradient(index, r, step) for r in range(world.size)]
            # Whole numbers: the sum is exact, the division rounds once.
            expected = (sum(every) / world.size).astype(every[0].dtype)
            np.testing.assert_allclose(reducer.view(index), expected, rtol=1e-7)


@ranks
def test_unused_parameters_are_told_and_count_as_zero() -> None:
    world = mpizero.init()
    reducer = make(world)
    for step in range(3):
        mine = [i for i in range(len(SHAPES)) if i != 1 and (i + world.rank) % 2]
        used = one_pass(reducer, world.rank, step, mine)
        for index in range(len(SHAPES)):
            users = [r for r in range(world.size) if index != 1 and (index + r) % 2]
            assert used[index] == bool(users)
            if users:
                expected = sum(gradient(index, r, step) for r in users) / world.size
                np.testing.assert_allclose(reducer.view(index), expected, rtol=1e-6)


@ranks
def test_stated_weights() -> None:
    world = mpizero.init()
    reducer = make(world)
    everything = list(range(len(SHAPES)))
    for step in range(3):
        weights = [float((r + step) % 3) for r in range(world.size)]
        total = sum(weights) or 1.0
        one_pass(reducer, world.rank, step, everything, Weight(weights[world.rank], stated=True))
        for index in everything:
            expected = sum(w * gradient(index, r, step) for r, w in enumerate(weights)) / total
            np.testing.assert_allclose(reducer.view(index), expected, rtol=1e-6, atol=1e-6)


@several_ranks
def test_shadows_take_part_until_nobody_is_active() -> None:
    world = mpizero.init()
    reducer = make(world)
    steps = 2 * world.rank
    for step in range(steps):
        one_pass(reducer, world.rank, step, list(range(len(SHAPES))))
        active = [r for r in range(world.size) if step < 2 * r]
        expected = sum(gradient(1, r, step) for r in active) / len(active)
        np.testing.assert_allclose(reducer.view(1), expected, rtol=1e-6)
    shadowed = 0
    while reducer.shadow() is not None:
        shadowed += 1
    assert steps + shadowed == 2 * (world.size - 1)


@several_ranks
def test_parameters_that_differ_are_named() -> None:
    world = mpizero.init()
    own = specs()
    if world.rank == 1:
        own[3] = ParameterSpec("p3", (5,), np.dtype(np.float32))
    with pytest.raises(mpizero.MismatchError, match=r"rank 1: p3: float32, shape \(5,\)"):
        reducer_of(world, own)


@several_ranks
def test_the_order_is_what_rank_zero_saw_first() -> None:
    world = mpizero.init()
    reducer = make(world, bucket_bytes=1)
    generation = reducer.generation
    order = [2, 0, 5, 1, 3, 4] if world.rank == 0 else [4, 3, 2, 1, 0, 5]
    one_pass(reducer, world.rank, 0, order)
    assert reducer.generation == generation + 1
    firsts = [bucket.members[0] for bucket in reducer._buckets if bucket.layout.dtype == np.float32]
    assert firsts[0] == 2
    one_pass(reducer, world.rank, 1, order)
    assert reducer.generation == generation + 1  # once


def test_buckets_are_filled_by_dtype_and_size() -> None:
    plan = [ParameterSpec(str(i), (10,), np.dtype(DTYPES[i % 2])) for i in range(8)]
    buckets = cut_into_buckets(plan, range(7, -1, -1), first_bytes=80, bytes_each=120)
    assert sorted(i for members in buckets for i in members) == list(range(8))
    assert buckets[0] == (7,)  # the first one is full with 80 bytes
    for members in buckets:
        assert len({i % 2 for i in members}) == 1


def test_weights_must_be_numbers_from_zero() -> None:
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(mpizero.ArgumentError, match="weight"):
            Weight(value)


@ranks
@pytest.mark.parametrize("stated", [False, True])
def test_accumulated_passes_are_averaged_as_one(stated: bool) -> None:
    world = mpizero.init()
    reducer = make(world)
    everything = list(range(len(SHAPES)))

    def weight(rank: int, micro: int) -> float:
        return float(1 + (rank + micro) % 3) if stated else 1.0

    for step in range(3):
        for micro in range(3):
            merge = reducer.plan(Weight(weight(world.rank, micro), stated), kept=micro > 0)
            (reducer.open if micro == 2 else reducer.accumulate)(merge)
            for index in everything:
                view = reducer.view(index)
                view *= merge.keep if micro > 0 else 0.0
                view += gradient(index, world.rank, 3 * step + micro) * merge.new
                if micro == 2:
                    reducer.ready(index)
        assert all(reducer.close())
        pairs = [(r, micro) for r in range(world.size) for micro in range(3)]
        divisor = sum(weight(*pair) for pair in pairs) if stated else world.size
        for index in everything:
            # Each gradient is scaled twice at most, and six are summed: some last places of the
            # largest, 3 x 8 / 2.
            total = sum(weight(r, m) * gradient(index, r, 3 * step + m) for r, m in pairs)
            np.testing.assert_allclose(reducer.view(index), total / divisor, rtol=1e-6, atol=4e-6)


@ranks
def test_a_rank_with_weight_zero_counts_for_nothing() -> None:
    world = mpizero.init()
    reducer = make(world)
    idle = world.size - 1 if world.size > 1 else None
    for step in range(3):
        mine = Weight(0.0 if world.rank == idle else 4.0, stated=True)
        one_pass(reducer, world.rank, step, list(range(len(SHAPES))), mine)
        busy = [r for r in range(world.size) if r != idle]
        expected = sum(gradient(1, r, step) for r in busy) / len(busy)
        np.testing.assert_allclose(reducer.view(1), expected, rtol=1e-7)


@ranks
@pytest.mark.parametrize(("dtype", "big"), [(np.float16, 2048.0), (ml_dtypes.bfloat16, 256.0)])
def test_sixteen_bit_gradients_are_summed_in_float32(dtype: type, big: float) -> None:
    world = mpizero.init()
    reducer = reducer_of(world, [ParameterSpec("p", (3,), np.dtype(dtype))])
    for _ in range(2):
        begin(reducer)
        # In 16 bits, big + 1 is big: from three ranks on, the mean would show it.
        reducer.view(0)[...] = big if world.rank == 0 else 1.0
        reducer.ready(0)
        assert reducer.close() == [True]
        exact = np.float32((big + world.size - 1) / world.size)
        assert (reducer.view(0) == exact.astype(dtype)).all()


@ranks
def test_many_small_parameters_and_a_large_one() -> None:
    world = mpizero.init()
    shapes = [(3,)] * 300 + [(1_000_000,)] + [(2, 2)] * 300
    plan = [ParameterSpec(str(i), shape, np.dtype("f4")) for i, shape in enumerate(shapes)]
    reducer = reducer_of(world, plan, bucket_bytes=4096)
    for _ in range(2):
        begin(reducer)
        for index in reversed(range(len(shapes))):
            reducer.view(index)[...] = index + world.rank
            reducer.ready(index)
        assert all(reducer.close())
        rest = (world.size - 1) / 2
        # Below 2^24 float32 holds index + rest exactly; dividing by three ranks rounds once.
        for index in range(len(shapes)):
            np.testing.assert_allclose(reducer.view(index), index + rest, rtol=1e-6)


@ranks
def test_a_gradient_that_comes_after_its_bucket_left_is_an_error() -> None:
    world = mpizero.init()
    reducer = reducer_of(world, [ParameterSpec("late", (2,), np.dtype("f4"))])
    for times in (1, 2):  # the first pass teaches that it comes once
        begin(reducer)
        reducer.view(0)[...] = 1
        reducer.ready(0)
        if times == 2:
            with pytest.raises(mpizero.MismatchError, match=r"'late'.*2 times.*overlap=False"):
                reducer.ready(0)
        reducer.close()


@several_ranks
def test_weights_stated_by_some_ranks_only_are_an_error() -> None:
    world = mpizero.init()
    reducer = make(world)
    own = Weight(2.0, stated=True) if world.rank == 1 else Weight()
    with pytest.raises(mpizero.MismatchError, match="rank 1: stated a weight"):
        one_pass(reducer, world.rank, 0, list(range(len(SHAPES))), own)
