"""Collectives with ranks on nodes in any order and number: by every algorithm, against numpy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from pytest_mpi import parallel_assert

import mpizero
from mpizero import World
from support.cases import assert_close, values
from support.launch import mpirun
from support.placements import HERE, SEVERAL_NODES, Placement, placed, pretended

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])

# Empty, less than one each, not a multiple of anything, more than is sent with a note.
SMALL = [
    (0, np.float32), (1, np.float64), (5, np.float32), (1003, np.float16), (37, np.int64),
    (17_001, np.float32),
]  # fmt: skip
# Just above a MiB, what "auto" gives to the MPI library, and ranks of a node show each other at a
# time. Of the algorithms, these two go by nodes.
LARGE = [(150_007, np.float64), (600_011, ml_dtypes.bfloat16)]
BY_NODES = ("auto", "hierarchical")


@pytest.fixture(params=HERE, ids=str)
def placement(request: pytest.FixtureRequest) -> Placement:
    found: Placement = request.param
    return found


@pytest.fixture
def world(placement: Placement) -> Iterator[World]:
    with placed(placement) as found:
        yield found


def cases(world: World, collective: str) -> Iterator[tuple[int, Any, str]]:
    """Sizes, dtypes and algorithms."""
    for algorithm in ("auto", *world.algorithms(collective)):
        for count, dtype in (*SMALL, *(LARGE if algorithm in BY_NODES else ())):
            yield count, dtype, algorithm


@cache
def numbers(rank: int, count: int, dtype: Any) -> np.ndarray:
    """Small whole numbers, other ones on each rank, whose sums are exact in every dtype."""
    return np.random.default_rng((rank, count)).integers(-8, 9, count).astype(dtype)


@cache
def everyones(size: int, count: int, dtype: Any) -> np.ndarray:
    return np.stack([numbers(rank, count, dtype) for rank in range(size)])


@cache
def total(size: int, count: int, dtype: Any) -> np.ndarray:
    return everyones(size, count, np.int64).sum(axis=0).astype(dtype)


def check(got: Any, expected: Any, *what: Any) -> None:
    """Fail on all ranks if it fails on one, so that none waits for another."""
    same = got.dtype == expected.dtype and np.array_equal(got, expected)
    parallel_assert(same, f"rank {mpizero.init().rank}: {what} differs")


def part(array: np.ndarray, world: World) -> np.ndarray:
    """What of an array is this rank's."""
    each = array.shape[-1] // world.size
    return array[..., world.rank * each : (world.rank + 1) * each]


@ranks
def test_where_ranks_are(world: World, placement: Placement) -> None:
    names, rank = placement.node_of, world.rank
    assert world.job_ranks == placement.order
    mine = tuple(r for r, name in enumerate(names) if name == names[rank])
    assert world.node_ranks == mine == world.nodes[world.node_index]
    assert (world.local_rank, world.local_size) == (mine.index(rank), len(mine))
    assert sorted(r for each in world.nodes for r in each) == list(range(world.size))
    assert [each[0] for each in world.nodes] == sorted(names.index(name) for name in {*names})
    assert world.node_leaders == tuple(each[0] for each in world.nodes)
    assert world.node_count == len({*names}) and world.is_leader == (mine[0] == rank)
    assert world.even_nodes == (len({names.count(name) for name in names}) == 1)
    assert world.node.gather_objects(rank) == list(mine)
    array = world.node.allocate(1000, np.float64)
    shared = world.node.counterparts(array)
    assert len(mine) == 1 or (shared is not None and len(shared) == len(mine))


@several_ranks
def test_sub_worlds_are_on_the_nodes_of_their_ranks(world: World, placement: Placement) -> None:
    names = placement.node_of
    for some in ([world.size - 1, 0], list(range(1, world.size))):
        part = world.subworld(some)
        if part is not None:
            of_part = [names[rank] for rank in some]
            same = tuple(r for r, name in enumerate(of_part) if name == of_part[part.rank])
            assert part.node_ranks == same and part.node_count == len({*of_part})
            part.close()
    column = world.split(world.local_rank)  # of one rank of each node
    assert column is not None and column.node_count == column.size
    column.close()


@several_ranks
def test_all_reduce(world: World) -> None:
    for count, dtype, algorithm in cases(world, "all_reduce"):
        own, expected = numbers(world.rank, count, dtype), total(world.size, count, dtype)
        for x in (np.empty(count, dtype), world.allocate(count, dtype)):
            x[...] = own
            assert world.allreduce(x, algorithm=algorithm) is x
            check(x, expected, count, dtype, algorithm)
            x[...] = own
            world.allreduce(x, algorithm=algorithm, asynchronous=True).wait()
            check(x, expected, count, dtype, algorithm)


@several_ranks
@pytest.mark.parametrize("op", ["mean", "max", "product"])
def test_other_operations(world: World, op: str) -> None:
    """Numbers that are rounded: every rank gets the same bits, and always the same."""
    shared = [values(rank, (world.size * 700,), np.float32, 3) for rank in range(world.size)]
    x = shared[world.rank]
    for algorithm in ("auto", *world.algorithms("all_reduce")):
        got, again = (world.allreduce(x.copy(), op, algorithm=algorithm) for _ in range(2))
        assert_close(got, shared, op)
        assert {*world.gather_objects(got.tobytes())} == {again.tobytes()}
    for algorithm in ("auto", *world.algorithms("reduce_scatter")):
        got = world.reduce_scatter(x, op, algorithm=algorithm)
        assert_close(got, [part(each, world) for each in shared], op)


@several_ranks
def test_reduce_scatter(world: World) -> None:
    for count, dtype, algorithm in cases(world, "reduce_scatter"):
        count = -(-count // world.size) * world.size
        x = numbers(world.rank, count, dtype).copy()
        got = world.reduce_scatter(x, algorithm=algorithm)
        expected = part(total(world.size, count, dtype), world)
        check(got, expected, count, dtype, algorithm)
        check(x, numbers(world.rank, count, dtype), "the input")


@several_ranks
def test_all_gather(world: World) -> None:
    for count, dtype, algorithm in cases(world, "all_gather"):
        own, expected = numbers(world.rank, count, dtype), everyones(world.size, count, dtype)
        got = world.allgather(own[None], algorithm=algorithm)
        check(got, expected, count, dtype, algorithm)
        whole = np.zeros_like(expected)
        whole[world.rank] = own
        world.allgather(whole[world.rank : world.rank + 1], out=whole, algorithm=algorithm)
        check(whole, expected, count, dtype, algorithm, "in place")


@several_ranks
def test_broadcast_from_every_root(world: World) -> None:
    for count, dtype, algorithm in cases(world, "broadcast"):
        for root in range(world.size):
            x = numbers(world.rank, count, dtype).copy()
            world.broadcast(x, root, algorithm=algorithm)
            check(x, numbers(root, count, dtype), count, dtype, algorithm, root)


@several_ranks
def test_all_to_all(world: World) -> None:
    for count, dtype, algorithm in cases(world, "all_to_all"):
        count = -(-count // world.size) * world.size
        got = world.all_to_all(numbers(world.rank, count, dtype), algorithm=algorithm)
        expected = part(everyones(world.size, count, dtype), world).reshape(-1)
        check(got, expected, count, dtype, algorithm)


@several_ranks
def test_with_a_root(world: World) -> None:
    for count, dtype in (*SMALL, LARGE[0]):
        own, every = numbers(world.rank, count, dtype), everyones(world.size, count, dtype)
        for root in range(world.size):
            is_root = world.rank == root
            x = world.reduce(own.copy(), root)
            check(x, total(world.size, count, dtype) if is_root else own, count, dtype, root)
            gathered = world.gather(own[None], root)
            check(gathered if is_root else every, every, count, dtype, root)
            out = np.zeros((1, count), dtype)
            world.scatter(every if is_root else None, root, out=out)
            check(out[0], own, count, dtype, root)


@several_ranks
def test_of_uneven_parts(world: World) -> None:
    size, rank = world.size, world.rank
    for most in (3, 20_003):
        rows = [most * r // 2 for r in range(size)]  # rank 0 has none
        parts = [values(r, (rows[r], 3), np.float32, 8) for r in range(size)]
        check(world.allgather_uneven(parts[rank]), np.concatenate(parts), most)
        counts = [[(most * (a + 2 * b) // 3) % 9_000 for b in range(size)] for a in range(size)]
        sent = [values(a, (sum(counts[a]), 2), np.int32, 9) for a in range(size)]
        starts = [np.cumsum([0, *counts[a]]) for a in range(size)]
        expected = [sent[a][starts[a][rank] : starts[a][rank + 1]] for a in range(size)]
        got = world.all_to_all_uneven(sent[rank], counts[rank])
        check(got, np.concatenate(expected), most)


@several_ranks
def test_objects_and_messages(world: World, placement: Placement) -> None:
    assert world.gather_objects(("rank", world.rank)) == [("rank", r) for r in range(world.size)]
    for root in range(world.size):
        assert world.broadcast_object({"of": world.rank}, root) == {"of": root}
    following, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    sent = world.send(np.full(1000, world.rank), following, asynchronous=True)
    got = np.empty(1000, np.int64)
    world.recv(got, before)
    sent.wait()
    assert (got == before).all()


@several_ranks
@pytest.mark.parametrize("placement", SEVERAL_NODES, ids=str)
def test_what_uneven_nodes_offer(world: World) -> None:
    for collective, even_only in (("all_reduce", False), ("broadcast", False),
                                  ("all_gather", True), ("reduce_scatter", True)):  # fmt: skip
        offered = "hierarchical" in world.algorithms(collective)
        assert offered == (world.even_nodes or not even_only), collective


@several_ranks
def test_names_that_cannot_be_nodes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = mpizero.init()
    for names in ("A", "A" * (world.size + 1), "A " * world.size):
        with pretended(names), pytest.raises(mpizero.ArgumentError, match="one for each rank"):
            world.split(0)
    with pretended("A" * world.size):
        monkeypatch.setenv("MPIZERO_RANKS_PER_NODE", "2")
        with pytest.raises(mpizero.ArgumentError, match="Unset one of them"):
            world.split(0)
    for wrong in ("0", "-1", "two"):
        monkeypatch.setenv("MPIZERO_RANKS_PER_NODE", wrong)
        with pytest.raises(mpizero.ArgumentError, match="a number >= 1"):
            world.split(0)
    monkeypatch.delenv("MPIZERO_RANKS_PER_NODE")
    names = "AB"[world.rank == 0] * world.size
    with pretended(names), pytest.raises(mpizero.MismatchError, match=r"rank 0: .*NODES='B,"):
        world.split(0)
    assert world.allreduce(1) == world.size


def test_a_whole_job_on_nodes_that_are_named() -> None:
    program = """
        import mpizero
        world = mpizero.init()
        print(world.rank, world.nodes, world.allreduce(1), flush=True)
    """
    result = mpirun(3, program, env={"MPIZERO_NODES": "left, right,left"})
    assert result.returncode == 0, result.stderr
    for rank in range(3):
        assert f"{rank} ((0, 2), (1,)) 3" in result.stdout
