"""Ranks on nodes in every way: one after the other, in turn, mixed, unevenly, and numbered anew.

Nodes are emulated (``MPIZERO_NODES``), for a World and what is made of it: so one launch tries them
all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest
from mpi4py import MPI

import mpizero
from mpizero import World

NODES = "MPIZERO_NODES"


@dataclass(frozen=True)
class Placement:
    """``names[r]`` is the node of the job's rank r; ``order``: the job's ranks as the World's."""

    names: str
    order: tuple[int, ...]

    @property
    def node_of(self) -> list[str]:
        """The node of each of the World's ranks."""
        return [self.names[rank] for rank in self.order]

    def __str__(self) -> str:
        numbered = "" if list(self.order) == sorted(self.order) else f" as {self.order}"
        return f"{self.names}{numbered}"


_NAMES = {
    1: ["A"],
    2: ["AA", "AB"],
    3: ["AAA", "AAB", "ABA", "ABB", "ABC"],
    # In blocks, in turn, mirrored, uneven with the odd one last and second; three, and four nodes.
    4: ["AAAA", "AABB", "ABAB", "ABBA", "AAAB", "ABAA", "ABBC", "ABCD"],
}
_NUMBERED_ANEW: dict[int, list[tuple[str, tuple[int, ...]]]] = {
    2: [("AB", (1, 0))],
    3: [("AAB", (2, 0, 1)), ("ABB", (1, 0, 2))],
    4: [("AABB", (0, 2, 3, 1)), ("AAAB", (3, 0, 1, 2))],
}


def placements(size: int) -> list[Placement]:
    """Those that are tried with so many ranks."""
    plain = [Placement(names, tuple(range(size))) for names in _NAMES[size]]
    return plain + [Placement(*each) for each in _NUMBERED_ANEW.get(size, [])]


# Of a launch: what its tests are parametrized with. Other launches have others.
HERE = placements(MPI.COMM_WORLD.size) if MPI.COMM_WORLD.size in _NAMES else []
SEVERAL_NODES = [each for each in HERE if len(set(each.names)) > 1]


@contextmanager
def placed(placement: Placement) -> Iterator[World]:
    """A World of all ranks, on these nodes; what is made of it meanwhile is, too. Collective."""
    with pretended(placement.names):
        world = mpizero.init().subworld(placement.order)
        assert world is not None
        yield world
        world.close()  # not where a test has failed: others may be waiting elsewhere


@contextmanager
def pretended(names: str) -> Iterator[None]:
    """The job's ranks lie on nodes of these names, for Worlds that are made meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MPIZERO_RANKS_PER_NODE", raising=False)
        patch.setenv(NODES, ",".join(names))
        yield


@contextmanager
def placed_in_all_ways() -> Iterator[list[tuple[Placement, World]]]:
    """A World for every placement, for collectives: no other Worlds are to be made of them."""
    with ExitStack() as stack:
        worlds = []
        for each in HERE:
            with pretended(each.names):
                world = mpizero.init().subworld(each.order)
            assert world is not None
            worlds.append((each, world))
            stack.callback(world.close)
        yield worlds
