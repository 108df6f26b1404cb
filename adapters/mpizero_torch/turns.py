"""One rank goes first, and the others wait: to download, unpack or prepare once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mpizero import World
from mpizero_torch.runtime import init


@contextmanager
def first(*, world: World | None = None) -> Iterator[bool]:
    """``with first():`` rank 0 does the block alone, then all other ranks do it at once.

    For what the first one leaves where the others find it, such as a download to a file system that
    all share. Gives True to the rank that goes first. Collective; nothing in the block may send
    something. If the block fails on rank 0 the others do not enter it: they get a MismatchError
    that quotes the error, and so does everyone else where it fails on a later rank. The others wait
    as in any call, for ``MPIZERO_TIMEOUT`` at most: raise it for what takes longer.
    """
    everyone = world if world is not None else init()
    with _in_turn(everyone, everyone, "first()") as goes_first:
        yield goes_first


@contextmanager
def first_on_node(*, world: World | None = None) -> Iterator[bool]:
    """``with first_on_node():`` one rank of each node does the block, then that node's others.

    As ``first``, for what each node has for itself, such as its local disk. An error on any node is
    told to all ranks of all nodes.
    """
    everyone = world if world is not None else init()
    with _in_turn(everyone, everyone.node, "first_on_node()") as goes_first:
        yield goes_first


@contextmanager
def _in_turn(everyone: World, group: World, what: str) -> Iterator[bool]:
    with everyone.together(what):
        if group.rank == 0:
            with group.telling():
                yield True
            group.barrier()
        else:
            group.barrier()
            yield False
