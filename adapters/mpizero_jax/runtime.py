"""``init``: the core's, and what jax needs beside it; the ranks as compiled programs have them."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import jax

import mpizero
from mpizero import LaunchError, World
from mpizero.adapting import thread_level

if TYPE_CHECKING:
    from mpi4py import MPI


def init(comm: MPI.Intracomm | None = None, *, timeout: float | None = None) -> World:
    """Start MPI and return the World; call it before jax computes anything.

    Collective; safe to call twice. Programs on the CPU are carried out by the thread that starts
    them from here on (``jax_cpu_enable_async_dispatch``), if jax has not begun to compute. Raises
    what ``mpizero.init`` raises, and LaunchError where MPI may not be called by several threads.
    """
    world = mpizero.init(comm, timeout=timeout)
    with suppress(AttributeError):  # of a jax that knows no such option
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    ranks(world)
    return world


def ranks(world: World | None) -> World:
    """The same ranks, for what compiled programs call. Collective when it is new.

    XLA calls from threads of its own: with communicators of their own its calls have an order of
    their own, and never meet those that the program makes by itself.
    """
    world = world if world is not None else mpizero.init()
    level = thread_level()
    if world.size > 1 and level != "multiple":
        raise LaunchError(
            f"init(): MPI runs with thread level '{level}', and XLA calls from threads of its own: "
            "it needs 'multiple'. Leave MPIZERO_THREAD_LEVEL unset, and take an MPI that has it."
        )
    return world.part("jax", 0)
