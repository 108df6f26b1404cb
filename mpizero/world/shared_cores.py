"""Threads of this process that have no core to themselves: they wait by sleeping, not by looking.

A thread that carries communication out beside the compute, where each rank has but one core, takes
from the compute what it burns while it waits for the others. (Measured with GPT-2 124M and stock
DDP, 2 ranks on 2 cores: looking all the time made the backward pass 1.5 times as long.)
"""

from __future__ import annotations

import threading

_threads: set[int] = set()


def share() -> None:
    """The calling thread shares its core with compute from now on."""
    _threads.add(threading.get_ident())


def shares() -> bool:
    """Does the calling thread?"""
    return threading.get_ident() in _threads


def leave() -> None:
    """The calling thread ends: its number may be given to another."""
    _threads.discard(threading.get_ident())
