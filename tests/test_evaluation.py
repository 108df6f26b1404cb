"""Evaluation: each sample once, predictions in order, numbers that weigh rightly or are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import mpizero_torch as mz

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])


class Stream(IterableDataset[Any]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.tensor(s),) for s in range(self.count)])


class Batches:
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.arange(s, min(s + 2, self.count)),) for s in range(0, self.count, 2)])


def data(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count))


SOURCES: dict[str, Any] = {
    "loader": lambda n: DataLoader(data(n), batch_size=3),
    "shuffled": lambda n: DataLoader(data(n), batch_size=3, shuffle=True),
    "sampler": lambda n: DataLoader(data(n), batch_size=3, sampler=Backwards(range(n))),
    "batch sampler": lambda n: DataLoader(
        data(n), batch_sampler=BatchSampler(Backwards(range(n)), 2, False)
    ),
    "dataset": data,
    "stream": lambda n: DataLoader(Stream(n), batch_size=2),
    "iterable": Batches,
    "no batching": lambda n: DataLoader(list(Batches(n)), batch_size=None),
}


class Backwards(SequentialSampler):
    def __iter__(self) -> Iterator[int]:
        return reversed(range(len(self.data_source)))


@ranks
@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("source", list(SOURCES))
def test_each_sample_once_and_predictions_in_order(source: str, count: int) -> None:
    world = mz.init()
    loader = mz.shard(SOURCES[source](count), evaluation=True)
    for _ in range(2):
        own = [x for (x,) in loader]
        total = correct = 0
        for x in own:
            total += len(x)
            correct += int((x % 2 == 0).sum())
        assert mz.sum(total) == count and mz.sum(correct) == (count + 1) // 2
        assert sorted(s for rank in world.gather_objects(sum_of(own)) for s in rank) == [
            *range(count)
        ]
        found = mz.gather_predictions([x * 10 for x in own], loader)
        assert found.tolist() == [10 * s for s in range(count)] and type(found) is torch.Tensor
    if source not in ("stream", "iterable"):
        assert len(loader) == len(own)


def sum_of(batches: list[torch.Tensor]) -> list[int]:
    return [s for batch in batches for s in batch.tolist()]


@ranks
def test_predictions_of_any_kind() -> None:
    world = mz.init()
    loader = mz.shard(DataLoader(data(11), batch_size=2, shuffle=True), evaluation=True)
    x = [x for (x,) in loader]
    expected = torch.arange(11)
    whole = torch.cat(x) if x else torch.empty(0, dtype=torch.int64)
    for values, right in (
        (whole, expected),
        ([each.bfloat16()[:, None, None] for each in x], expected.bfloat16()[:, None, None]),
        ([each % 2 == 0 for each in x], expected % 2 == 0),
        (whole.reshape(-1, 1)[:, :0], expected.reshape(-1, 1)[:, :0]),
    ):
        found = mz.gather_predictions(values, loader)
        assert found.dtype == right.dtype and torch.equal(found, right)
    arrays = mz.gather_predictions([each.numpy().astype("<c16") for each in x], loader)
    assert arrays.dtype == np.complex128 and arrays.real.tolist() == expected.tolist()
    texts = [[f"t{s}" for s in each.tolist()] for each in x]
    assert mz.gather_predictions(texts, loader) == [f"t{s}" for s in range(11)]
    assert mz.gather_predictions([t for each in texts for t in each], loader) == [
        f"t{s}" for s in range(11)
    ]
    both = mz.gather_predictions({"out": (x, texts)}, loader)
    assert both["out"][0].tolist() == expected.tolist() and both["out"][1][10] == "t10"
    with pytest.raises(mz.ArgumentError, match="loader"):
        mz.gather_predictions([], mz.shard(data(3)))
    short = whole[:-1] if world.rank == 0 else whole
    with pytest.raises(mz.ArgumentError if world.rank == 0 else mz.MismatchError, match="rows"):
        mz.gather_predictions(short, loader)


@ranks
def test_samples_that_are_drawn_more_than_once() -> None:
    sampler = WeightedRandomSampler([1.0, 5.0, 1.0], 20, generator=torch.Generator())
    loader = mz.shard(DataLoader(data(3), batch_size=2, sampler=sampler), evaluation=True)
    found = mz.gather_predictions([x for (x,) in loader], loader)
    assert len(found) == 20 and found.tolist() == sorted(found.tolist())


@several_ranks
def test_dtypes_that_differ_between_ranks_are_refused() -> None:
    world = mz.init()
    loader = mz.shard(data(2 * world.size), batch_size=2, evaluation=True)
    values = [x.double() if world.rank == 1 else x for (x,) in loader]
    with pytest.raises(mz.ArgumentError, match="the same dtype"):
        mz.gather_predictions(values, loader)


@ranks
def test_what_would_not_give_each_sample_once_is_refused() -> None:
    for source in (
        SequentialSampler(range(5)),
        DataLoader(data(5), batch_size=2, drop_last=True),
    ):
        with pytest.raises(mz.ArgumentError, match="evaluation"):
            mz.shard(source, evaluation=True)
    with pytest.raises(mz.ArgumentError, match="drop_last"):
        mz.shard(data(5), drop_last=True, evaluation=True)


@several_ranks
@pytest.mark.parametrize(
    "count_of",
    [
        lambda x: len(x),
        lambda x: x.shape[0],
        lambda x: x.size(0),
        lambda x: x.numel(),
        lambda x: int(x.sum()),
        lambda x: x.sum().item(),
        lambda x: sum(x.tolist()),
        lambda x: int(x.numpy().sum()),
        lambda x: float(x.sum()),
    ],
)
def test_a_count_that_a_filler_is_in_is_refused(count_of: Any) -> None:
    """The loop that everyone writes, on a loader that is for training."""
    world = mz.init()
    count = 4 * world.size + 1
    for loader, refused in (
        (mz.shard(TensorDataset(torch.ones(count)), batch_size=4), True),
        (mz.shard(TensorDataset(torch.ones(count)), batch_size=4, evaluation=True), False),
        (mz.shard(TensorDataset(torch.ones(4 * world.size)), batch_size=4), False),
    ):
        total = 0
        for (x,) in loader:
            total += count_of(x)
        del x
        if refused:
            with pytest.raises((mz.ArgumentError, mz.MismatchError), match="evaluation=True"):
                mz.sum(total)
            fine = total - (1 if world.rank else 0)
            assert mz.sum(fine, weight=1) == count
        else:
            assert mz.sum(total) == len(loader.dataset)
        del loader


@several_ranks
def test_what_is_known_to_be_of_a_filler_is_not_summed() -> None:
    world = mz.init()
    loader = mz.shard(TensorDataset(torch.ones(1)), batch_size=4)
    for (x,) in loader:
        assert mz.sum(x.sum()) == 1 and mz.sum({"a": x.sum()}) == {"a": 1}
        assert mz.sum(int(x.sum()) if loader.weight else 0) == 1
    later = mz.shard(TensorDataset(torch.ones(world.size)), batch_size=1)
    assert mz.sum(sum(len(x) for (x,) in later)) == world.size


@several_ranks
def test_the_mean_of_a_loss_after_the_loop_is_right_or_refused() -> None:
    world = mz.init()
    losses = torch.tensor([8.0] * (world.size + 1))
    losses[-1] = 16.0
    for evaluation in (False, True):
        loader = mz.shard(TensorDataset(losses), batch_size=1, shuffle=False, evaluation=evaluation)
        total, steps = 0.0, 0
        for (x,) in loader:
            total, steps = total + x.mean().item(), steps + 1
        with pytest.raises((mz.ArgumentError, mz.MismatchError), match="weight="):
            mz.mean(total / steps)
        samples = 2 if world.rank == 0 else 1
        own = total if samples == steps else 8.0
        right = losses.mean().item()
        assert mz.mean(own / samples, weight=samples) == pytest.approx(right)
    last = [x.mean() for (x,) in mz.shard(TensorDataset(losses), batch_size=1, shuffle=False)]
    assert mz.mean(last[-1]) == 16.0  # a tensor knows of what it is


@ranks
def test_the_area_under_a_curve_is_that_of_one_process() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(37, generator=generator)
    targets = (torch.rand(37, generator=generator) < scores).long()
    loader = mz.shard(TensorDataset(scores, targets), batch_size=4, evaluation=True)
    rows = [(s, t) for s, t in loader]
    s, t = mz.gather_predictions(([s for s, _ in rows], [t for _, t in rows]), loader)
    assert metrics.roc_auc_score(t, s) == metrics.roc_auc_score(targets, scores)


@ranks
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("uneven", [False, True])
def test_torchmetrics_over_the_ranks(uneven: bool) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    count = 2 if uneven else 21  # then there are ranks without a sample
    scores = torch.rand(count, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(count) % 2
    expected = torchmetrics.MetricCollection(collection(torchmetrics))
    expected.update(scores, targets)
    ours = mz.sync_metric(torchmetrics.MetricCollection(collection(torchmetrics)))
    loader = mz.shard(TensorDataset(scores, targets), batch_size=2, evaluation=True)
    for s, t in loader:
        ours.update(s, t)
    found = ours.compute()
    for name, value in expected.compute().items():
        torch.testing.assert_close(found[name], value)
    with pytest.raises(mz.ArgumentError, match="metric"):
        mz.sync_metric(torch.nn.Linear(1, 1))


def collection(torchmetrics: Any) -> list[Any]:
    kinds = torchmetrics.classification
    return [kinds.BinaryAccuracy(), kinds.BinaryAUROC(thresholds=None)]


@ranks
def test_training_goes_on_after_an_evaluation_whose_content_went_to_numpy() -> None:
    model = mz.DistributedDataParallel(torch.nn.Linear(1, 1))
    loader = mz.shard(TensorDataset(torch.ones(5, 1)), batch_size=4, evaluation=True)
    kept = [x.numpy() for (x,) in loader]
    model(torch.ones(2, 1)).sum().backward()  # of no loader: nothing is in doubt
    assert mz.sum(len(kept)) >= 1
