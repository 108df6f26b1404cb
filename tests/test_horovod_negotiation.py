"""Horovod's operations are found by name: in whatever order, and never waited for in vain."""

from __future__ import annotations

import itertools
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

import mpizero_torch as mz
import mpizero_torch.horovod as hvd
from mpizero.diagnostics.threads import of_program
from mpizero_torch.horovod import negotiation

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])


@pytest.fixture(autouse=True)
def _initialized(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    suites = set(sys._current_frames()) - {threading.get_ident()}  # they submit nothing
    monkeypatch.setattr(
        negotiation, "of_program", lambda: [each for each in of_program() if each not in suites]
    )
    hvd.init()
    yield
    hvd.shutdown()


@ranks
def test_every_rank_submits_in_another_order() -> None:
    names = ["a", "b", "c", "d"]
    orders = list(itertools.permutations(names))
    for turn in range(3):
        mine = orders[(7 * hvd.rank() + turn) % len(orders)]
        handles = {n: hvd.allreduce_async(torch.tensor([ord(n)]), name=n, op=hvd.Sum) for n in mine}
        for name in orders[(11 * hvd.rank() + 5 * turn) % len(orders)]:
            assert hvd.synchronize(handles[name]).item() == ord(name) * hvd.size()


@ranks
def test_who_waits_meets_those_who_come_later() -> None:
    """A rank waits for its first operation before it submits the second; the others do not."""
    x = torch.ones(2)
    if hvd.rank() == 0:
        first = hvd.allreduce(x, name="first", op=hvd.Sum)
        second = hvd.allreduce(x * 2, name="second", op=hvd.Sum)
    else:
        later = hvd.allreduce_async(x * 2, name="second", op=hvd.Sum)
        first = hvd.allreduce(x, name="first", op=hvd.Sum)
        second = hvd.synchronize(later)
    assert first.tolist() == [hvd.size()] * 2
    assert second.tolist() == [2 * hvd.size()] * 2


@ranks
def test_kinds_and_unnamed_operations_are_told_apart() -> None:
    rank, size = hvd.rank(), hvd.size()
    work = [
        lambda: hvd.allgather_async(torch.tensor([rank]), name="x"),
        lambda: hvd.broadcast_async(torch.tensor([rank]), 0, name="x"),
        lambda: hvd.allreduce_async(torch.tensor([1])),
        lambda: hvd.allgather_async(torch.tensor([-rank])),
    ]
    order = list(range(4))[:: -1 if rank % 2 else 1]
    handles = {i: work[i]() for i in order}
    got = [hvd.synchronize(handles[i]).tolist() for i in range(4)]
    assert got == [list(range(size)), [0], [1], [-r for r in range(size)]]


@ranks
def test_polling_gets_there() -> None:
    handle = hvd.allreduce_async(torch.ones(3), name="p", op=hvd.Sum)
    while not hvd.poll(handle):
        pass
    assert hvd.synchronize(handle).tolist() == [hvd.size()] * 3
    assert hvd.synchronize(handle).tolist() == [hvd.size()] * 3
    with pytest.raises(ValueError, match="_async"):
        hvd.poll(3)


@several_ranks
def test_polls_of_different_operations_are_no_error() -> None:
    handle = hvd.allreduce_async(torch.ones(1), name="zero" if hvd.rank() == 0 else "rest")
    assert not hvd.poll(handle)
    other = hvd.allreduce_async(torch.ones(1), name="rest" if hvd.rank() == 0 else "zero")
    assert hvd.synchronize(handle).item() == hvd.synchronize(other).item() == 1


@several_ranks
def test_a_name_that_is_under_way_is_refused() -> None:
    handle = hvd.allreduce_async(torch.ones(1), name="same")
    with pytest.raises(ValueError, match="'same', which is under way"):
        hvd.allreduce_async(torch.ones(1), name="same")
    hvd.synchronize(handle)
    hvd.allreduce(torch.ones(1), name="same")


@several_ranks
def test_waiting_for_different_operations_is_an_error_that_names_them() -> None:
    name = "mine" if hvd.rank() == 0 else "theirs"
    with pytest.raises(mz.MismatchError) as caught:
        hvd.allreduce(torch.ones(2), name=name)
    assert "rank 0: allreduce 'mine'" in str(caught.value)
    assert "rank 1: allreduce 'theirs'" in str(caught.value)


@several_ranks
def test_a_form_that_differs_is_an_error_of_this_operation_alone() -> None:
    x = torch.ones(2 if hvd.rank() else 3)
    wrong = hvd.allreduce_async(x, name="w")
    right = hvd.allreduce_async(torch.ones(1), name="r", op=hvd.Sum)
    with pytest.raises(mz.MismatchError) as caught:
        hvd.synchronize(wrong)
    assert "rank 0: float32 (3,)" in str(caught.value)
    assert "rank 1: float32 (2,)" in str(caught.value)
    assert hvd.synchronize(right).item() == hvd.size()
    op = hvd.Sum if hvd.rank() else hvd.Max
    with pytest.raises(mz.MismatchError, match=r"rank 0: float32.*Max"):
        hvd.allreduce(torch.ones(1), name="op", op=op)
    hvd.barrier()


@several_ranks
def test_a_call_of_something_else_is_an_error_that_names_both() -> None:
    with pytest.raises(mz.MismatchError) as caught:
        if hvd.rank() == 0:
            hvd.allreduce(torch.ones(2), name="gone")
        else:
            mz.init().barrier()
    assert "barrier()" in str(caught.value)
    if hvd.rank() == 0:
        assert "waits for hvd.allreduce 'gone' of float32 (2,)" in str(caught.value)


@ranks
def test_join() -> None:
    """Rank r has r + 1 batches; the last to come is the last rank."""
    rank, size = hvd.rank(), hvd.size()
    for step in range(rank + 1):
        left = size - step
        x = torch.full((3,), rank + 1.0)
        mine = range(step + 1, size + 1)  # what those bring who are still there
        total = hvd.allreduce(x, name="sum", op=hvd.Sum)
        assert total.tolist() == [sum(mine)] * 3
        assert hvd.allreduce(x, name="mean").tolist() == pytest.approx([sum(mine) / size] * 3)
        assert hvd.allreduce(x, op=hvd.Min).tolist() == [min(mine)] * 3
        assert hvd.allreduce(-x, op=hvd.Max).tolist() == [-min(mine)] * 3
        assert hvd.allreduce(torch.tensor(2), op=hvd.Product).item() == 2**left
        assert hvd.grouped_allreduce([x, x.half()], op=hvd.Sum)[1].tolist() == [sum(mine)] * 3
    assert hvd.join() == size - 1
    assert hvd.allreduce(torch.tensor(1.0), op=hvd.Sum).item() == size  # all are back


@several_ranks
def test_what_cannot_be_done_without_those_who_joined() -> None:
    if hvd.rank() == 0:
        assert hvd.join() in range(hvd.size())
    else:
        with pytest.raises(mz.MismatchError, match=r"Ranks \[0\] have joined"):
            hvd.broadcast(torch.ones(1), 1, name="b")
        with pytest.raises(mz.MismatchError, match="Allgather is not supported with Join"):
            hvd.allgather(torch.ones(1), name="g")
        hvd.join()
    hvd.barrier()


def _together(*work: Callable[[], None]) -> None:
    """Each on a thread of its own; raises what one of them raises."""
    errors: list[BaseException] = []

    def run(each: Callable[[], None]) -> None:
        try:
            each()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(each,)) for each in work[1:]]
    for thread in threads:
        thread.start()
    run(work[0])
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@several_ranks
def test_two_threads_find_each_others_operations_by_name() -> None:
    rank, size = hvd.rank(), hvd.size()
    pause = random.Random(rank)

    def metrics() -> None:
        for i in range(15):
            time.sleep(pause.random() * 0.01)
            x = hvd.allreduce(torch.full((10,), float(rank + i)), op=hvd.Sum, name=f"metric.{i}")
            assert x.tolist() == [sum(r + i for r in range(size))] * 10

    def gathers() -> None:
        for i in range(15):
            time.sleep(pause.random() * 0.01)
            x = hvd.allgather(torch.full((2 + rank,), float(i)), name=f"gather.{i}")
            assert x.tolist() == [i] * sum(2 + r for r in range(size))

    def train() -> None:
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 5)
        plain = torch.optim.SGD(model.parameters(), 0.1)
        optimizer = hvd.DistributedOptimizer(plain, model.named_parameters())
        for _ in range(10):
            time.sleep(pause.random() * 0.01)
            optimizer.zero_grad()
            model(torch.ones(2, 5) * (rank + 1)).sum().backward()
            optimizer.step()
        every = hvd.allgather(model.weight.detach()[None], name="weights")
        assert torch.equal(every, every[:1].expand_as(every))

    _together(train, metrics)
    _together(gathers, metrics)
    if hvd.size() > 1:  # each rank's threads begin in another order
        _together(*([gathers, metrics] if rank % 2 else [metrics, gathers]))


@several_ranks
def test_a_thread_that_comes_later_is_waited_for() -> None:
    """Every main thread waits, and for different things; what they wait for comes from others."""
    rank, size = hvd.rank(), hvd.size()
    mine, other = ("a", "b") if rank == 0 else ("b", "a")

    def late() -> None:
        time.sleep(0.3)
        assert hvd.allreduce(torch.ones(2), op=hvd.Sum, name=other)[0] == size

    _together(lambda: _expect(mine, size), late)


def _expect(name: str, size: int) -> None:
    assert hvd.allreduce(torch.ones(2), op=hvd.Sum, name=name)[0] == size


@several_ranks
def test_operations_without_names_are_one_threads() -> None:
    hvd.allreduce(torch.ones(1))
    found: list[str] = []

    def second() -> None:
        try:
            hvd.allreduce(torch.ones(1))
        except mz.ArgumentError as error:
            found.append(str(error))

    _together(lambda: None, second)
    assert "'MainThread'" in found[0] and "a name of its own" in found[0]
    hvd.allreduce(torch.ones(1))


@several_ranks
def test_polling_says_at_first_that_it_is_under_way() -> None:
    handles = [hvd.allreduce_async(torch.ones(3), name=f"{i}") for i in range(3)]
    assert not any(hvd.poll(each) for each in handles)
    while not hvd.poll(handles[1]):
        pass
    assert hvd.synchronize(handles[1]).tolist() == [1.0] * 3
    for each in (handles[0], handles[2]):
        assert hvd.poll(each) and hvd.synchronize(each).tolist() == [1.0] * 3
