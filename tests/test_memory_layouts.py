"""Arrays that lie in memory as MPI cannot take them, on one rank or on all: the same results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import mpizero
from mpizero import World
from mpizero.memory.arrays import open_array

all_sizes = pytest.mark.parallel([1, 2, 3, 4])

Make = Callable[[Any], Any]


def unaligned(values: Any) -> Any:
    room = np.frombuffer(bytearray(values.nbytes + 1), values.dtype, offset=1, count=values.size)
    room[...] = values
    assert values.itemsize == 1 or not room.flags.aligned
    return room


def strided(values: Any) -> Any:
    room = np.zeros((values.size, 3), values.dtype)
    room[:, 1] = values
    return room[:, 1]


def reversed_(values: Any) -> Any:
    return values[::-1].copy()[::-1]


def field(values: Any) -> Any:
    """A field of a packed record: neither without gaps nor aligned."""
    room = np.zeros(values.size, [("flag", "i1"), ("value", values.dtype)])
    room["value"] = values
    return room["value"]


class Own(np.ndarray[Any, Any]):
    """An array of a class of the user's, which never gets fewer axes."""

    def reshape(self, *shape: Any, **named: Any) -> Any:
        return self


LAYOUTS: dict[str, Make] = {
    "unaligned": unaligned,
    "strided": strided,
    "reversed": reversed_,
    "field": field,
    "subclass": lambda values: values.copy().view(Own),
}

CALLS: dict[str, Callable[[World, Any, str], Any]] = {
    "allreduce": lambda w, x, a: w.allreduce(x, algorithm=a),
    "mean": lambda w, x, a: w.allreduce(x, "mean", algorithm=a),
    "reduce": lambda w, x, a: w.reduce(x, w.size - 1),
    "reduce_scatter": lambda w, x, a: w.reduce_scatter(x),
    "allgather": lambda w, x, a: w.allgather(x),
    "allgather_uneven": lambda w, x, a: w.allgather_uneven(x),
    "broadcast": lambda w, x, a: w.broadcast(x, w.size - 1),
    "all_to_all": lambda w, x, a: w.all_to_all(x),
    "all_to_all_uneven": lambda w, x, a: w.all_to_all_uneven(x, [len(x), *[0] * (w.size - 1)]),
    "gather": lambda w, x, a: w.gather(x),
}


@all_sizes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64"])
def test_results_do_not_depend_on_how_an_array_lies(layout: str, dtype: str) -> None:
    world = mpizero.init()
    values = (np.arange(12 * world.size) % 7 + world.rank).astype(dtype)
    for name, call in CALLS.items():
        if name == "mean" and dtype == "int64":
            continue
        algorithms = (
            ("auto", "native", "ring") if name == "allreduce" and world.size > 1 else ("auto",)
        )
        for algorithm in algorithms:
            for culprits in (range(world.size), [0], [world.size - 1]):
                plain, odd = values.copy(), LAYOUTS[layout](values)
                expected = call(world, plain, algorithm)
                mine = odd if world.rank in culprits else values.copy()
                found = call(world, mine, algorithm)
                where = f"{name}, {algorithm}, {culprits}"
                assert np.array_equal(np.asarray(mine), plain), where  # in place
                if expected is not None:
                    assert np.array_equal(np.asarray(found), np.asarray(expected)), where


@all_sizes
def test_a_repeated_call_looks_at_the_array_anew() -> None:
    """A form that has come before is reduced by a plan."""
    world = mpizero.init()
    for count in (8, 100_000):
        for _ in range(3):
            aligned, odd = np.ones(count), unaligned(np.ones(count))
            assert (world.allreduce(aligned) == world.size).all()
            assert (world.allreduce(odd if world.rank == 0 else aligned.copy() * 0 + 1)).max() == (
                world.size
            )


@all_sizes
@pytest.mark.parametrize("align", [False, True])
def test_what_lies_between_the_fields_of_a_view_stays(align: bool) -> None:
    world = mpizero.init()
    records = np.zeros(5, np.dtype([("a", "f8"), ("b", "i2"), ("c", "i4", (2,))], align=align))
    records["a"], records["b"], records["c"] = world.rank, 10 + world.rank, 20 + world.rank
    view = records[["a", "c"]]
    world.broadcast(view, world.size - 1)
    last = world.size - 1
    assert (records["a"] == last).all() and (records["c"] == 20 + last).all()
    assert (records["b"] == 10 + world.rank).all()
    gathered = world.allgather(records[["b", "c"]])
    assert gathered["b"].tolist() == [10 + rank for rank in range(world.size) for _ in range(5)]
    nested = np.zeros(2, [("x", records.dtype), ("y", "i1")])[["x"]]
    assert np.array_equal(world.broadcast(nested), nested)


def test_memory_without_gaps_is_shared() -> None:
    for array in (
        np.zeros(3),
        np.zeros(3, [("a", "f8"), ("b", "i4")]),
        np.zeros((2, 2)),
        np.zeros(0),
    ):
        assert not open_array(array, "f()", "x", writable=True).is_copy
    for array in (np.zeros(0, "V0"), np.ma.masked_array([1.0])):
        with pytest.raises(mpizero.ArgumentError):
            open_array(array, "f()", "x", writable=True)
