"""The algorithms' logic, for 2 to 33 ranks, in one process; and how much they send."""

from __future__ import annotations

from math import ceil, log2

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpizero.collectives.halving_doubling import HalvingDoubling
from mpizero.collectives.interface import TwoPhase
from mpizero.collectives.ring import Ring
from mpizero.reduction import operation
from support.cases import assert_close, reductions, values
from support.in_memory import InMemoryTransport, run_ranks

pytestmark = pytest.mark.once

algorithms = pytest.mark.parametrize("kind", [Ring, HalvingDoubling])
sizes = st.integers(2, 33)


@algorithms
@settings(max_examples=120, deadline=None)
@given(size=sizes, count=st.integers(0, 200), reduction=reductions, seed=st.integers(0, 9))
def test_all_reduce(
    kind: type[TwoPhase], size: int, count: int, reduction: tuple[str, np.dtype], seed: int
) -> None:
    name, dtype = reduction
    op = operation(name, dtype, size, "test")
    everyone = [values(r, (count,), dtype, seed) for r in range(size)]

    def program(transport: InMemoryTransport) -> np.ndarray:
        array = everyone[transport.rank].copy()
        kind(transport).all_reduce(array, op)
        return array

    results, _ = run_ranks(size, program)
    assert_close(results[0], everyone, name)
    for result in results:
        assert result.tobytes() == results[0].tobytes()
    again, _ = run_ranks(size, program)
    assert again[0].tobytes() == results[0].tobytes()


@algorithms
@settings(max_examples=60, deadline=None)
@given(size=sizes, each=st.integers(0, 20), reduction=reductions)
def test_reduce_scatter_and_all_gather(
    kind: type[TwoPhase], size: int, each: int, reduction: tuple[str, np.dtype]
) -> None:
    name, dtype = reduction
    op = operation(name, dtype, size, "test")
    everyone = [values(r, (size * each,), dtype, 1) for r in range(size)]

    def program(transport: InMemoryTransport) -> tuple[np.ndarray, np.ndarray]:
        own = everyone[transport.rank].copy()
        block, whole = np.empty(each, dtype), np.empty(size * each, dtype)
        kind(transport).reduce_scatter(own, block, op)
        assert own.tobytes() == everyone[transport.rank].tobytes()
        kind(transport).all_gather(block, whole)
        return block, whole

    results, _ = run_ranks(size, program)
    assert_close(np.concatenate([block for block, _ in results]), everyone, name)
    for _, whole in results:
        assert whole.tobytes() == b"".join(block.tobytes() for block, _ in results)


@algorithms
@settings(max_examples=60, deadline=None)
@given(size=sizes, count=st.integers(0, 100), data=st.data())
def test_broadcast(kind: type[TwoPhase], size: int, count: int, data: st.DataObject) -> None:
    root = data.draw(st.integers(0, size - 1))

    def program(transport: InMemoryTransport) -> np.ndarray:
        array = values(transport.rank, (count,), np.float32, 0)
        kind(transport).broadcast(array, root)
        return array

    results, _ = run_ranks(size, program)
    expected = values(root, (count,), np.float32, 0)
    assert all((result == expected).all() for result in results)


@settings(max_examples=30, deadline=None)
@given(size=sizes, each=st.integers(0, 9))
def test_ring_all_to_all(size: int, each: int) -> None:
    everyone = [values(r, (size * each,), np.int32, 0) for r in range(size)]

    def program(transport: InMemoryTransport) -> np.ndarray:
        out = np.empty(size * each, np.int32)
        Ring(transport).all_to_all(everyone[transport.rank], out)
        return out

    results, _ = run_ranks(size, program)
    for rank, result in enumerate(results):
        mine = slice(rank * each, (rank + 1) * each)
        assert (result == np.concatenate([e[mine] for e in everyone] or [result])).all()


def _traffic(kind: type[TwoPhase], size: int, method: str, dtype: object) -> tuple[list, list, int]:
    """Bytes and messages each rank sends, and the size of the data, for ``size`` blocks of 8."""
    op = operation("sum", dtype, size, "test")
    data = np.ones(size * 8, dtype)

    def program(transport: InMemoryTransport) -> None:
        algorithm = kind(transport)
        if method == "all_reduce":
            algorithm.all_reduce(data.copy(), op)
        elif method == "reduce_scatter":
            algorithm.reduce_scatter(data, np.empty(8, dtype), op)
        else:
            algorithm.all_gather(np.ones(8, dtype), np.empty(size * 8, dtype))

    _, network = run_ranks(size, program)
    return network.bytes_sent, network.messages_sent, data.nbytes


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 8, 12, 16, 23, 32, 33])
def test_ring_sends_the_optimum_from_every_rank(size: int) -> None:
    share = (size - 1) / size  # Patarasuk and Yuan 2009: no algorithm sends less
    for method, times in (("reduce_scatter", 1), ("all_gather", 1), ("all_reduce", 2)):
        sent, messages, nbytes = _traffic(Ring, size, method, np.float32)
        assert sent == [times * share * nbytes] * size
        assert messages == [times * (size - 1)] * size


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 8, 12, 16, 23, 32, 33])
def test_halving_doubling_sends_the_optimum_in_few_messages(size: int) -> None:
    share, steps = (size - 1) / size, ceil(log2(size))
    sent, messages, nbytes = _traffic(HalvingDoubling, size, "reduce_scatter", np.float32)
    assert sent == [share * nbytes] * size
    assert max(messages) <= steps
    sent, messages, nbytes = _traffic(HalvingDoubling, size, "all_gather", np.float32)
    assert sum(sent) == share * nbytes * size  # with uneven halves some send for others
    assert max(messages) <= 2 * steps
    if size & (size - 1) == 0:
        assert sent == [share * nbytes] * size and messages == [steps] * size
    sent, messages, nbytes = _traffic(HalvingDoubling, size, "all_reduce", np.float32)
    assert sum(sent) == 2 * share * nbytes * size
    assert max(messages) <= 3 * steps


@algorithms
def test_sixteen_bit_partial_sums_travel_as_float32(kind: type[TwoPhase]) -> None:
    sent, _, nbytes = _traffic(kind, 4, "all_reduce", ml_dtypes.bfloat16)
    # (n-1)/n of the data in float32 on the way to the sum, in 16 bits on the way back.
    assert sum(sent) / 4 == (2 + 1) * 3 / 4 * nbytes


@algorithms
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", ["max", "min"])
def test_nan_is_passed_on(kind: type[TwoPhase], dtype: object, name: str) -> None:
    def program(transport: InMemoryTransport) -> np.ndarray:
        array = np.ones(7, dtype)
        array[transport.rank] = np.nan
        kind(transport).all_reduce(array, operation(name, dtype, 5, "test"))
        return array

    for result in run_ranks(5, program)[0]:
        assert np.isnan(result.astype(np.float32)).tolist() == [True] * 5 + [False] * 2


@algorithms
@pytest.mark.parametrize("size", [2, 3, 5, 6, 7, 8, 13, 16, 31, 33])
def test_nobody_waits_in_a_circle_when_sends_wait_for_their_receivers(
    kind: type[TwoPhase], size: int
) -> None:
    op = operation("sum", np.float32, size, "test")
    total = size * (size + 1) // 2

    def program(transport: InMemoryTransport) -> None:
        algorithm, mine = kind(transport), transport.rank + 1
        for count in (2 * size + 1, 2):  # the second leaves most ranks without a block
            array = np.full(count, mine, np.float32)
            algorithm.all_reduce(array, op)
            assert (array == total).all()
        block, whole = np.empty(2, np.float32), np.empty(2 * size, np.float32)
        algorithm.reduce_scatter(np.full(2 * size, mine, np.float32), block, op)
        algorithm.all_gather(block, whole)
        assert (whole == total).all()
        for root in (0, size // 2, size - 1):
            array = np.full(size + 1, mine, np.float32)
            algorithm.broadcast(array, root)
            assert (array == root + 1).all()
        if isinstance(algorithm, Ring):
            algorithm.all_to_all(np.full(2 * size, mine, np.float32), whole)
            assert (whole == np.repeat(np.arange(size) + 1, 2)).all()

    run_ranks(size, program, rendezvous=True)
