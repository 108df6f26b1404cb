"""What fails on one rank, of a call that all ranks make: the others are told, and all go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import pytest

import mpizero
from mpizero import ArgumentError, MismatchError, World

several_ranks = pytest.mark.parallel([2, 3, 4])
each_rank = pytest.mark.parametrize("culprit", [0, 1, -1])

Call = Callable[[World, bool], Any]


class NoPickle:
    def __reduce__(self) -> NoReturn:
        raise ValueError("not to be pickled")


class WordlessError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Speechless:
    def __reduce__(self) -> NoReturn:
        raise WordlessError


def rebuild(rank: int) -> str:
    if mpizero.init().rank == rank:
        raise KeyError("of no use here")
    return "rebuilt"


class NotFor:
    """Can be unpickled on all ranks but one."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __reduce__(self) -> Any:
        return rebuild, (self._rank,)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def wrong_rows(world: World, bad: bool) -> Any:
    rows = np.ones((world.rank + 1, 2))
    total = world.size * (world.size + 1) // 2
    return world.allgather_uneven(rows, out=np.empty((total + bad, 2)))


def wrong_counts(world: World, bad: bool) -> Any:
    counts = [1] * world.size
    expected = [world.size, *[0] * (world.size - 1)] if bad else counts
    return world.all_to_all_uneven(np.ones(world.size), counts, out_counts=expected)


def local_error(world: World, bad: bool) -> None:
    with world.telling():
        if bad:
            raise OSError("no such disk")
    world.barrier()


def last_error(world: World, bad: bool) -> None:
    with world.together("the work"):
        world.allreduce(1)
        if bad:
            raise OSError("no such disk")


def inner_error(world: World, bad: bool) -> None:
    with world.together("the work"), world.telling():
        world.allreduce(np.ones(3), "median" if bad else "sum")


# (what all ranks do, the culprit's own error, what the others hear of it)
FAULTS: dict[str, tuple[Call, type[Exception], str]] = {
    "object that is not pickled": (
        lambda w, bad: w.gather_objects(NoPickle() if bad else 1), ValueError, "not to be pickled"
    ),
    "lambda": (lambda w, bad: w.gather_objects((lambda: 1) if bad else 1), Exception, "lambda"),
    "deep object": (
        lambda w, bad: w.gather_objects(nested(100_000) if bad else 1), RecursionError, "recursion"
    ),
    "error without words": (
        lambda w, bad: w.gather_objects(Speechless() if bad else 1), WordlessError, "WordlessError"
    ),
    "rows": (wrong_rows, ArgumentError, "out"),
    "counts": (wrong_counts, MismatchError, "expected"),
    "color": (lambda w, bad: w.split("red" if bad else 0), ArgumentError, "color"),  # type: ignore[arg-type]
    "large color": (lambda w, bad: w.split(2**31 if bad else 0), ArgumentError, "color"),
    "key": (lambda w, bad: w.split(0, 0.5 if bad else 0), ArgumentError, "key"),  # type: ignore[arg-type]
    "memory of no dtype": (
        lambda w, bad: w.allocate(9, "flaot32" if bad else "float32"), TypeError, "flaot32"
    ),
    "no memory at all": (
        lambda w, bad: w.allocate_common(-1 if bad else 9, "float32"), ArgumentError, "count"
    ),
    "large memory": (
        lambda w, bad: w.allgather(np.broadcast_to(np.zeros(1), 1 << 45) if bad else np.ones(1)),
        MemoryError, "MemoryError",
    ),
    "masked": (
        lambda w, bad: w.allreduce(np.ma.masked_equal([1.0, 2], 1) if bad else np.ones(2)),
        ArgumentError, "masked",
    ),
    "root": (lambda w, bad: w.broadcast_object(1, w.size if bad else 0), ArgumentError, "root"),
    "number": (lambda w, bad: w.allreduce(2**80 if bad else 1), ArgumentError, "object"),
    "before a call": (local_error, OSError, "OSError: no such disk"),
    "after the last call": (last_error, OSError, "OSError: no such disk"),
    "within": (inner_error, ArgumentError, "median"),
}  # fmt: skip


def goes_on(world: World) -> None:
    world.barrier()
    assert world.allreduce(1) == world.size
    assert world.gather_objects(world.rank) == list(range(world.size))
    handle = world.allreduce(np.ones(3), asynchronous=True)
    assert (handle.wait() == world.size).all()


@several_ranks
@each_rank
@pytest.mark.parametrize("case", FAULTS)
def test_the_others_hear_of_it(case: str, culprit: int) -> None:
    world = mpizero.init()
    call, own, message = FAULTS[case]
    culprit %= world.size
    if world.rank == culprit:
        with pytest.raises(own) as raised:
            call(world, True)
        assert not isinstance(raised.value, MismatchError) or "refused" not in str(raised.value)
    else:
        with pytest.raises(MismatchError, match=rf"rank {culprit}: .*{message}"):
            call(world, False)
    goes_on(world)


@several_ranks
@each_rank
@pytest.mark.parametrize("size", [1, 1 << 21])
def test_an_object_that_one_rank_cannot_take(size: int, culprit: int) -> None:
    world = mpizero.init()
    culprit %= world.size
    value = (NotFor(culprit), b"x" * size)

    def sends() -> None:
        world.broadcast_object(value if world.rank == 0 else None)

    def gathers() -> None:
        world.gather_objects(value)

    for call in (sends, gathers):
        if world.rank == culprit:
            with pytest.raises(KeyError, match="of no use"):
                call()
        else:
            with pytest.raises(
                MismatchError, match=rf"rank {culprit}: refused: KeyError: .*no use"
            ):
                call()
        goes_on(world)


@several_ranks
@each_rank
@pytest.mark.parametrize(
    "make", [NoPickle, lambda: lambda: 1, lambda: nested(100_000)], ids=["class", "lambda", "deep"]
)
def test_an_object_that_its_rank_cannot_give(make: Callable[[], Any], culprit: int) -> None:
    world = mpizero.init()
    root = culprit % world.size
    with pytest.raises(Exception) as raised:
        world.broadcast_object(make(), root)
    assert isinstance(raised.value, MismatchError) == (world.rank != root)
    goes_on(world)


@several_ranks
def test_an_error_that_all_ranks_raise_leaves_them_in_step() -> None:
    world = mpizero.init()
    with pytest.raises(OSError, match="no such disk"), world.together("the work"):
        raise OSError("no such disk" if world.rank else "no such disk here")
    with pytest.raises(ValueError, match="pickled"):
        world.gather_objects(NoPickle())
    goes_on(world)


@several_ranks
@each_rank
def test_one_error_may_be_raised_again_and_again(culprit: int) -> None:
    world = mpizero.init()
    culprit %= world.size
    error = ValueError("always the same")

    class Bad:
        def __reduce__(self) -> NoReturn:
            raise error

    def block(bad: bool) -> None:
        with world.telling(), world.together("the work"):
            if bad:
                raise error

    def call(bad: bool) -> None:
        world.gather_objects(Bad() if bad else 1)

    def call_in_block(bad: bool) -> None:
        with world.together("the work"):
            call(bad)

    for do in (call, block, call, call_in_block, block, block, call_in_block):
        with pytest.raises(ValueError if world.rank == culprit else MismatchError, match="always"):
            do(world.rank == culprit)
    goes_on(world)


@several_ranks
def test_equal_wrong_counts_are_an_error_on_all_ranks() -> None:
    world = mpizero.init()
    with pytest.raises(MismatchError, match="expected"):
        wrong_counts(world, True)
    goes_on(world)


@pytest.mark.parallel([1, 2, 3])
def test_objects_arrive_as_they_are() -> None:
    world = mpizero.init()
    values = [None, 2**70, "ä", b"", [1, (2, {3: {4.5}})], np.arange(3), NotFor(-1), nested(300)]
    for value in values:
        expected = "rebuilt" if isinstance(value, NotFor) else value
        for found in (world.broadcast_object(value), *world.gather_objects(value)):
            assert type(found) is type(expected)
            assert np.array_equal(found, expected) if value is values[5] else found == expected
    large = bytes(range(256)) * (world.rank + 1) * 8192  # of another length on each rank
    for rank, found in enumerate(world.gather_objects(large)):
        assert found == bytes(range(256)) * (rank + 1) * 8192
