"""Sub-worlds of some ranks, messages between two, and collectives with a root or uneven parts."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

import mpizero
from mpizero import World
from mpizero.collectives import transport
from support.cases import DTYPES, OPERATIONS, allowed, assert_close, values
from support.launch import mpirun

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])


def everyones(world: World, shape: tuple[int, ...], dtype: Any, seed: int = 0) -> list[np.ndarray]:
    return [values(rank, shape, dtype, seed) for rank in range(world.size)]


@ranks
def test_a_subworld_is_made_by_its_ranks_alone() -> None:
    world = mpizero.init()
    for number in range(1, world.size + 1):
        for some in itertools.combinations(range(world.size), number):
            if world.rank not in some:
                continue  # not even called
            listed = list(reversed(some))
            part = world.subworld(listed)
            assert part is not None
            assert part.size == number and listed[part.rank] == world.rank
            assert part.allreduce(world.rank) == sum(some)
            array = part.allocate(5000, np.float32)
            array[...] = world.rank
            assert (part.allreduce(array, asynchronous=True).wait() == sum(some)).all()
            assert part.gather_objects(world.rank) == listed
            del array
            part.close()
    assert world.subworld([(world.rank + 1) % world.size]) is None or world.size == 1


@ranks
def test_what_is_no_subworld_is_refused() -> None:
    world = mpizero.init()
    for wrong in ([], [0, 0], [world.size], [-1]):
        with pytest.raises(mpizero.ArgumentError, match="ranks"):
            world.subworld(wrong)
    if world.size > 1:
        turned = sorted(range(world.size), reverse=world.rank == 0)
        with pytest.raises(mpizero.MismatchError, match=r"subworld\("):
            world.subworld(turned)
    part = world.subworld(range(world.size))
    assert part is not None
    part.close()
    with pytest.raises(mpizero.LaunchError, match="closed"):
        part.subworld([part.rank])
    with pytest.raises(mpizero.LaunchError, match="closed"):
        part.send(np.ones(1), part.rank)


@several_ranks
def test_overlapping_subworlds_live_side_by_side() -> None:
    world = mpizero.init()
    pairs = list(itertools.combinations(range(world.size), 2))
    parts = {pair: world.subworld(pair) for pair in pairs if world.rank in pair}
    handles = [(p, w.allreduce(np.ones(3000), asynchronous=True)) for p, w in parts.items() if w]
    for _, handle in handles:
        assert (handle.wait() == 2).all()
    for part in parts.values():
        assert part is not None
        part.close()


@ranks
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_messages_of_every_dtype(dtype: Any) -> None:
    world = mpizero.init()
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    sent = world.send(values(world.rank, (3, 5), dtype, 1), to, asynchronous=True)
    got = np.zeros((3, 5), dtype)
    assert world.recv(got, source) == source
    assert sent is not None
    sent.wait()
    np.testing.assert_array_equal(got, values(source, (3, 5), dtype, 1))


@several_ranks
def test_messages_in_any_order_do_not_wait_for_each_other() -> None:
    world = mpizero.init()
    sizes = (0, 3, 200_000)  # the last one is larger than what MPIs send without being asked
    others = [rank for rank in range(world.size) if rank != world.rank]
    got = {(rank, tag): np.zeros(size) for rank in others for tag, size in enumerate(sizes)}
    handles = {
        (rank, tag): world.recv(got[rank, tag], rank, tag, asynchronous=True)
        for rank, tag in reversed(list(got))
    }
    for tag, size in enumerate(sizes):
        for rank in others:
            world.send(np.full(size, float(world.rank + tag)), rank, tag)
    world.barrier()
    for (rank, tag), handle in handles.items():
        assert handle.wait() == rank and handle.done()
        assert (got[rank, tag] == rank + tag).all()


@several_ranks
def test_a_collective_lets_a_large_message_through() -> None:
    """A sender that waits until its message is taken, by a rank that waits for it in a barrier."""
    world = mpizero.init()
    large = np.zeros(1_000_000)
    if world.rank == 0:
        handle = world.recv(large, 1, asynchronous=True)
    if world.rank == 1:
        world.send(large + 7, 0)
    world.allreduce(np.ones(10))
    if world.rank == 0:
        assert handle.wait() == 1 and (large == 7).all()


@several_ranks
def test_messages_from_any_rank_with_any_tag() -> None:
    world = mpizero.init()
    if world.rank:
        strided = np.arange(20.0)[::2] * world.rank
        world.send(strided, 0, tag=world.rank)
    else:
        senders = set()
        for _ in range(world.size - 1):
            got = np.zeros(20)[::2]
            sender = world.recv(got, None, None)
            assert (got == np.arange(0.0, 20.0, 2.0) * sender).all()
            senders.add(sender)
        assert senders == set(range(1, world.size))
    world.barrier()


@several_ranks
def test_messages_larger_than_a_count_can_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_MESSAGE_BYTES", 64)
    world = mpizero.init()
    if world.rank == 0:
        world.send(np.arange(50.0), 1)
    if world.rank == 1:
        got = np.zeros(50)
        assert world.recv(got) == 0 and (got == np.arange(50.0)).all()
    world.barrier()


@several_ranks
@pytest.mark.parametrize("size", [3, 5])
def test_a_message_of_another_size_is_a_mismatch(size: int) -> None:
    world = mpizero.init()
    if world.rank == 0:
        world.send(np.zeros(size), 1)
    if world.rank == 1:
        with pytest.raises(mpizero.MismatchError, match="32 bytes that x holds") as caught:
            world.recv(np.zeros(4), 0)
        assert "from rank 0" in str(caught.value)
    world.barrier()
    for argument in ({"to": world.size}, {"to": 0, "tag": -1}):
        with pytest.raises(mpizero.ArgumentError, match=r"to|tag"):
            world.send(np.zeros(1), **argument)
    with pytest.raises(mpizero.ArgumentError, match="source"):
        world.recv(np.zeros(1), world.size)


WAITING_FOR_A_MESSAGE = """
import numpy as np, mpizero
world = mpizero.init()
x = np.zeros(3)
if world.rank == 0:
    world.recv(x, 1, asynchronous=True).wait()
"""


def test_the_watchdog_knows_who_waits_for_a_message() -> None:
    result = mpirun(2, WAITING_FOR_A_MESSAGE, timeout=60)
    assert result.returncode != 0
    assert "rank 1 has come to the end of the program, and others wait" in result.stderr
    assert "recv(float64, shape (3,); from 1, 0)" in result.stderr


@ranks
@pytest.mark.parametrize("place", ["private", "shared"])
@pytest.mark.parametrize("count", [7, 60_001])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int64], ids=str)
def test_reduce(dtype: Any, count: int, place: str) -> None:
    world = mpizero.init()
    every = everyones(world, (count,), dtype)
    for root, op in ((0, "sum"), (world.size - 1, "mean"), (world.size // 2, "max")):
        if not allowed(op, dtype):
            continue
        x = world.allocate(count, dtype) if place == "shared" else np.zeros(count, dtype)
        x[...] = every[world.rank]
        assert world.reduce(x, root, op) is x
        if world.rank == root:
            assert_close(x, every, op)
        else:
            np.testing.assert_array_equal(x, every[world.rank])
        del x


@ranks
def test_gather_and_scatter() -> None:
    world = mpizero.init()
    for root, dtype in itertools.product(range(world.size), (np.float64, ml_dtypes.bfloat16)):
        every = everyones(world, (2, 3), dtype)
        whole = np.concatenate(every)
        found = world.gather(every[world.rank], root)
        assert (found is None) == (world.rank != root)
        if found is not None:
            np.testing.assert_array_equal(found, whole)
        part = np.zeros((2, 3), dtype)
        handle = world.scatter(
            whole if world.rank == root else None, root, out=part, asynchronous=True
        )
        assert handle.wait() is part
        np.testing.assert_array_equal(part, every[world.rank])
    number = world.gather(np.float32(world.rank + 1).reshape(()), 0)
    assert number is None or number.tolist() == list(range(1, world.size + 1))


@several_ranks
def test_rooted_calls_are_compared_and_refusals_heard() -> None:
    world = mpizero.init()
    for root in (world.rank, world.size):
        with pytest.raises((mpizero.MismatchError, mpizero.ArgumentError)):
            world.gather(np.ones(3), root)
    expected = mpizero.ArgumentError if world.rank == 0 else mpizero.MismatchError
    with pytest.raises(expected, match="x"):
        world.scatter(np.ones(3), 0, out=np.ones(1000))
    with pytest.raises(mpizero.MismatchError, match="rank 0"):
        world.reduce(np.ones(3 if world.rank else 4), 0)
    assert world.allreduce(1) == world.size


@ranks
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.bool_], ids=str)
def test_uneven_parts(dtype: Any) -> None:
    world = mpizero.init()
    me, size = world.rank, world.size
    every = [values(rank, (2 * rank, 3), dtype, 4) for rank in range(size)]
    np.testing.assert_array_equal(world.allgather_uneven(every[me]), np.concatenate(every))
    # Rank s sends s + r rows to rank r: numbers that say where they come from.
    counts = [[s + r for r in range(size)] for s in range(size)]
    x = values(me, (sum(counts[me]), 2), dtype, 5)
    starts = [[sum(row[:r]) for r in range(size)] for row in counts]
    expected = np.concatenate(
        [
            values(s, (sum(counts[s]), 2), dtype, 5)[starts[s][me] : starts[s][me] + s + me]
            for s in range(size)
        ]
    )
    incoming = [counts[s][me] for s in range(size)]
    np.testing.assert_array_equal(world.all_to_all_uneven(x, counts[me]), expected)
    out = np.zeros((sum(incoming), 2), dtype)
    handle = world.all_to_all_uneven(x, counts[me], out=out, out_counts=incoming, asynchronous=True)
    assert handle.wait() is out
    np.testing.assert_array_equal(out, expected)


@several_ranks
def test_uneven_counts_that_do_not_fit_are_a_mismatch_on_every_rank() -> None:
    world = mpizero.init()
    expected = [1] * world.size
    if world.rank == 0:
        expected[-1] = 2
    with pytest.raises(mpizero.MismatchError, match="expected were"):
        world.all_to_all_uneven(np.ones(world.size), [1] * world.size, out_counts=expected)
    with pytest.raises(mpizero.ArgumentError, match="counts"):
        world.all_to_all_uneven(np.ones(3), [5] * world.size)
    with pytest.raises(mpizero.MismatchError, match="rows of shape"):
        world.allgather_uneven(np.ones((2, 3 if world.rank else 4)))
    assert world.allreduce(1) == world.size


@ranks
@pytest.mark.parametrize("algorithm", ["auto", "native", "ring"])
def test_bitwise_operations(algorithm: str) -> None:
    world = mpizero.init()
    for dtype, op in itertools.product(DTYPES, ("band", "bor", "bxor")):
        every = [values(rank, (90,), dtype, 7) for rank in range(world.size)]
        if dtype.kind not in "iub":
            with pytest.raises(mpizero.ArgumentError, match="op"):
                world.allreduce(every[world.rank], op, algorithm=algorithm)
            continue
        function = {"band": np.bitwise_and, "bor": np.bitwise_or, "bxor": np.bitwise_xor}[op]
        got = world.allreduce(every[world.rank].copy(), op, algorithm=algorithm)
        np.testing.assert_array_equal(got, function.reduce(np.stack(every), axis=0))
    assert set(OPERATIONS) == {"sum", "mean", "max", "min", "product"}


@several_ranks
def test_messages_do_not_meet_those_of_other_worlds() -> None:
    world = mpizero.init()
    part = world.subworld(range(world.size))
    assert part is not None
    if world.rank == 0:
        part.send(np.array([1.0]), 1)
        world.send(np.array([2.0]), 1)
    if world.rank == 1:
        got = np.zeros(1)
        assert world.recv(got, None, None) == 0 and got[0] == 2.0
        assert part.recv(got, None, None) == 0 and got[0] == 1.0
    part.close()
    assert MPI.COMM_WORLD.allreduce(1) == world.size


@several_ranks
@pytest.mark.parametrize("count", [1, 5000, 200_000])
def test_in_order_a_call_may_block_on_one_rank_and_not_on_another(count: int) -> None:
    world = mpizero.init()
    part = world.subworld(range(world.size), in_order=True)
    assert part is not None and part.overlaps
    for step in range(12):
        arrays = [np.full(count, float(world.rank + at)) for at in range(3)]
        handles = []
        for at, array in enumerate(arrays):
            if (world.rank + step + at) % 3 == 0:
                part.allreduce(array)
            else:
                handles.append(part.allreduce(array, asynchronous=True))
        part.barrier()
        for handle in handles:
            handle.wait()
        total = sum(range(world.size))
        for at, array in enumerate(arrays):
            assert (array == total + at * world.size).all()
    part.close()


@ranks
@pytest.mark.parametrize("place", ["private", "shared"])
def test_allgather_in_place(place: str) -> None:
    world = mpizero.init()
    count = 3000
    whole = world.allocate(world.size * count, np.float32) if place == "shared" else None
    whole = np.zeros(world.size * count, np.float32) if whole is None else whole
    own = whole[world.rank * count : (world.rank + 1) * count]
    own[...] = world.rank + 1
    assert world.allgather(own, out=whole) is whole
    expected = np.repeat(np.arange(1, world.size + 1, dtype=np.float32), count)
    np.testing.assert_array_equal(whole, expected)
    if world.size > 1:
        with pytest.raises(mpizero.ArgumentError, match="out"):
            world.allgather(whole[1 : 1 + count], out=whole)
