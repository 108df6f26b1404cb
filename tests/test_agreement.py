"""Ranks that do not do the same: every rank is told, by name, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import mpizero
from mpizero import ArgumentError, MismatchError, World
from support.launch import mpirun

several_ranks = pytest.mark.parallel([2, 3, 4])

Call = Callable[[World], Any]


def read_only() -> np.ndarray:
    array = np.ones(3)
    array.flags.writeable = False
    return array


# (what the last rank does, what the others do, what the message says of the last rank)
DIFFERENCES: dict[str, tuple[Call, Call, str]] = {
    "shape": (
        lambda w: w.allreduce(np.ones(4)),
        lambda w: w.allreduce(np.ones(3)),
        r"allreduce\(float64, shape \(4,\)",
    ),
    "shape of equal size": (
        lambda w: w.allreduce(np.ones((2, 3))),
        lambda w: w.allreduce(np.ones((3, 2))),
        r"shape \(2, 3\)",
    ),
    "dtype": (
        lambda w: w.allreduce(np.ones(3, np.float32)),
        lambda w: w.allreduce(np.ones(3, np.int32)),
        "float32",
    ),
    "op": (lambda w: w.allreduce(np.ones(3), "max"), lambda w: w.allreduce(np.ones(3)), "max"),
    "algorithm": (
        lambda w: w.allreduce(np.ones(3), algorithm="ring"),
        lambda w: w.allreduce(np.ones(3)),
        "ring",
    ),
    "root": (
        lambda w: w.broadcast(np.ones(3), 1),
        lambda w: w.broadcast(np.ones(3), 0),
        r"broadcast.*1",
    ),
    "collective": (lambda w: w.barrier(), lambda w: w.allgather(np.ones(3)), "barrier"),
    "scalar type": (lambda w: w.allreduce(1), lambda w: w.allreduce(1.0), "int64"),
}

REFUSALS: dict[str, tuple[Call, str]] = {
    "read-only": (lambda w: w.allreduce(read_only()), "read-only"),
    "no array": (lambda w: w.allreduce("text"), "str"),
    "unknown op": (lambda w: w.allreduce(np.ones(3), "median"), "median"),
    "mean of integers": (lambda w: w.allreduce(np.ones(3, int), "mean"), "mean"),
    "largest complex number": (lambda w: w.allreduce(np.ones(3, complex), "max"), "max"),
    "unknown algorithm": (lambda w: w.allreduce(np.ones(3), algorithm="magic"), "magic"),
    "indivisible": (lambda w: w.reduce_scatter(np.ones(w.size + 1)), "multiple"),
    "root": (lambda w: w.broadcast(np.ones(3), w.size), "root"),
    "out": (lambda w: w.allreduce(np.ones(3), out=np.ones(4)), "out"),
}


@several_ranks
@pytest.mark.parametrize("case", DIFFERENCES)
def test_differences_are_named_on_every_rank(case: str) -> None:
    world = mpizero.init()
    last, others, message = DIFFERENCES[case]
    with pytest.raises(MismatchError, match=rf"rank {world.size - 1}: .*{message}") as caught:
        (last if world.rank == world.size - 1 else others)(world)
    assert ("rank 0:" if world.size == 2 else "ranks 0") in str(caught.value)
    assert world.allreduce(1) == world.size  # and the world goes on


@several_ranks
@pytest.mark.parametrize("case", REFUSALS)
def test_what_one_rank_refuses_the_others_hear_of(case: str) -> None:
    world = mpizero.init()
    call, message = REFUSALS[case]
    if world.rank == 0:
        with pytest.raises(ArgumentError, match=message):
            call(world)
    else:
        with pytest.raises(MismatchError, match=rf"rank 0: refused: .*{message}"):
            world.allreduce(np.ones(3))
    assert world.allreduce(1) == world.size


@several_ranks
def test_asynchronous_differences_are_raised_by_wait() -> None:
    world = mpizero.init()
    handle = world.allreduce(np.ones(3 + (world.rank == 0)), asynchronous=True)
    with pytest.raises(MismatchError, match=r"rank 0: .*\(4,\)"):
        handle.wait()
    good = world.allreduce(np.ones(3), asynchronous=True)
    assert (good.wait() == world.size).all()


@several_ranks
def test_asynchronous_refusals() -> None:
    world = mpizero.init()
    if world.rank == 0:
        with pytest.raises(ArgumentError, match="read-only"):
            world.allreduce(read_only(), asynchronous=True)
    else:
        with pytest.raises(MismatchError, match="rank 0: refused"):
            world.allreduce(np.ones(3), asynchronous=True).wait()


@several_ranks
def test_long_descriptions_name_the_first_difference() -> None:
    world = mpizero.init()
    items = [f"item {i}" for i in range(50)]
    world.agree(items, "things")
    if world.rank == 0:
        items[30] = "something else"
    with pytest.raises(MismatchError, match=r"things.*item 30(.|\n)*rank 0: something else"):
        world.agree(items, "things")
    with pytest.raises(MismatchError, match="nothing more"):
        world.agree(["a"] * (3 if world.rank else 2), "things")


# In a job of its own each: where the others are not told, they wait for ever.
@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ('world.allreduce(np.ones(3), ["sum"])', "world.allreduce(np.ones(3))"),
        ('world.broadcast(np.ones(3), root="0")', "world.broadcast(np.ones(3))"),
        (
            "world.allreduce(1.0, asynchronous=True)",
            "world.allreduce(np.ones(()), asynchronous=True).wait()",
        ),
        ("world.split(-1)", "world.split(0)"),
    ],
)
def test_others_hear_of_a_refusal_that_its_rank_survives(bad: str, good: str) -> None:
    program = f"""
        import numpy as np, mpizero
        world = mpizero.init()
        try:
            {bad} if world.rank == 0 else {good}
        except mpizero.MismatchError as error:
            assert world.rank > 0 and "rank 0: refused" in str(error)
            print("told")
        except (mpizero.ArgumentError, TypeError):
            assert world.rank == 0
        assert world.allreduce(1) == world.size
    """
    result = mpirun(3, program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("told") == 2


def test_refusals_on_one_rank_of_several_nodes_are_heard() -> None:
    """What a refusal looks up must not wait for the other ranks."""
    program = """
        import numpy as np, mpizero
        world = mpizero.init()
        assert world.node_count == 2
        try:
            world.allreduce(np.ones(3), algorithm="magic" if world.rank == 0 else "auto")
        except mpizero.MismatchError as error:
            assert world.rank > 0 and "magic" in str(error)
        except mpizero.ArgumentError:
            assert world.rank == 0
        if world.rank == 0:
            assert "hierarchical" in world.algorithms("all_reduce")
        assert world.allreduce(1) == world.size
        print("told")
    """
    result = mpirun(4, program, timeout=20, env={"MPIZERO_RANKS_PER_NODE": "2"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("told") == 4
