"""``mz.shard``: every rank its part, the same steps everywhere, exact means."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import mpizero_torch as mz
from mpizero.sampling import ShardedBatches
from support.reference import seeded

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])


def numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count))


def seen(loader: Any) -> list[tuple[list[int], float]]:
    """This rank's batches as (samples, weight)."""
    return [(batch[0].tolist(), loader.weight) for batch in loader]


def everyones(loader: Any) -> list[list[tuple[list[int], float]]]:
    return mz.init().gather_objects(seen(loader))


def counted(batches: list[list[tuple[list[int], float]]]) -> list[int]:
    """The samples that count, over all ranks."""
    return [s for rank in batches for samples, weight in rank if weight for s in samples]


@ranks
@pytest.mark.parametrize("count", [1, 7, 24, 25, 41])
def test_disjoint_complete_and_equally_long(count: int) -> None:
    loader = mz.shard(numbers(count), batch_size=3, seed=5)
    first = everyones(loader)
    assert sorted(counted(first)) == list(range(count))
    assert {len(batches) for batches in first} == {len(loader)}
    for step in zip(*first, strict=True):
        assert sum(weight for _, weight in step) == pytest.approx(mz.init().size)
    second = everyones(loader)
    if count > 7:
        assert counted(second) != counted(first)  # each epoch is shuffled anew
    loader.set_epoch(0)
    assert everyones(loader) == first


@ranks
def test_n_ranks_see_what_one_process_sees_step_by_step() -> None:
    world = mz.init()
    ours = everyones(mz.shard(numbers(50), batch_size=4, seed=3))
    alone = ShardedBatches(50, 4 * world.size, 0, 1, seed=3).epoch(0)
    for step, batch in enumerate(alone):
        together = [s for rank in ours if rank[step][1] for s in rank[step][0]]
        assert together == batch.indices.tolist()


@ranks
def test_a_dataloaders_settings_are_kept() -> None:
    size = mz.init().size
    data = numbers(30)
    in_order = mz.shard(
        DataLoader(
            data, batch_size=2, collate_fn=lambda b: [torch.cat([x[0].view(1) for x in b]) * 10]
        )
    )
    assert sorted(counted(everyones(in_order))) == [10 * s for s in range(30)]
    assert everyones(in_order)[0][0][0] == [0, 10]  # not shuffled
    dropping = mz.shard(DataLoader(data, batch_size=4, shuffle=True, drop_last=True))
    assert len(dropping) == 30 // (4 * size)
    assert {weight for rank in everyones(dropping) for _, weight in rank} <= {1.0}


@ranks
def test_other_samplers_are_followed_as_rank_zero_draws_them() -> None:
    world = mz.init()
    torch.manual_seed(world.rank)  # each rank would draw something else
    sampler = WeightedRandomSampler([1.0] * 10, 20)
    batches = everyones(mz.shard(DataLoader(numbers(10), batch_size=2, sampler=sampler)))
    assert len(counted(batches)) == 20
    torch.manual_seed(0)
    assert sorted(counted(batches)) == sorted(sampler)


@ranks
def test_speeds_give_faster_ranks_more() -> None:
    world = mz.init()
    speeds = [1.0 + 2 * rank for rank in range(world.size)]
    batches = everyones(mz.shard(numbers(160), batch_size=8, speeds=speeds))
    assert sorted(counted(batches)) == list(range(160))
    sizes = [len(rank[0][0]) for rank in batches]
    assert sum(sizes) == 8 * world.size
    for got, speed in zip(sizes, speeds, strict=True):
        assert abs(got - 8 * world.size * speed / sum(speeds)) < 1
    with pytest.raises(mz.ArgumentError, match="speeds"):
        mz.shard(numbers(5), batch_size=1, speeds=[1.0] * (world.size + 1))


@ranks
@pytest.mark.parametrize("drop_last", [False, True])
def test_samplers(drop_last: bool) -> None:
    world = mz.init()
    data = numbers(11)
    for sampler in (SequentialSampler(data), RandomSampler(data)):
        sharded = mz.shard(sampler, drop_last=drop_last, seed=2)
        loader = DataLoader(data, batch_size=2, sampler=sharded)
        samples = world.gather_objects([s for batch in loader for s in batch[0].tolist()])
        assert {len(s) for s in samples} == {len(sharded)}
        together = [s for rank in samples for s in rank]
        if drop_last:
            assert len(set(together)) == len(together) == 11 // world.size * world.size
        else:
            assert set(together) == set(range(11))


class Stream(IterableDataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.tensor(s),) for s in range(self.count)])


@ranks
@pytest.mark.parametrize("count", [1, 9, 24])
def test_streams(count: int) -> None:
    for source in (
        DataLoader(Stream(count), batch_size=2),
        Batches([(torch.arange(s, min(s + 2, count)),) for s in range(0, count, 2)]),
        DataLoader(
            numbers(count), batch_sampler=_OwnBatches(SequentialSampler(range(count)), 2, False)
        ),
        DataLoader(
            [(torch.arange(s, min(s + 2, count)),) for s in range(0, count, 2)], batch_size=None
        ),
    ):
        batches = everyones(mz.shard(source))
        assert sorted(counted(batches)) == list(range(count))
        assert len({len(rank) for rank in batches}) == 1
        for step in zip(*batches, strict=True):
            assert sum(weight for _, weight in step) == pytest.approx(len(batches))


class Batches:
    """An iterable of batches, and nothing more."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class _OwnBatches(BatchSampler):
    pass


class Squares(Dataset):
    """Importable by worker processes."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor]:
        return (torch.tensor(index),)


@pytest.mark.parallel([2])
def test_worker_processes() -> None:
    loader = mz.shard(DataLoader(Squares(), batch_size=4, num_workers=1, shuffle=True))
    for _ in range(2):
        assert sorted(counted(everyones(loader))) == list(range(40))


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("name", ["collate_fn", "worker_init_fn", "dataset"])
def test_what_cannot_be_sent_to_workers_is_named(name: str) -> None:
    class Local(Squares):
        pass

    given: dict[str, Any] = {"dataset": Squares(), "collate_fn": None, "worker_init_fn": None}
    given[name] = Local() if name == "dataset" else lambda *_: None
    loader = mz.shard(DataLoader(**given, batch_size=4, num_workers=1, shuffle=True))
    with pytest.raises(mz.ArgumentError, match=f"'{name}'.*num_workers=1.*num_workers=0"):
        iter(loader)


class Columns:
    """No class of torch's: as Hugging Face's datasets are, gives several rows at a time, too."""

    def __init__(self, count: int) -> None:
        self.count, self.asked = count, list[list[int]]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int]:
        return (index,)

    def __getitems__(self, indices: list[int]) -> list[tuple[int]]:
        self.asked.append([*indices])
        return [(index,) for index in indices]


@ranks
@pytest.mark.parametrize(
    "make",
    [
        lambda count: [(value,) for value in range(count)],
        lambda count: torch.arange(count).view(count, 1),
        lambda count: np.arange(count).reshape(count, 1),
        Columns,
        lambda count: {index: (index,) for index in range(count)},
    ],
)
def test_what_a_dataloader_takes_is_a_dataset(make: Any) -> None:
    """The same batches as of torch's own dataset, drawn and shuffled alike."""
    options: dict[str, Any] = {"batch_size": 3, "shuffle": True, "seed": 5, "drop_last": True}
    expected = everyones(mz.shard(numbers(50), **options))
    found = [
        [([int(value) for value in columns(samples)], weight) for samples, weight in rank]
        for rank in mz.init().gather_objects(
            [(batch, 1.0) for batch in mz.shard(make(50), **options)]
        )
    ]
    assert found == [[(samples, weight) for samples, weight in rank] for rank in expected]
    assert counted(expected) != sorted(counted(expected))


def columns(batch: Any) -> Any:
    """The first column, of rows that are arrays or tuples."""
    return batch[:, 0] if isinstance(batch, torch.Tensor) else batch[0]


@ranks
def test_a_range_and_an_array_of_numbers_are_datasets() -> None:
    size = mz.init().size
    for data in (range(16), np.arange(16), torch.arange(16), [*range(16)]):
        batches = [*mz.shard(data, batch_size=2, shuffle=False)]
        assert [len(batch) for batch in batches[: 16 // (2 * size)]] == [2] * (16 // (2 * size))
        assert batches[0].tolist() == [2 * mz.init().rank, 2 * mz.init().rank + 1]


@ranks
def test_a_sharded_loader_answers_as_the_loader_that_it_was_made_of() -> None:
    data = numbers(7)
    loader = DataLoader(data, batch_size=3, drop_last=True, collate_fn=tuple, timeout=0)
    sharded = mz.shard(loader)
    asked = "batch_size drop_last collate_fn dataset num_workers pin_memory timeout sampler"
    for name in [*asked.split(), "prefetch_factor", "worker_init_fn", "generator"]:
        assert getattr(sharded, name) is getattr(loader, name)
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        sharded.colour  # noqa: B018
    stream = mz.shard(DataLoader(Stream(3), batch_size=2))
    assert stream.batch_size == 2 and isinstance(stream.dataset, Stream)


@ranks
def test_a_short_last_batch_does_not_bias_the_gradient() -> None:
    """Uneven parts, an idle rank, BatchNorm over all ranks, and the loss that is logged."""
    world = mz.init()
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()
    model = mz.DistributedDataParallel(
        mz.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(alone))
    )
    count = 4 * world.size + 2  # the last step has two samples for all ranks
    data = TensorDataset(seeded(1, count, 4))
    whole = list(ShardedBatches(count, 4 * world.size, 0, 1).epoch(0))
    for batch, (x,) in zip(whole, mz.shard(data, batch_size=4), strict=True):
        model.zero_grad(), alone.zero_grad()
        loss = model(x).square().mean()
        expected = alone(data.tensors[0][batch.indices]).square().mean()
        assert mz.mean(loss) == pytest.approx(expected.item(), rel=1e-12)
        loss.backward(), expected.backward()
        for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(model.module.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


class Moving(DataLoader[Any]):
    """What it adds is not lost."""

    def __iter__(self) -> Any:
        return ([column + 100 for column in batch] for batch in super().__iter__())


@ranks
def test_a_loader_that_iterates_in_its_own_way_is_asked_itself() -> None:
    found = sorted(counted(everyones(mz.shard(Moving(numbers(9), batch_size=2)))))
    assert found == [*range(100, 109)]


@ranks
def test_refusals() -> None:
    with pytest.raises(mz.ArgumentError, match="source"):
        mz.shard(3)
    with pytest.raises(mz.ArgumentError, match="batch_size"):
        mz.shard(DataLoader(numbers(3)), batch_size=2)
    with pytest.raises(ValueError, match="batch_size"):
        mz.shard(numbers(3), batch_size=-1)


@ranks
@pytest.mark.parametrize(
    ("make", "unused"),
    [
        (
            lambda: Batches([]),
            ("batch_size", "shuffle", "seed", "drop_last", "speeds", "num_workers"),
        ),
        (lambda: iter([1, 2]), ("batch_size", "shuffle", "seed", "drop_last", "num_workers")),
        (lambda: Stream(3), ("shuffle", "seed", "speeds")),
        (lambda: DataLoader(Stream(3)), ("batch_size", "shuffle", "seed", "drop_last", "speeds")),
        (lambda: DataLoader(numbers(3)), ("batch_size", "drop_last", "num_workers")),
        (lambda: SequentialSampler(range(3)), ("batch_size", "speeds", "num_workers")),
    ],
)
def test_arguments_that_would_not_be_used_are_refused(make: Any, unused: tuple[str, ...]) -> None:
    values = {
        "batch_size": 2, "shuffle": False, "seed": 0, "drop_last": False, "num_workers": 0,
        "speeds": [1.0] * mz.init().size,
    }  # fmt: skip
    for name in unused:
        with pytest.raises(mz.ArgumentError, match=f"'{name}'.* beside"):
            mz.shard(make(), **{name: values[name]})
