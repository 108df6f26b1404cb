"""Training on batches of unequal weight, however they are drawn, kept, changed and fed."""

from __future__ import annotations

import copy
import gc
import threading
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice, zip_longest
from queue import Queue
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import mpizero_torch as mz
from mpizero.sampling import ShardedBatches
from mpizero_torch import batch_weight
from mpizero_torch.weighed_tensor import live
from support.launch import mpirun
from support.reference import seeded

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])

BATCH = 2


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No test leaves another one a batch that may be anything, or be mixed with its own."""
    yield
    if live:
        gc.collect()
    assert batch_weight.doubt() is None


def samples(more: int = 1) -> torch.Tensor:
    """Two whole global batches, and one that has ``more`` samples for all ranks.

    (On one rank 3 would be one whole batch, and one.)
    """
    if mz.init().size == 1:
        more = min(more, 2)
    return seeded(1, 2 * BATCH * mz.init().size + more, 4)


def net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return (output - 1).square().mean()


def whole_batches(x: torch.Tensor, epochs: int = 1) -> list[torch.Tensor]:
    """The batches that one process sees, in order."""
    width = BATCH * mz.init().size
    return [
        x[batch.indices]
        for _ in range(epochs)
        for batch in ShardedBatches(len(x), width, 0, 1, shuffle=False).epoch(0)
    ]


@torch.enable_grad()
def expected(x: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of one process."""
    alone = net()
    loss = loss_of(alone(x))
    loss.backward()
    return loss.item(), [p.grad for p in alone.parameters() if p.grad is not None]


def check_step(model: nn.Module, whole: torch.Tensor) -> None:
    _, gradients = expected(whole)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def plain(loader: Iterable[Any]) -> Iterator[Any]:
    return iter(loader)


def one_ahead(loader: Iterable[Any]) -> Iterator[Any]:
    batches = iter(loader)
    before = next(batches)
    for batch in batches:
        yield before
        before = batch
    yield before


def by_thread(loader: Iterable[Any]) -> Iterator[Any]:
    queue: Queue[Any] = Queue(maxsize=2)

    def read() -> None:
        for batch in loader:
            queue.put(batch)
        queue.put(None)

    thread = threading.Thread(target=read)
    thread.start()
    yield from iter(queue.get, None)
    thread.join()


def all_at_once(loader: Iterable[Any]) -> Iterator[Any]:
    return iter([*loader])


READERS = [plain, one_ahead, by_thread, all_at_once]


class Named(NamedTuple):
    x: torch.Tensor
    index: int


@dataclass
class Record:
    x: torch.Tensor
    note: str = ""


class Thing:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def to(self, dtype: torch.dtype) -> Thing:
        return Thing(self.x.to(dtype))


def stacked(rows: list[Any]) -> torch.Tensor:
    return torch.stack([row[0] for row in rows])


# What a batch is, and how the loop gets the input out of it.
FORMS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "tensor": (lambda x: x, lambda b: b),
    "list": (lambda x: [x], lambda b: b[0]),
    "dict": (lambda x: {"x": x}, lambda b: b["x"]),
    "named": (lambda x: Named(x, 3), lambda b: b.x),
    "record": (Record, lambda b: b.x),
    "encoding": (lambda x: UserDict(x=x), lambda b: {**b}["x"]),
    "object": (Thing, lambda b: b.to(torch.float64).x),
    "changed": (
        lambda x: x.float(),
        lambda b: ((b * 255).to(torch.float64) / 255)[:, [0, 1, 2, 3]],
    ),
    "in pieces": (lambda x: [*x], torch.stack),
    "mixed with constants": (lambda x: x, lambda b: torch.lerp(b, torch.zeros(4).double(), 0.0)),
    "copied": (lambda x: x, copy.deepcopy),
    "in its place": (lambda x: x, lambda b: torch.zeros_like(b).copy_(b)),
}


def loader_of(x: torch.Tensor, form: str = "tensor", **options: Any) -> Any:
    make = FORMS[form][0]
    data = TensorDataset(x)
    return mz.shard(DataLoader(data, BATCH, collate_fn=lambda rows: make(stacked(rows)), **options))


@ranks
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("more", [1, 3])
def test_gradients_and_means_with_any_reader(reader: Callable[..., Any], more: int) -> None:
    x = samples(more)
    model = mz.DistributedDataParallel(net())
    steps = 0
    for whole, own in zip(whole_batches(x), reader(loader_of(x)), strict=True):
        model.zero_grad()
        loss = loss_of(model(own))
        assert mz.mean(loss) == pytest.approx(expected(whole)[0], rel=1e-9)
        loss.backward()
        check_step(model, whole)
        steps += 1
    assert steps > 1


@ranks
@pytest.mark.parametrize("form", FORMS)
def test_gradients_with_batches_of_any_form(form: str) -> None:
    x = samples().float().double()
    model = mz.DistributedDataParallel(net())
    get = FORMS[form][1]
    for whole, own in zip(whole_batches(x), one_ahead(loader_of(x, form)), strict=True):
        model.zero_grad()
        loss_of(model(get(own))).backward()
        _, gradients = expected(whole)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


@ranks
def test_batches_that_are_kept_and_seen_again_weigh_what_they_did() -> None:
    x = samples()
    model = mz.DistributedDataParallel(net())
    loader = loader_of(x)
    reader = islice(cycle(loader), 2 * len(loader))
    for whole, own in zip(whole_batches(x, 2), reader, strict=True):
        model.zero_grad()
        loss = loss_of(model(own))
        loss.backward()
        check_step(model, whole)
        loss.item(), own.max().item()  # what is logged leaves no doubt about the others


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sharded_training_with_a_reader_that_is_ahead(stage: int) -> None:
    x = samples()
    inner, alone = net(), net()
    model, optimizer = mz.zero(inner, torch.optim.SGD(inner.parameters(), lr=0.1), stage=stage)
    theirs = torch.optim.SGD(alone.parameters(), lr=0.1)
    for whole, own in zip(whole_batches(x), one_ahead(loader_of(x)), strict=True):
        optimizer.zero_grad(), theirs.zero_grad()
        loss_of(model(own)).backward(), loss_of(alone(whole)).backward()
        optimizer.step(), theirs.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-9, atol=1e-12)


@ranks
def test_two_loaders_in_step_each_with_its_weight() -> None:
    """The one that began first ends first, and its weights are its own."""
    x, short = samples(1), samples(3)[: BATCH * mz.init().size + 1]
    model = mz.DistributedDataParallel(net())
    steps = 0
    for theirs, other, whole, own in zip_longest(
        whole_batches(short), loader_of(short), whole_batches(x), loader_of(x)
    ):
        for seen, given in ((whole, own), (theirs, other)):
            if given is not None:
                model.zero_grad()
                loss_of(model(given)).backward()
                check_step(model, seen)
        steps += 1
    assert steps == len(loader_of(x))


@several_ranks
def test_an_input_of_two_loaders_is_refused_where_they_weigh_differently() -> None:
    world = mz.init()
    uneven, even = samples(1), samples(1)[: BATCH * world.size * 2]
    model = mz.DistributedDataParallel(net())
    refused = 0
    for a, b in zip(loader_of(uneven), cycle(loader_of(even)), strict=False):
        together = torch.cat([a, b]) if len(a) == BATCH else a + b[:1]
        if refused or len(a) == BATCH:
            loss_of(model(together)).backward()
            continue
        with pytest.raises(mz.ArgumentError, match="several batches that weigh"):
            model(together)
        refused += 1
    assert refused == 1


@ranks
def test_an_evaluation_in_an_epoch_and_a_look_at_a_standing_iterator() -> None:
    x, held_out = samples(), samples(1)[: BATCH * mz.init().size + 1]
    model = mz.DistributedDataParallel(net())
    standing = iter(loader_of(held_out))
    wholes = whole_batches(held_out)
    for whole, own in zip(whole_batches(x), loader_of(x), strict=True):
        model.zero_grad()
        output = model(own)
        with torch.no_grad():
            for theirs, other in zip(wholes, loader_of(held_out), strict=True):
                loss = loss_of(model(other))
                assert mz.mean(loss) == pytest.approx(expected(theirs)[0], rel=1e-9)
                float(loss)
        next(standing, None)
        again = model(own)
        loss_of((output + again) / 2).backward()
        check_step(model, whole)


@ranks
@pytest.mark.parametrize("looked", [len, repr, lambda x: x.shape])
def test_own_data_beside_a_standing_iterator_count_alike(looked: Callable[[Any], Any]) -> None:
    world = mz.init()
    iterator = iter(mz.shard(DataLoader(TensorDataset(torch.ones(1, 4)), batch_size=2)))
    (first,) = next(iterator)
    looked(first)
    model = mz.DistributedDataParallel(nn.Linear(1, 1, bias=False))
    for _ in range(2):
        model.zero_grad()
        model(torch.full((2, 1), float(world.rank + 1))).mean().backward()
        assert model.module.weight.grad.item() == (world.size + 1) / 2
    assert iterator is not None


@several_ranks
def test_what_went_through_numpy_is_refused_until_it_is_stated() -> None:
    x = samples()
    size = mz.init().size
    model = mz.DistributedDataParallel(net())
    loader = mz.shard(
        DataLoader(TensorDataset(x), BATCH, collate_fn=lambda rows: stacked(rows).numpy())
    )
    weights = []
    for own in loader:
        assert isinstance(own, np.ndarray)
        weights.append(loader.weight)
        if loader.weight != 1.0:
            with pytest.raises(mz.ArgumentError, match=r"ndarray in the batch.*loader\.weight"):
                model(torch.from_numpy(own))
    assert weights[:2] == [1.0, 1.0] and sum(mz.init().gather_objects(weights[2])) == size
    for whole, own in zip(whole_batches(x), loader, strict=True):
        model.zero_grad()
        model.weigh(loader.weight)
        loss_of(model(torch.from_numpy(own))).backward()
        check_step(model, whole)
    del loader, own
    gc.collect()
    model.zero_grad()
    model(x)  # nobody is left whose batch it might be


@ranks
@pytest.mark.parametrize("use_no_sync", [True, False])
def test_accumulation_with_a_short_last_batch(use_no_sync: bool) -> None:
    x = samples()
    model = mz.DistributedDataParallel(net())
    wholes = whole_batches(x)
    last = len(wholes) - 1
    for at, own in enumerate(one_ahead(loader_of(x))):
        if use_no_sync and at < last:
            with model.no_sync():
                loss_of(model(own)).backward()
        else:
            loss_of(model(own)).backward()
    sums = [sum(each) for each in zip(*(expected(whole)[1] for whole in wholes), strict=True)]
    for parameter, gradient in zip(model.parameters(), sums, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


@ranks
def test_a_chain_of_two_wrapped_modules() -> None:
    """What the first gives back weighs what it was fed."""
    x = samples()
    first, second = net(), nn.Linear(2, 3).double()
    both = nn.Sequential(copy.deepcopy(first), copy.deepcopy(second))
    start, end = mz.DistributedDataParallel(first), mz.DistributedDataParallel(second)
    alone = copy.deepcopy(both)
    for whole, own in zip(whole_batches(x), loader_of(x), strict=True):
        for each in (start, end, alone):
            each.zero_grad()
        loss_of(end(start(own))).backward(), loss_of(alone(whole)).backward()
        ours = [*start.parameters(), *end.parameters()]
        for parameter, theirs in zip(ours, alone.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parallel([2])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at it
def test_a_compiled_wrapper() -> None:
    x = samples()
    inner = net()
    model = torch.compile(mz.DistributedDataParallel(inner), backend="eager")
    for whole, own in zip(whole_batches(x), one_ahead(loader_of(x)), strict=True):
        inner.zero_grad()
        loss_of(model(own)).backward()
        check_step(inner, whole)
    inner.zero_grad()
    loss_of(model(x)).backward()
    check_step(inner, x)  # the compiler's looks at the last batch leave no doubt


@several_ranks
def test_a_loss_of_batches_that_weigh_differently_is_refused() -> None:
    size = mz.init().size
    x, even = samples(1), samples(1)[: BATCH * size]
    model = mz.DistributedDataParallel(net())
    *_, last = loader_of(x)
    (other,) = loader_of(even)
    loss = loss_of(model(last)) + loss_of(model(other))
    with pytest.raises(mz.ArgumentError, match="weigh"):
        loss.backward()


class Normalised(nn.Module):
    def __init__(self, norm: nn.Module, way: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.norm, self.way = nn.Linear(4, 6).double(), norm, way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.way == "plain":
            return self.norm(x)  # type: ignore[no-any-return]
        return checkpoint(self.norm, x, use_reentrant=self.way == "reentrant")  # type: ignore[no-any-return]


@ranks
@pytest.mark.parametrize("way", ["plain", "reentrant", "checkpointed"])
@pytest.mark.filterwarnings("ignore:.*lambda.*:UserWarning")
def test_batch_norm_over_ranks_reads_the_weight_of_its_input(way: str) -> None:
    """An idle rank's filler is not in the statistics, of the gradient neither."""
    x = samples(3)
    torch.manual_seed(0)
    alone = Normalised(nn.BatchNorm1d(6, track_running_stats=False).double(), way)
    inner = mz.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(alone))
    model = mz.DistributedDataParallel(inner)
    for whole, own in zip(whole_batches(x), one_ahead(loader_of(x)), strict=True):
        model.zero_grad(), alone.zero_grad()
        (model(own) ** 3).mean().backward(), (alone(whole) ** 3).mean().backward()
        for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-10)


@ranks
def test_batch_norm_outside_of_a_wrapped_module() -> None:
    x = samples(3)
    ours, alone = mz.SyncBatchNorm(4).double(), nn.BatchNorm1d(4).double()
    for whole, own in zip(whole_batches(x), loader_of(x), strict=True):
        assert mz.mean(ours(own).square().sum(1).mean()) == pytest.approx(
            alone(whole).square().sum(1).mean().item(), rel=1e-9
        )
    torch.testing.assert_close(ours.running_mean, alone.running_mean)
    torch.testing.assert_close(ours.running_var, alone.running_var)


@ranks
def test_the_mean_of_a_number_is_weighed_by_the_batch_at_hand() -> None:
    world = mz.init()
    x = samples()
    for whole, own in zip(whole_batches(x), loader_of(x), strict=True):
        mean = own.sum(1).mean().item()
        assert mz.mean(mean) == pytest.approx(whole.sum(1).mean().item(), rel=1e-9)
    assert mz.mean(float(world.rank)) == (world.size - 1) / 2  # no loop is open any more


@several_ranks
def test_the_mean_of_a_number_in_two_loops_is_refused_on_all_ranks() -> None:
    world = mz.init()
    outer = iter(mz.shard(TensorDataset(torch.ones(2 * world.size)), batch_size=1))
    next(outer)
    inner = iter(mz.shard(TensorDataset(torch.ones(1)), batch_size=1))
    (x,) = next(inner)
    with pytest.raises(mz.ArgumentError, match=r"2 loops .*weight="):
        mz.mean(1.0)
    assert mz.mean(x.mean()) == 1.0 and mz.mean(2.0, weight=1) == 2.0
    inner.close()
    assert mz.mean(float(world.rank)) == (world.size - 1) / 2
    with pytest.raises(mz.ArgumentError if world.rank == 0 else mz.MismatchError, match="mean"):
        mz.mean(1.0, weight=-1 if world.rank == 0 else 1)


class Rows(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(samples())


@ranks
def test_streams_carry_weights_too() -> None:
    x = samples()
    model = mz.DistributedDataParallel(net())
    stream = mz.shard(DataLoader(Rows(), batch_size=BATCH))
    for whole, own in zip(whole_batches(x), one_ahead(stream), strict=True):
        model.zero_grad()
        loss_of(model(own)).backward()
        check_step(model, whole)


@ranks
def test_even_batches_are_plain_tensors() -> None:
    x = samples()
    for loader in (loader_of(x, drop_last=True), loader_of(x[: 2 * BATCH * mz.init().size])):
        assert {type(own) for own in loader} == {torch.Tensor}
    kinds = {type(own) for own in loader_of(x)}
    assert len(kinds) == 1, "within an uneven epoch all are of one kind"


def test_open_iterators_at_exit_are_silent() -> None:
    finished = mpirun(
        2,
        """
        import torch
        from torch.utils.data import DataLoader, IterableDataset, TensorDataset
        import mpizero_torch as mz

        class Rows(IterableDataset):
            def __iter__(self):
                yield from torch.arange(9.0)

        mz.init()
        loader = mz.shard(TensorDataset(torch.arange(33.0)), batch_size=4)
        stream = mz.shard(DataLoader(Rows(), batch_size=2))
        batches, others = iter(loader), iter(stream)
        (x,), y = next(batches), next(others)
        def ahead():
            for batch in loader:
                yield batch
        more = ahead()
        kept = next(more), x.sum().item(), y.numpy()
        print("done")
        """,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == ["done", "done"]
    assert finished.stderr == ""
