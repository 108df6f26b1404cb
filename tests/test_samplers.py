"""Samplers and batch samplers of one's own: followed as rank 0 draws them, a step at a time."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from itertools import count, islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import mpizero_torch as mz
from mpizero.checkpoint import tree

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])


class Logged(Dataset[int]):
    """Knows what was loaded in this process."""

    def __init__(self, samples: int = 24) -> None:
        self.samples, self.loaded = samples, list[int]()

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> int:
        self.loaded.append(index)
        return index


class Buckets(Sampler[list[int]]):
    """Batches of differing sizes, in another order on every rank."""

    def __init__(self, samples: int = 24, generator: Any = None) -> None:
        self.samples, self.generator = samples, generator
        self.drawn, self.epoch = 0, -1

    def __len__(self) -> int:
        return len(self._cuts())

    def _cuts(self) -> list[list[int]]:
        bounds = [0]
        while bounds[-1] < self.samples:
            bounds.append(min(self.samples, bounds[-1] + 2 + len(bounds) % 3))
        return [[*range(a, b)] for a, b in pairwise(bounds)]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        cuts = self._cuts()
        for at in torch.randperm(len(cuts), generator=self.generator).tolist():
            self.drawn += 1
            yield cuts[at]


class Endless(Sampler[Any]):
    """Without an end, and without a length."""

    def __init__(self, make: Callable[[int], Any] = lambda at: at % 24) -> None:
        self.make, self.drawn = make, 0

    def __iter__(self) -> Iterator[Any]:
        for at in count():
            self.drawn += 1
            yield self.make(at)


def differing_seeds() -> None:
    """As programs do for their dropout."""
    rank = mz.init().rank
    torch.manual_seed(100 + rank), np.random.seed(100 + rank), random.seed(100 + rank)


def taken(loader: Any, steps: int | None = None) -> list[list[tuple[list[int], float]]]:
    """Samples and weights of each step, of each rank; the training draws numbers of its own."""
    own = []
    for batch in islice(iter(loader), steps):
        own.append((batch.tolist(), loader.weight))
        torch.rand(3), random.random(), np.random.rand()
    return mz.init().gather_objects(own)


def counted(batches: list[list[tuple[list[int], float]]]) -> list[int]:
    """The samples that count, over all ranks, in the order of steps."""
    return [
        sample
        for step in zip(*batches, strict=True)
        for samples, weight in step
        if weight
        for sample in samples
    ]


@ranks
def test_each_sample_of_a_batch_sampler_is_loaded_once_and_weighed_by_counts() -> None:
    size = mz.init().size
    data = Logged()
    loader = mz.shard(DataLoader(data, batch_sampler=Buckets()))
    for _ in range(2):
        differing_seeds()
        data.loaded.clear()
        batches = taken(loader)
        assert sorted(counted(batches)) == [*range(24)]
        assert {len(rank) for rank in batches} == {len(loader)} == {-(-len(Buckets()) // size)}
        for step in zip(*batches, strict=True):
            total = sum(len(samples) for samples, weight in step if weight)
            for samples, weight in step:
                assert weight == pytest.approx(len(samples) * size / total) or weight == 0
            assert sum(weight for _, weight in step) == pytest.approx(size)
        assert data.loaded == [s for samples, _ in batches[mz.init().rank] for s in samples]


@ranks
def test_rank_zeros_batches_come_in_their_order() -> None:
    differing_seeds()
    batches = taken(mz.shard(DataLoader(Logged(), batch_sampler=Buckets())))
    torch.manual_seed(100)
    assert counted(batches) == [s for batch in Buckets() for s in batch]


@ranks
def test_endless_samplers_are_read_a_step_at_a_time() -> None:
    size = mz.init().size
    batches, indices = Endless(lambda at: [at % 24, (at + 1) % 24]), Endless()
    for sampler, loader in (
        (batches, DataLoader(Logged(), batch_sampler=batches)),
        (indices, DataLoader(Logged(), 2, sampler=indices)),
    ):
        sharded = mz.shard(loader)
        assert len(counted(taken(sharded, 3))) == 6 * size
        assert sampler.drawn <= 6 * size * (mz.init().rank == 0)
        with pytest.raises(TypeError):
            len(sharded)
        assert sharded.state_dict()["of"] is None
    within = mz.shard(DataLoader(Logged(), batch_sampler=BatchSampler(Endless(), 2, False)))
    assert within.state_dict()["of"] is None


@pytest.mark.parallel([2])
def test_workers_are_told_ahead() -> None:
    world = mz.init()
    sampler = Endless(lambda at: [at % 24])
    loader = mz.shard(DataLoader(Logged(), batch_sampler=sampler, num_workers=1, prefetch_factor=2))
    found = []
    for batch in islice(iter(loader), 4):
        assert world.allreduce(1) == 2
        found += batch.tolist()
    assert found == [world.rank, 2 + world.rank, 4 + world.rank, 6 + world.rank]
    assert sampler.drawn <= (4 + 2) * 2 * (world.rank == 0)


@ranks
def test_samplers_that_are_long_begin_at_once() -> None:
    data = Logged()
    sampler = RandomSampler(data, replacement=True, num_samples=10**10)
    loader = mz.shard(DataLoader(data, batch_size=4, sampler=sampler))
    assert len(loader) == -(-(10**10) // (4 * mz.init().size))
    assert len(counted(taken(loader, 3))) == 12 * mz.init().size


@ranks
def test_other_samplers_keep_batch_size_drop_last_and_speeds() -> None:
    world = mz.init()
    differing_seeds()
    speeds = [1.0 + 2 * rank for rank in range(world.size)]
    sampler = WeightedRandomSampler([1.0] * 50, 50, replacement=False)
    for drop_last in (False, True):
        data = DataLoader(Logged(50), 4, sampler=sampler, drop_last=drop_last)
        batches = taken(mz.shard(data, speeds=speeds))
        width = 4 * world.size
        assert sum(len(rank[0][0]) for rank in batches) == width
        found = counted(batches)
        assert len(found) == len(set(found)) == (50 // width * width if drop_last else 50)
    loader = mz.shard(DataLoader(Logged(50), 4, sampler=sampler))
    loader.global_batch_size = 5
    assert len(counted(taken(loader, 2))) == 10


@ranks
def test_plain_samplers_of_a_part_and_ones_derived_from_them() -> None:
    """Their own number of samples counts, and what they do otherwise."""

    class Backwards(SequentialSampler):
        def __iter__(self) -> Iterator[int]:
            return reversed(range(len(self)))

    part = mz.shard(DataLoader(Logged(24), 2, sampler=SequentialSampler(range(10))))
    assert counted(taken(part)) == [*range(10)]
    assert counted(taken(mz.shard(DataLoader(Logged(9), 2, sampler=Backwards(range(9)))))) == [
        *reversed(range(9))
    ]


class Wavering(Sampler[list[int]]):
    """Draws from all global generators in every step."""

    def __init__(self, samples: int = 24) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[list[int]]:
        left = [*range(self.samples)]
        while left:
            at = random.random() + np.random.random() + float(torch.rand(()))
            yield [left.pop(int(at * 1000) % len(left))]


@ranks
def test_what_one_rank_draws_leaves_the_programs_random_numbers_alone() -> None:
    """Ranks that were seeded alike stay so, and the program's draws do not change the order."""
    world = mz.init()

    def draws() -> list[float]:
        return [random.random(), float(np.random.random()), float(torch.rand(()))]

    orders = []
    for noisy in (False, True):
        torch.manual_seed(7), np.random.seed(7), random.seed(7)
        loader = mz.shard(DataLoader(Logged(), batch_sampler=Wavering()))
        order, own = list[int](), list[list[float]]()
        for batch in loader:
            order += batch.tolist()
            own.append(draws() if noisy else [])
        own.append(draws())
        assert all(each == own for each in world.gather_objects(own))
        orders.append(order)
        again = counted(taken(loader))
        assert sorted(again) == [*range(24)]
        assert again[:: world.size] != world.broadcast_object(order), "each epoch has its own"
    assert orders[0] == orders[1]


class Failing(Sampler[Any]):
    def __init__(self, good: int, error: Exception) -> None:
        self.good, self.error, self.fails = good, error, True

    def __iter__(self) -> Iterator[Any]:
        for at in range(24):
            if at == self.good and self.fails:
                raise self.error
            yield [at]


class OddError(Exception):
    """Cannot be sent as it is."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


@ranks
@pytest.mark.parametrize("good", [0, 1, 5])
def test_what_the_sampler_raises_on_rank_zero_is_raised_on_all_ranks(good: int) -> None:
    sampler = Failing(good, ValueError("no such bucket"))
    loader = mz.shard(DataLoader(Logged(), batch_sampler=sampler))
    with pytest.raises(ValueError, match="no such bucket"):
        list(loader)
    sampler.fails = False
    assert counted(taken(loader)) == [*range(24)], "and another loop is one of its own"
    other = mz.shard(DataLoader(Logged(), batch_sampler=Failing(good, OddError(1, 2))))
    with pytest.raises(Exception, match="1 and 2"):
        list(other)


@several_ranks
def test_what_is_left_over_of_a_loop_is_not_taken_for_the_next() -> None:
    """A rank may leave a loop before the others, who then ask for nothing of it any more."""
    world = mz.init()
    loader = mz.shard(DataLoader(Logged(), batch_sampler=Endless(lambda at: [at % 24])))
    steps = 5 if world.rank == 0 else 2
    assert len([*islice(iter(loader), steps)]) == steps
    world.barrier()
    batches = taken(loader, 3)
    assert counted(batches) == [*range(3 * world.size)]


@several_ranks
def test_ranks_that_do_not_begin_the_same_loops_are_told() -> None:
    world = mz.init()
    loader = mz.shard(DataLoader(Logged(), batch_sampler=Endless(lambda at: [at % 24])))
    if world.rank == 0:
        next(iter(loader)), next(iter(loader))
    else:
        batches = iter(loader)
        next(batches)
        with pytest.raises(mz.MismatchError, match="All ranks must begin the same loops"):
            next(batches), next(batches)
    world.barrier()


@several_ranks
def test_a_thread_may_read_while_the_training_sends() -> None:
    """Two readers and the training: none needs a place among the others' messages."""
    world = mz.init()
    if world.thread_level != "multiple":
        pytest.skip(f"this MPI grants {world.thread_level}")
    loaders = [
        mz.shard(DataLoader(Logged(), batch_sampler=Endless(lambda at: [at % 24])))
        for _ in range(2)
    ]
    found: list[list[int]] = [[], []]

    def read(at: int) -> None:
        found[at] += [batch.tolist()[0] for batch in islice(iter(loaders[at]), 40)]

    threads = [threading.Thread(target=read, args=(at,)) for at in range(2)]
    order = threads if world.rank % 2 else threads[::-1]
    for thread in order:
        thread.start()
    values = [world.allreduce(1) for _ in range(40)]
    for thread in threads:
        thread.join()
    assert values == [world.size] * 40
    own = [(at * world.size + world.rank) % 24 for at in range(40)]
    assert found == [own, own]


def as_saved(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint gives back of it."""
    arrays: dict[str, Any] = {}
    written = tree.encode(state, "loader", arrays)
    found: dict[str, Any] = tree.decode(written, arrays.__getitem__)
    return found


MANY = 72  # for several steps on four ranks


class ByPython(Buckets):
    """Draws from generators that are not torch's."""

    def __init__(self) -> None:
        super().__init__(MANY)
        self.first, self.second = random.Random(5), np.random.default_rng(5)
        self.third = np.random.RandomState(5)

    def __iter__(self) -> Iterator[list[int]]:
        cuts = self._cuts()
        self.first.shuffle(cuts)
        order = self.second.permutation(len(cuts))[self.third.permutation(len(cuts))]
        return iter([cuts[at] for at in order])


MAKERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "batches": lambda: DataLoader(
        Logged(MANY), batch_sampler=Buckets(MANY, generator=torch.Generator().manual_seed(3))
    ),
    "batches by the global generator": lambda: DataLoader(
        Logged(MANY), batch_sampler=Buckets(MANY)
    ),
    "batches by other generators": lambda: DataLoader(Logged(MANY), batch_sampler=ByPython()),
    "batches drawn one by one": lambda: DataLoader(Logged(MANY), batch_sampler=Wavering(MANY)),
    "batches within": lambda: DataLoader(
        Logged(MANY),
        batch_sampler=BatchSampler(
            RandomSampler(range(MANY), generator=torch.Generator().manual_seed(3)), 3, False
        ),
    ),
    "indices": lambda: DataLoader(
        Logged(MANY), 2, sampler=WeightedRandomSampler([1.0] * MANY, MANY, replacement=False)
    ),
    "single items": lambda: DataLoader(
        TensorDataset(torch.arange(MANY).view(MANY, 1)),
        batch_size=None,
        sampler=RandomSampler(range(MANY)),
        collate_fn=lambda item: item[0],
    ),
}


@ranks
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_loop_goes_on_where_it_was(name: str, steps: int) -> None:
    make = MAKERS[name]
    differing_seeds()
    whole = mz.shard(make())
    expected = [counted(taken(whole)) for _ in range(3)]
    differing_seeds()
    first = mz.shard(make())
    assert counted(taken(first)) == expected[0]
    before = counted(taken(first, steps))
    state = as_saved(first.state_dict())
    assert len({str(each) for each in mz.init().gather_objects(state)}) == 1
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.rand(5), random.random(), np.random.rand()
    rest = mz.shard(make())
    rest.load_state_dict(state)
    # As mz.load does: the process's generators are saved, too.
    torch.set_rng_state(generators[0])
    random.setstate(generators[1]), np.random.set_state(generators[2])
    rest.set_epoch(rest.epoch)
    remaining = counted(taken(rest))
    if steps:
        assert before + remaining == expected[1]
        assert counted(taken(rest)) == expected[2]
    else:
        assert sorted(remaining) == [*range(MANY)]


@ranks
def test_others_go_on_in_another_number() -> None:
    """Each rank goes on alone with what all ranks together had left."""
    world = mz.init()
    alone = world.split(world.rank)
    for name in ("batches", "indices"):
        differing_seeds()
        first = mz.shard(MAKERS[name]())
        before = counted(taken(first, 2))
        rest = mz.shard(MAKERS[name](), world=alone)
        rest.load_state_dict(as_saved(first.state_dict()))
        assert sorted(before + [s for batch in rest for s in batch.tolist()]) == [*range(MANY)]
    alone.close()


@ranks
def test_a_sampler_that_does_not_draw_the_same_again_cannot_go_on() -> None:
    class Clockwork(Buckets):
        times = 0

        def __iter__(self) -> Iterator[list[int]]:
            self.times += 1
            cuts = self._cuts()
            return iter(cuts[self.times :] + cuts[: self.times])

    sampler = Clockwork()
    first = mz.shard(DataLoader(Logged(), batch_sampler=sampler))
    counted(taken(first, 1))
    again = mz.shard(DataLoader(Logged(), batch_sampler=sampler))
    again.load_state_dict(first.state_dict())
    with pytest.raises(mz.ArgumentError, match="Clockwork does not draw again"):
        list(again)
    other = mz.shard(MAKERS["indices"]())
    with pytest.raises(mz.ArgumentError, match="Clockwork"):
        other.load_state_dict(first.state_dict())


@ranks
def test_samplers_are_told_the_epoch() -> None:
    sampler = Buckets()
    loader = mz.shard(DataLoader(Logged(), batch_sampler=sampler))
    loader.set_epoch(4)
    assert sampler.epoch == 4 and loader.epoch == 4
    taken(loader, 1)
    other = Buckets()
    again = mz.shard(DataLoader(Logged(), batch_sampler=other))
    again.load_state_dict(loader.state_dict())
    assert other.epoch == 4 and again.epoch == 4
    inner = Buckets()
    mz.shard(inner).set_epoch(2)
    assert inner.epoch == 2


@ranks
@pytest.mark.parametrize("drop_last", [False, True])
def test_sharded_samplers_follow_rank_zero(drop_last: bool) -> None:
    world = mz.init()
    differing_seeds()
    sampler = WeightedRandomSampler([1.0] * 23, 23, replacement=False)
    sharded = mz.shard(sampler, drop_last=drop_last)
    loader = DataLoader(Logged(), 4, sampler=sharded, generator=torch.Generator())
    own = [index for batch in loader for index in batch.tolist()]
    everyones = world.gather_objects(own)
    assert {len(each) for each in everyones} == {len(sharded)}
    together = [s for step in zip(*everyones, strict=True) for s in step]
    torch.manual_seed(100)
    order = [*sampler]
    if drop_last:
        assert together == order[: 23 // world.size * world.size]
    else:
        assert together == order + order[: -23 % world.size]
    endless = Endless()
    found = world.gather_objects([*islice(mz.shard(endless), 100)])
    assert [s for step in zip(*found, strict=True) for s in step] == [
        at % 24 for at in range(100 * world.size)
    ]
    assert endless.drawn <= 128 * world.size
    with pytest.raises(ValueError, match="no such bucket"):
        list(mz.shard(Failing(3, ValueError("no such bucket"))))


@ranks
def test_a_batch_sampler_alone_is_one_of_this_ranks_batches() -> None:
    world = mz.init()
    differing_seeds()
    loader = DataLoader(Logged(), batch_sampler=mz.shard(Buckets()))
    found = world.gather_objects([batch.tolist() for batch in loader])
    seen = [tuple(batch) for rank in found for batch in rank]
    assert len({len(rank) for rank in found}) == 1
    assert {s for batch in seen for s in batch} == {*range(24)}


@pytest.mark.parallel([4])
def test_ranks_along_the_tensor_axis_see_the_same() -> None:
    mesh = mz.mesh(dp=2, tp=2)
    differing_seeds()
    sampler = WeightedRandomSampler([1.0] * 24, 24, replacement=False)
    for loader in (
        mz.shard(DataLoader(Logged(), batch_sampler=Buckets()), world=mesh.dp),
        mz.shard(DataLoader(Logged(), 2, sampler=sampler), world=mesh.dp),
    ):
        own = [(batch.tolist(), loader.weight) for batch in loader]
        assert mesh.tp.gather_objects(own) == [own, own]
        assert sorted(counted(mesh.dp.gather_objects(own))) == [*range(24)]
    own_indices = [*mz.shard(sampler, world=mesh.dp)]
    assert mesh.tp.gather_objects(own_indices) == [own_indices] * 2
    assert sorted(s for each in mesh.dp.gather_objects(own_indices) for s in each) == [*range(24)]


@several_ranks
def test_what_is_dealt_out_already_is_refused() -> None:
    data = Logged()
    dealt = DistributedSampler(data, mz.init().size, mz.init().rank)
    for loader in (
        DataLoader(data, 2, sampler=dealt),
        DataLoader(data, batch_sampler=BatchSampler(dealt, 2, False)),
        DataLoader(data, 2, sampler=mz.shard(SequentialSampler(data))),
        DataLoader(data, batch_size=None, sampler=dealt),
        dealt,
    ):
        with pytest.raises(mz.ArgumentError, match=r"which deals out .* already"):
            mz.shard(loader)


@ranks
def test_what_a_sampler_decides_cannot_be_asked_for_besides() -> None:
    data = Logged()
    weighted = WeightedRandomSampler([1.0] * 24, 24)
    for loader, name in (
        (DataLoader(data, batch_sampler=Buckets()), "shuffle"),
        (DataLoader(data, batch_sampler=Buckets()), "speeds"),
        (DataLoader(data, 2, sampler=weighted), "shuffle"),
        (DataLoader(data, batch_size=None), "seed"),
        (weighted, "seed"),
        (weighted, "shuffle"),
        (weighted, "speeds"),
    ):
        values: dict[str, Any] = {"seed": 3, "shuffle": True, "speeds": [1.0] * mz.init().size}
        with pytest.raises(mz.ArgumentError, match=name):
            mz.shard(loader, **{name: values[name]})
    loader = mz.shard(DataLoader(data, batch_sampler=Buckets()), seed=3)
    assert loader.global_batch_size is None
    with pytest.raises(mz.ArgumentError, match="global_batch_size"):
        loader.global_batch_size = 4
