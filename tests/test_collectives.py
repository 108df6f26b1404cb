"""Collectives over MPI, for every dtype, operation, layout and algorithm, against numpy."""

from __future__ import annotations

import array as stdlib_array
import contextlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest_mpi import parallel_assert

import mpizero
from mpizero import World
from mpizero.collectives import transport
from mpizero.collectives.halving_doubling import HalvingDoubling
from mpizero.collectives.native import Native
from mpizero.collectives.ring import Ring
from mpizero.reduction import operation
from support.cases import DTYPES, assert_close, reductions, shapes, values
from support.placements import Placement

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])
ALGORITHMS = ("auto", "native", "ring", "halving_doubling", "node_shared")
LAYOUTS = ("contiguous", "strided", "fortran", "reversed")
algorithm_names = st.sampled_from((*ALGORITHMS, "hierarchical"))
places = st.integers(0, 59)  # which of the placements: a multiple of how many there are
Places = list[tuple[Placement, World]]


def laid_out(array: np.ndarray, layout: str) -> np.ndarray:
    """The same numbers in another memory layout."""
    if layout == "strided" and array.ndim:
        wide = np.zeros((*array.shape[:-1], array.shape[-1] * 2), array.dtype)
        wide[..., ::2] = array
        return wide[..., ::2]
    if layout == "fortran" and array.ndim:
        return np.array(array, order="F")
    if layout == "reversed" and array.ndim:
        return array[::-1].copy()[::-1]
    return array.copy()


def agreed(placement: Placement, check: Any) -> None:
    """Run ``check`` on every rank; fail on all if it fails on one, so that none goes on alone."""
    problem = ""
    try:
        check()
    except AssertionError as error:
        problem = f"{placement}: {str(error) or 'assertion failed'}"
    parallel_assert(not problem, problem)


def offered(world: World, algorithm: str, collective: str) -> str:
    """The algorithm, where there is that for such nodes; else "auto"."""
    return algorithm if algorithm in world.algorithms(collective) else "auto"


@ranks
@settings(max_examples=150)
@given(
    reduction=reductions,
    shape=shapes,
    algorithm=algorithm_names,
    layout=st.sampled_from(LAYOUTS),
    out=st.booleans(),
    asynchronous=st.booleans(),
    place=places,
)
def test_allreduce(
    placed_worlds: Places,
    place: int,
    reduction: tuple[str, np.dtype],
    shape: tuple[int, ...],
    algorithm: str,
    layout: str,
    out: bool,
    asynchronous: bool,
) -> None:
    placement, world = placed_worlds[place % len(placed_worlds)]
    algorithm = offered(world, algorithm, "all_reduce")
    op, dtype = reduction
    everyone = [values(r, shape, dtype, 5) for r in range(world.size)]
    x = laid_out(everyone[world.rank], layout)
    target = laid_out(np.zeros(shape, dtype), layout) if out else None
    got = world.allreduce(x, op, out=target, asynchronous=asynchronous, algorithm=algorithm)
    if asynchronous:
        got = got.wait()

    def check() -> None:
        assert got is (target if out else x)
        assert_close(got, everyone, op)
        if out:
            assert x.tobytes() == everyone[world.rank].tobytes()

    agreed(placement, check)


@ranks
@settings(max_examples=80)
@given(
    reduction=reductions,
    rows=st.integers(0, 5),
    tail=st.lists(st.integers(0, 4), max_size=2),
    algorithm=algorithm_names,
    layout=st.sampled_from(LAYOUTS),
    out=st.booleans(),
    asynchronous=st.booleans(),
    place=places,
)
def test_scatter_gather_exchange(
    placed_worlds: Places,
    place: int,
    reduction: tuple[str, np.dtype],
    rows: int,
    tail: list[int],
    algorithm: str,
    layout: str,
    out: bool,
    asynchronous: bool,
) -> None:
    placement, world = placed_worlds[place % len(placed_worlds)]
    op, dtype = reduction
    size, rank = world.size, world.rank
    everyone = [values(r, (size * rows, *tail), dtype, 6) for r in range(size)]
    mine = slice(rank * rows, (rank + 1) * rows)
    x, block = laid_out(everyone[rank], layout), laid_out(everyone[rank][mine], layout)
    scatter, gather, swap = (
        {"algorithm": offered(world, algorithm, each), "asynchronous": asynchronous}
        for each in ("reduce_scatter", "all_gather", "all_to_all")
    )
    lengths = (rows, size * rows, size * rows)
    outs = [laid_out(np.zeros((n, *tail), dtype), layout) if out else None for n in lengths]
    results = [
        world.reduce_scatter(x, op, out=outs[0], **scatter),
        world.allgather(block, out=outs[1], **gather),
        world.all_to_all(x, out=outs[2], **swap),
    ]
    if asynchronous:
        results = [handle.wait() for handle in results]
    scattered, gathered, exchanged = results

    def check() -> None:
        assert not out or all(got is its for got, its in zip(results, outs, strict=True))
        assert_close(scattered, [e[mine] for e in everyone], op)
        blocks = [e[r * rows : (r + 1) * rows] for r, e in enumerate(everyone)]
        np.testing.assert_array_equal(gathered, np.concatenate(blocks))
        np.testing.assert_array_equal(exchanged, np.concatenate([e[mine] for e in everyone]))
        assert x.tobytes() == everyone[rank].tobytes()

    agreed(placement, check)


@ranks
@settings(max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES), shape=shapes, algorithm=algorithm_names, data=st.data(),
    place=places,
)  # fmt: skip
def test_broadcast(
    placed_worlds: Places,
    place: int,
    dtype: Any,
    shape: tuple[int, ...],
    algorithm: str,
    data: st.DataObject,
) -> None:
    placement, world = placed_worlds[place % len(placed_worlds)]
    algorithm = offered(world, algorithm, "broadcast")
    root = data.draw(st.integers(0, world.size - 1))
    x = laid_out(values(world.rank, shape, dtype, 3), data.draw(st.sampled_from(LAYOUTS)))
    assert world.broadcast(x, root, algorithm=algorithm) is x
    expected = values(root, shape, dtype, 3)
    agreed(placement, lambda: np.testing.assert_array_equal(x, expected))


@ranks
def test_zero_dimensional_arrays_gather_to_a_vector() -> None:
    world = mpizero.init()
    got = world.allgather(np.array(world.rank))
    assert got.shape == (world.size,) and (got == np.arange(world.size)).all()


@ranks
def test_scalars_come_back_as_scalars() -> None:
    world = mpizero.init()
    total = world.size * (world.size + 1) // 2
    assert world.allreduce(world.rank + 1) == total and type(world.allreduce(1)) is int
    assert type(world.allreduce(0.5)) is float
    got = world.allreduce(np.float32(2), "mean")
    assert got == 2 and type(got) is np.float32
    with pytest.raises(mpizero.ArgumentError, match="scalar"):
        world.allreduce(1.0, asynchronous=True)


class Lent:
    """An object that shares memory by DLPack alone."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


@ranks
def test_arrays_of_other_libraries() -> None:
    world = mpizero.init()
    numbers = stdlib_array.array("d", [1.0, 2.0])
    assert world.allreduce(numbers) is numbers
    assert list(numbers) == [world.size, 2 * world.size]
    octets = bytearray(b"\x01\x02")
    world.allreduce(memoryview(octets), "max")
    assert octets == b"\x01\x02"
    lent = np.arange(3.0)
    world.allreduce(Lent(lent))
    assert (lent == np.arange(3.0) * world.size).all()
    with pytest.raises(mpizero.ArgumentError, match="list"):
        world.allreduce([1, 2])
    with pytest.raises(mpizero.ArgumentError, match="object"):
        world.allreduce(np.array([None]))


@several_ranks
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_nan_is_passed_on_by_every_algorithm(algorithm: str, dtype: Any) -> None:
    world = mpizero.init()
    for op in ("max", "min"):
        x = np.ones(5, dtype)
        x[world.rank] = np.nan
        world.allreduce(x, op, algorithm=algorithm)
        expected = [r < world.size for r in range(5)]
        assert np.isnan(x.astype(np.float32)).tolist() == expected


@several_ranks
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_same_call_twice_gives_the_same_bits(algorithm: str, dtype: Any) -> None:
    world = mpizero.init()
    first, second = (
        world.allreduce(values(world.rank, (70_001,), dtype, 1), algorithm=algorithm)
        for _ in range(2)
    )
    assert first.tobytes() == second.tobytes()
    assert len(set(world.gather_objects(first.tobytes()))) == 1


@several_ranks
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.complex128])
def test_messages_above_the_largest_are_cut(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_MESSAGE_BYTES", 64)
    world = mpizero.init()
    size, rank = world.size, world.rank
    everyone = [values(r, (size * 37,), dtype, 2) for r in range(size)]
    mine = slice(rank * 37, (rank + 1) * 37)
    for algorithm in ("native", "ring", "halving_doubling"):
        assert_close(world.allreduce(everyone[rank].copy(), algorithm=algorithm), everyone, "sum")
        got = world.reduce_scatter(everyone[rank], algorithm=algorithm)
        assert_close(got, [e[mine] for e in everyone], "sum")
        gathered = world.allgather(everyone[rank], algorithm=algorithm)
        assert (gathered == np.concatenate(everyone)).all()
        sent = everyone[rank].copy()
        world.broadcast(sent, size - 1, algorithm=algorithm)
        assert (sent == everyone[-1]).all()
        if algorithm != "halving_doubling":
            got = world.all_to_all(everyone[rank], algorithm=algorithm)
            assert (got == np.concatenate([e[mine] for e in everyone])).all()


@several_ranks
@pytest.mark.parametrize("algorithm", ["ring", "halving_doubling"])
def test_bytes_sent_over_mpi_are_the_formulas(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = 0
    exchange = transport.MpiTransport.exchange

    def counting(self: Any, outgoing: Any, to: Any, incoming: Any, source: Any) -> None:
        nonlocal sent
        sent += outgoing.nbytes if to is not None else 0
        exchange(self, outgoing, to, incoming, source)

    monkeypatch.setattr(transport.MpiTransport, "exchange", counting)
    world = mpizero.init()
    x = np.ones(world.size * 1000, np.float32)
    world.allreduce(x, algorithm=algorithm)
    optimum = 2 * (world.size - 1) * x.nbytes // world.size
    everyones = world.gather_objects(sent)
    assert sum(everyones) == optimum * world.size
    if algorithm == "ring":
        assert set(everyones) == {optimum}


@ranks
@pytest.mark.parametrize("mode", ["thread", "inline"])
def test_handles_in_flight(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIZERO_PROGRESS", mode)
    world = mpizero.init().split(0)
    assert world is not None and world.overlaps == (mode == "thread")
    arrays = [np.full(100 + i, float(world.rank + i)) for i in range(20)]
    handles = [world.allreduce(a, asynchronous=True) for a in arrays]
    blocking = world.allreduce(np.ones(3))  # may overtake them
    assert (blocking == world.size).all()
    while not handles[7].done():
        pass
    for i in reversed(range(20)):
        expected = sum(r + i for r in range(world.size))
        assert handles[i].wait() is arrays[i]
        assert (arrays[i] == expected).all()
        assert handles[i].done() and handles[i].wait() is arrays[i]
    world.close()


@ranks
def test_out_of_another_form_is_refused() -> None:
    world = mpizero.init()
    x = np.ones((world.size * 2, 3), np.float32)
    for out in (np.empty((1, 3), np.float32), np.empty((world.size * 2, 3))):
        with pytest.raises(mpizero.ArgumentError, match="out"):
            world.allreduce(x, out=out)
        with pytest.raises(mpizero.ArgumentError, match="out"):
            world.allgather(x, out=out)
    if world.size > 1:
        with pytest.raises(mpizero.ArgumentError, match="memory of x"):
            world.all_to_all(x, out=x)


class Spy:
    """A communicator that notes the bytes of each message it is given."""

    def __init__(self, comm: Any) -> None:
        self._comm, self.rank, self.size = comm, comm.rank, comm.size
        self.nbytes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._comm, name)

        def noting(*arguments: Any) -> Any:
            for argument in arguments:
                buffer = argument[0] if isinstance(argument, list) else argument
                if isinstance(buffer, np.ndarray):
                    self.nbytes.append(buffer.nbytes)
            return method(*arguments)

        return noting


@several_ranks
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.complex128])
def test_no_message_is_above_the_largest(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_MESSAGE_BYTES", 64)
    world = mpizero.init()
    spy = Spy(world.comm)
    ends: Any = transport.MpiTransport(spy, world.device)  # type: ignore[arg-type]
    for each in (Native(spy, world.device), Ring(ends), HalvingDoubling(ends)):  # type: ignore[arg-type]
        op = operation("sum", np.dtype(dtype), world.size, "test")
        wide, block = np.ones(world.size * 37, dtype), np.empty(37, dtype)
        each.reduce_scatter(wide, block, op)
        each.all_gather(block, wide)
        assert (wide == world.size).all()
        each.all_reduce(wide, op)
        each.broadcast(wide, world.size - 1)
        if each.offers("all_to_all"):
            each.all_to_all(wide, np.empty_like(wide))
        assert spy.nbytes and max(spy.nbytes) <= 64
        spy.nbytes.clear()


@several_ranks
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_blocking_calls_beside_a_thread_that_communicates(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPIZERO_PROGRESS", "thread")
    world = mpizero.init().split(0)
    assert world is not None and world.overlaps
    total = sum(range(world.size))
    arrays, handles = [], []
    for number, count in enumerate((10, 3000, 300_000) * 2):
        allocate = world.allocate if number % 2 else np.zeros
        array = allocate(count, np.float32)
        array[...] = world.rank + number
        arrays.append(array)
        handles.append(world.allreduce(array, asynchronous=True, algorithm=algorithm))
        blocking = world.allreduce(np.full(count, world.rank, np.float16), algorithm=algorithm)
        assert (blocking == total).all()
    for number, (array, handle) in enumerate(zip(arrays, handles, strict=True)):
        handle.wait()
        assert (array == total + number * world.size).all()
    world.close()


@ranks
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_cannot_be_summed_can_be_moved(algorithm: str) -> None:
    world = mpizero.init()
    for mine in (
        np.array(["2020-01-01", "2021-06-30"], "M8[D]") + world.rank,
        np.array([(world.rank, 0.5)], [("a", "i4"), ("b", "f8")]),
        np.array([f"r{world.rank}", "x"]),
    ):
        everyone = np.concatenate(world.gather_objects(mine))
        assert (world.allgather(mine, algorithm=algorithm) == everyone).all()
        with pytest.raises(mpizero.ArgumentError, match="op"):
            world.allreduce(mine)


@ranks
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", ["f4", "i8", "f2"])
def test_foreign_byte_order_is_summed_or_refused(algorithm: str, dtype: str) -> None:
    world = mpizero.init()
    x = np.arange(3).astype(np.dtype(dtype).newbyteorder())
    with contextlib.suppress(mpizero.ArgumentError):
        world.allreduce(x, algorithm=algorithm)
        assert (x.astype(float) == np.arange(3) * world.size).all()
