"""The position in the data: a loop that is resumed sees what was left, whoever resumes it."""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import mpizero_torch as mz
from mpizero.sampling import ShardedBatches

ranks = pytest.mark.parallel([1, 2, 3, 4])


def numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count))


def seen(loader: Any, steps: int | None = None) -> list[int]:
    """The samples that count, over all ranks, in so many steps."""
    own = [batch[0].tolist() for batch in islice(iter(loader), steps) if loader.weight]
    return [s for rank in mz.init().gather_objects(own) for samples in rank for s in samples]


@ranks
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_what_is_left_of_an_epoch_comes_next(shuffle: bool, steps: int) -> None:
    def loader() -> Any:
        return mz.shard(numbers(50), batch_size=3, shuffle=shuffle, seed=4)

    first = loader()
    seen(first)  # epoch 0
    before = seen(first, steps)
    state = first.state_dict()
    rest, following = loader(), loader()
    rest.load_state_dict(state)
    following.set_epoch(2)
    assert rest.epoch == 1
    rest.set_epoch(1)  # as loops over epochs do
    assert sorted(before + seen(rest)) == list(range(50))
    assert rest.epoch == 2
    assert seen(rest) == seen(following)


@ranks
def test_after_the_last_batch_the_epoch_still_ends() -> None:
    """Saved in the loop's last turn, what a program does between epochs is still to come."""
    loader = mz.shard(numbers(20), batch_size=2)
    for batch in loader:
        del batch
        state = loader.state_dict()
    assert (state["epoch"], loader.state_dict()["epoch"]) == (0, 1)
    loader.load_state_dict(state)
    assert loader.epoch == 0 and list(loader) == [] and loader.epoch == 1


@pytest.mark.once
@pytest.mark.parametrize("drop_last", [True, False])
def test_any_number_of_ranks_goes_on_for_any_other(drop_last: bool) -> None:
    for before in range(1, 9):
        for after in range(1, 9):
            done = [
                list(ShardedBatches(101, 3, r, before, seed=1).epoch(0))[:2] for r in range(before)
            ]
            skip = done[0][-1].stop
            left = [
                ShardedBatches(101, 3, r, after, seed=1, drop_last=drop_last).epoch(0, skip=skip)
                for r in range(after)
            ]
            samples = [i for each in (*done, *left) for b in each if b.weight for i in b.indices]
            lost = (101 - skip) % (3 * after) if drop_last else 0
            assert len(set(samples)) == len(samples) == 101 - lost


@ranks
def test_own_samplers_go_on_in_the_order_that_was_drawn() -> None:
    def loader() -> Any:
        sampler = torch.utils.data.WeightedRandomSampler(
            [1.0] * 30, 40, generator=torch.Generator().manual_seed(3)
        )
        return mz.shard(DataLoader(numbers(30), batch_size=2, sampler=sampler))

    whole = loader()
    expected = [seen(whole), seen(whole)]
    first = loader()
    before = seen(first, 3)
    rest = loader()
    rest.load_state_dict(first.state_dict())
    assert sorted(before + seen(rest)) == sorted(expected[0])
    assert seen(rest) == expected[1]


@ranks
def test_other_data_are_refused() -> None:
    first = mz.shard(numbers(30), batch_size=2, seed=1)
    next(iter(first))
    state = first.state_dict()
    for other in (
        mz.shard(numbers(31), batch_size=2, seed=1),
        mz.shard(numbers(30), batch_size=2, seed=2),
        mz.shard(numbers(30), batch_size=2, seed=1, shuffle=False),
    ):
        with pytest.raises(mz.ArgumentError, match="30 samples, shuffle=True, seed=1, as was"):
            other.load_state_dict(state)
    for wrong in (-1, "2", None, True):
        with pytest.raises(mz.ArgumentError, match="samples"):
            first.load_state_dict({**state, "samples": wrong, "of": 30})


class Counting(IterableDataset[torch.Tensor]):
    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return iter(torch.arange(23) + 100 * self.epoch)


@ranks
def test_streams_go_on_too() -> None:
    def values(loader: Any, steps: int | None = None) -> list[int]:
        own = [b.tolist() for b in islice(iter(loader), steps) if loader.weight]
        return [s for rank in mz.init().gather_objects(own) for samples in rank for s in samples]

    first = mz.shard(DataLoader(Counting(), batch_size=2))
    first.set_epoch(3)
    before = values(first, 2)
    rest = mz.shard(DataLoader(Counting(), batch_size=2))
    rest.load_state_dict(first.state_dict())
    assert sorted(before + values(rest)) == list(range(300, 323))
    assert rest.epoch == 4


class Augmented(Dataset[tuple[int, float, float, float]]):
    """Draws from every generator there is."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_augmentations_are_those_of_the_run_that_was_not_interrupted(workers: int) -> None:
    """In workers by our seeds, in the training process because its generators are saved."""

    def loader() -> Any:
        return mz.shard(Augmented(), batch_size=2, num_workers=workers)

    def as_lists(batches: Any) -> list[Any]:
        return [[column.tolist() for column in batch] for batch in batches]

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    whole = as_lists(loader())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = loader()
    before = as_lists(islice(iter(first), 2))
    rest = loader()
    rest.load_state_dict(first.state_dict())
    assert before + as_lists(rest) == whole
    after = torch.rand(3)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    as_lists(loader())
    assert (torch.rand(3) == after).all()
