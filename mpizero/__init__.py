"""mpizero: distributed deep-learning training over MPI, in Python.

The layers, lowest first (a layer imports only from those above it in this list):

=================  ==============================================================================
``errors``         the exceptions
``world``          ranks, nodes, devices; starting and aborting MPI
``diagnostics``    what each rank does, for all to see; the watchdog that reads it
``memory``         arrays of any library as flat memory; dtypes; staging for devices
``reduction``      summing blocks of memory
``collectives``    all-reduce and its kin: one file per algorithm, one that chooses
``progress``       asynchronous handles and the thread that overlaps
``api``            ``init``, ``World``, meshes: what users hold
``layout``         names and shapes in flat memory
``sharded``        named arrays of which every rank keeps 1/n
``optim``          optimizers on them, for training without a framework
``sampling``       which samples a rank trains on
``engine``         gradient buckets and their reduction, told by an adapter what is ready
``checkpoint``     all of that on disk, and back on any number of ranks
``elastic``        going on when ranks die
``preemption``     leaving in time, when the scheduler is about to stop the job
``adapting``       what adapters build on: their door to all of this
``measure``        timing collectives
``cli``            the command ``mpizero``
=================  ==============================================================================

Importing this package does not start MPI; ``init()`` does.
"""

from __future__ import annotations

from mpizero import optim
from mpizero.api import Mesh, World, init, mesh
from mpizero.errors import (
    ArgumentError,
    CheckpointError,
    LaunchError,
    MismatchError,
    MpizeroError,
    RankDiedError,
)
from mpizero.preemption import PreemptionGuard
from mpizero.progress import Handle
from mpizero.sharded import ShardedState

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "Handle",
    "LaunchError",
    "Mesh",
    "MismatchError",
    "MpizeroError",
    "PreemptionGuard",
    "RankDiedError",
    "ShardedState",
    "World",
    "init",
    "mesh",
    "optim",
]
