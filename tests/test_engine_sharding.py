"""The ZeRO engine without a framework: numpy as an adapter by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import mpizero
from mpizero.engine import (
    COMMON,
    SHARDED,
    WHOLE,
    Filling,
    GradientSharder,
    ParameterMemory,
    ParameterSpec,
    ShardGroup,
    Space,
    Weight,
    balanced_owners,
    cut_by_parameter,
    cut_flat,
    take_lane,
)

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])

SHAPES = [(3,), (4, 5), (), (5_000,), (0,), (7,)]
SPECS = [ParameterSpec(f"p{i}", shape, np.dtype(np.float64)) for i, shape in enumerate(SHAPES)]
ORDER = list(range(len(SPECS) - 1, -1, -1))


def cut(partition: str, parts: int, segment_bytes: int = 4096) -> Space:
    if partition == "flat":
        return cut_flat(SPECS, ORDER, parts, segment_bytes)
    return cut_by_parameter(SPECS, ORDER, balanced_owners(SPECS, parts), parts, segment_bytes)


def gradient(index: int, rank: int, step: int) -> np.ndarray:
    rng = np.random.default_rng((index, rank, step))
    return rng.integers(-8, 9, SHAPES[index]).astype(np.float64)


class ByHand:
    """Gradients in a dictionary, and a sharder of them."""

    def __init__(self, partition: str, whole: bool) -> None:
        self.world = mpizero.init()
        lane = take_lane(self.world)
        self.group = ShardGroup(lane.world)
        self.space = cut(partition, self.group.parts)
        self.there: dict[int, np.ndarray] = {}
        self.remaining: dict[int, set[int]] = {}  # segments that have yet to get it
        self.sharder = GradientSharder(
            lane,
            self.group,
            SPECS,
            [self.space],
            [np.float64],
            lane.world.allocate,
            whole=whole,
            fill=self.fill,
            left=lambda: list(self.there),
        )

    def fill(self, key: tuple[int, int], fillings: Sequence[Filling]) -> list[int]:
        missing = []
        for at, filling in enumerate(fillings):
            index = filling.index
            if index in self.there and index not in self.remaining:
                self.remaining[index] = set(self.sharder.segments_of(index))
            if key[0] not in self.remaining.get(index, ()):
                missing.append(at)
                continue
            flat = self.there[index].reshape(-1)
            filling.memory[...] = flat if filling.elements is None else flat[filling.elements]
            self.remaining[index].remove(key[0])
            if not self.remaining[index]:
                del self.there[index], self.remaining[index]
        return missing

    def one_pass(self, step: int, order: Sequence[int], weight: Weight | None = None) -> list[bool]:
        self.begin(weight or Weight())
        for index in order:
            if SPECS[index].nbytes:
                self.there[index] = gradient(index, self.world.rank, step)
            self.sharder.ready(index)
        return self.sharder.close()

    def begin(self, weight: Weight) -> None:
        self.sharder.open(self.sharder.plan(weight, kept=False))

    def check(self, expected: dict[int, np.ndarray]) -> None:
        """Does this rank's shard hold its part of these?"""
        for segment, own in zip(self.space.segments, self.sharder.shard(0), strict=True):
            block = segment.block(self.group.part)
            for index, values in expected.items():
                found = self.space.layout.overlap(str(index), block)
                if found is not None:
                    part = own[found[1]]
                    # Sums of some weighted numbers up to 8: last places of these.
                    np.testing.assert_allclose(
                        part, values.reshape(-1)[found[0]], rtol=1e-12, atol=1e-14
                    )

    def mean(self, index: int, step: int, users: Sequence[int] | None = None) -> np.ndarray:
        users = range(self.world.size) if users is None else users
        return sum(gradient(index, r, step) for r in users) / self.world.size


@ranks
@pytest.mark.parametrize("whole", [True, False], ids=["stage 1", "stage 2"])
@pytest.mark.parametrize("partition", ["flat", "parameter"])
def test_every_rank_gets_its_part_of_the_mean(partition: str, whole: bool) -> None:
    engine = ByHand(partition, whole)
    for step in range(4):  # gradients come in another order in each step, and on each rank
        order = np.random.default_rng((step, engine.world.rank)).permutation(len(SPECS)).tolist()
        assert engine.one_pass(step, order) == [True] * len(SPECS)
        means = {index: engine.mean(index, step) for index in range(len(SPECS))}
        engine.check(means)
        squares = engine.world.allreduce(engine.sharder.own_squares)
        assert squares == pytest.approx(sum((m**2).sum() for m in means.values()), rel=1e-12)
        assert not engine.there and not engine.sharder.overflowed


@ranks
@pytest.mark.parametrize("whole", [True, False], ids=["stage 1", "stage 2"])
def test_passes_are_added_up_in_the_shard(whole: bool) -> None:
    engine = ByHand("flat", whole)
    engine.one_pass(0, ORDER)
    engine.sharder.keeps = True
    engine.one_pass(1, ORDER)
    engine.check({i: engine.mean(i, 0) + engine.mean(i, 1) for i in range(len(SPECS))})


@several_ranks
@pytest.mark.parametrize("whole", [True, False], ids=["stage 1", "stage 2"])
def test_stated_weights_count_over_ranks_and_passes(whole: bool) -> None:
    engine, size = ByHand("flat", whole), mpizero.init().size
    weights = [[float(rank + step) for rank in range(size)] for step in range(2)]
    for step in range(2):
        engine.one_pass(step, ORDER, Weight(weights[step][engine.world.rank], stated=True))
        engine.sharder.keeps = True
    total = sum(map(sum, weights))
    engine.check(
        {
            index: sum(
                w * gradient(index, rank, step)
                for step in range(2)
                for rank, w in enumerate(weights[step])
            )
            / total
            for index in range(len(SPECS))
        }
    )


@several_ranks
@pytest.mark.parametrize("whole", [True, False], ids=["stage 1", "stage 2"])
def test_gradients_that_come_after_their_segment_was_sent(whole: bool) -> None:
    """On one rank only, and after the sharder has learned another order: they must not be lost."""
    engine = ByHand("flat", whole)
    rank = engine.world.rank
    engine.one_pass(0, ORDER)
    for step in (1, 2):
        engine.begin(Weight())
        for index in ORDER:
            engine.there[index] = gradient(index, rank, step)
            engine.sharder.ready(index)
        extra = rank == 0
        if extra:
            engine.there[1] = engine.there.get(1, 0) + gradient(1, rank, 10 + step)
            engine.sharder.ready(1)
        engine.there.pop(4, None)  # without elements it is in no segment
        engine.sharder.close()
        late = gradient(1, 0, 10 + step) / engine.world.size
        engine.check({1: engine.mean(1, step) + late, 3: engine.mean(3, step)})


@several_ranks
def test_overflow_on_one_rank_is_known_to_all() -> None:
    engine = ByHand("flat", whole=False)
    engine.begin(Weight())
    for index in ORDER:
        engine.there[index] = gradient(index, 0, 0)
        if index == 3 and engine.world.rank == 1:
            engine.there[3][7] = np.inf
        engine.sharder.ready(index)
    engine.there.pop(4, None)
    engine.sharder.close()
    assert engine.sharder.overflowed
    engine.one_pass(1, ORDER)
    assert not engine.sharder.overflowed


@ranks
def test_large_gradients_are_no_overflow() -> None:
    """Their squares are too large for float32, they are not."""
    engine = ByHand("flat", whole=False)
    engine.begin(Weight())
    for index in ORDER:
        engine.there[index] = np.full(SHAPES[index], 1e200)
        engine.sharder.ready(index)
    engine.there.pop(4, None)
    engine.sharder.close()
    assert engine.sharder.overflowed == (not np.isfinite(engine.sharder.own_squares))


def make_memory(how: str, partition: str, master: Any) -> tuple[ParameterMemory, ShardGroup, Space]:
    world = mpizero.init()
    group = ShardGroup(world)
    space = cut(partition, group.parts)
    memory = ParameterMemory(group, how, world.allocate, np.zeros)
    memory.add(space, master=master)
    for index, spec in enumerate(SPECS):
        memory.store(0, index, np.arange(float(np.prod(spec.shape))) + index)
    memory.settle()
    return memory, group, space


@ranks
@pytest.mark.parametrize("partition", ["flat", "parameter"])
@pytest.mark.parametrize("how", [COMMON, WHOLE, SHARDED])
@pytest.mark.parametrize("master", [None, np.float64], ids=["plain", "with masters"])
def test_updates_reach_all_ranks(how: str, partition: str, master: Any) -> None:
    memory, _, space = make_memory(how, partition, master)
    for step in range(3):
        for block in memory.updated(0):
            block += 1000.0
        memory.publish()
        whole = np.zeros(space.size)
        if how == SHARDED:
            handle = memory.gather(0, whole, "a test")
            if handle is not None:
                handle.wait()
        for index, spec in enumerate(SPECS):
            values = (
                memory.view(0, index) if how != SHARDED else space.layout.view(whole, str(index))
            )
            expected = np.arange(float(np.prod(spec.shape))) + index + 1000.0 * (step + 1)
            np.testing.assert_array_equal(values.reshape(-1), expected)
            np.testing.assert_array_equal(memory.collect(0, index), expected)
        memory.settle()  # nobody updates while another still reads


@several_ranks
def test_common_memory_is_one_for_the_node() -> None:
    memory, group, _ = make_memory(COMMON, "flat", None)
    if group.world.rank == 0:
        memory.view(0, 3)[0] = -1.0
    memory.settle()
    assert memory.view(0, 3)[0] == -1.0


@several_ranks
def test_groups_that_cannot_be_are_refused() -> None:
    world = mpizero.init()
    with pytest.raises(mpizero.ArgumentError, match="shard_group"):
        ShardGroup(world, world.size + 1)
    with pytest.raises(mpizero.ArgumentError, match="shard_group"):
        ShardGroup(world, "rack")
