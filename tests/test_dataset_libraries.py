"""Datasets and loaders of other libraries, dealt to the ranks: where they are installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

import mpizero_torch as mz

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])

COUNT = 23


def check(make: Callable[[], Any], values: Callable[[Any], torch.Tensor], resumes: bool) -> None:
    """Each sample once; and, where the library can, on from within the epoch."""
    world = mz.init()
    torch.manual_seed(world.rank)  # ranks that draw for themselves would draw differently
    loader = make()
    found = [s for b in loader if loader.weight for s in values(b).reshape(-1).tolist()]
    assert sorted(s for rank in world.gather_objects(found) for s in rank) == [*range(COUNT)]
    if not resumes:
        return
    started, resumed = iter(loader), make()
    next(started)
    resumed.load_state_dict(loader.state_dict())
    rest = [values(b).tolist() for b in started]
    assert rest
    assert [values(b).tolist() for b in resumed] == rest


class Numbers(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(COUNT))


@ranks
@pytest.mark.parametrize("shuffle", [False, True])
def test_hugging_face_datasets(shuffle: bool) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"x": [*range(COUNT)]}).with_format("torch")
    check(lambda: mz.shard(rows, batch_size=2, shuffle=shuffle), lambda b: b["x"], True)
    check(lambda: mz.shard(DataLoader(rows, 2, shuffle=shuffle)), lambda b: b["x"], True)
    stream = rows.to_iterable_dataset(num_shards=3)
    if shuffle:
        stream = stream.shuffle(seed=3, buffer_size=5)
    check(lambda: mz.shard(stream, batch_size=2), lambda b: b["x"], True)


@several_ranks
def test_a_hugging_face_dataset_that_is_split_already_is_refused() -> None:
    distributed = pytest.importorskip("datasets.distributed")
    datasets = pytest.importorskip("datasets")
    world = mz.init()
    rows = datasets.Dataset.from_dict({"x": [*range(COUNT)]}).to_iterable_dataset(num_shards=4)
    split = distributed.split_dataset_by_node(rows, world.rank, world.size)
    for source in (split, DataLoader(split, batch_size=2)):
        with pytest.raises(mz.ArgumentError, match="deals out to"):
            mz.shard(source)


@ranks
def test_webdataset(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    folder = mz.init().broadcast_object(str(tmp_path))
    with mz.first() as goes_first:
        for part in range(2 if goes_first else 0):
            with webdataset.TarWriter(f"{folder}/{part}.tar") as tar:
                for sample in range(part, COUNT, 2):
                    tar.write({"__key__": f"{sample:03}", "n.cls": sample})
    url = f"{folder}/{{0..1}}.tar"
    rows = webdataset.WebDataset(url, shardshuffle=False).decode().to_tuple("n.cls")
    for make in (
        lambda: mz.shard(rows, batch_size=2),
        lambda: mz.shard(DataLoader(rows.batched(2), batch_size=None)),
        lambda: mz.shard(webdataset.WebLoader(rows, batch_size=2)),
    ):
        check(make, lambda b: b[0], True)


@ranks
@pytest.mark.parametrize("shuffle", [False, True])
def test_torchdata_loaders(shuffle: bool) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    rows = [*range(COUNT)]
    check(
        lambda: mz.shard(stateful.StatefulDataLoader(rows, batch_size=2, shuffle=shuffle)),
        lambda b: b, True,
    )  # fmt: skip
    check(lambda: mz.shard(stateful.StatefulDataLoader(Numbers(), batch_size=2)), lambda b: b, True)


class Own(DataLoader[Any]):
    def __iter__(self) -> Any:
        return super().__iter__()


@ranks
def test_a_loader_of_ones_own_class_needs_one_order_for_all() -> None:
    data = TensorDataset(torch.arange(COUNT))
    with pytest.raises(mz.ArgumentError, match="an order that each rank draws"):
        mz.shard(Own(data, batch_size=2, shuffle=True))
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(0))
    check(lambda: mz.shard(Own(data, batch_size=2, sampler=sampler)), lambda b: b[0], False)


@several_ranks
def test_a_streaming_dataset_that_deals_out_itself_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind = type("StreamingDataset", (Numbers,), {"__module__": "streaming.base.dataset"})
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check(lambda: mz.shard(kind(), batch_size=2), lambda b: b, True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(mz.ArgumentError, match="deals out to 2 ranks"):
        mz.shard(kind(), batch_size=2)
