"""``init`` and ``shutdown``, and what a rank may ask about where it is and what there is."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch

from mpizero import ArgumentError, World
from mpizero.world import survival
from mpizero_torch import runtime
from mpizero_torch.horovod import process_set as sets
from mpizero_torch.horovod.negotiation import Handle
from mpizero_torch.horovod.process_set import ProcessSet, add_process_set, global_process_set


def init(comm: Any = None, process_sets: Sequence[ProcessSet] | str | None = None) -> None:
    """Start MPI and bind this rank's device; a second time it does nothing. Collective.

    ``comm``: an mpi4py communicator, or a list of ranks of the job (these ranks alone call it), in
    place of all. ``process_sets``: sets to register, the same on all ranks; "dynamic" is taken, and
    always so. A job that was started to survive deaths (``mpirun --with-ft ulfm``) does, in
    functions under ``hvd.elastic.run``. Raises LaunchError as ``mz.init`` does.
    """
    if is_initialized():
        return
    sets.begin(_world(comm))
    if process_sets is None or process_sets == "dynamic":
        return
    if isinstance(process_sets, str):
        raise ArgumentError("hvd.init()", "process_sets", process_sets, "a list, or 'dynamic'")
    for each in process_sets:
        add_process_set(each)


def shutdown() -> None:
    """Forget the process sets, until ``init`` is called again. MPI goes on: it ends at exit."""
    sets.end()


def is_initialized() -> bool:
    """Has ``init`` been called, and ``shutdown`` not since?"""
    return global_process_set.process_set_id is not None


def rank() -> int:
    """This rank's number, from 0 to size - 1."""
    return global_process_set.world.rank


def size() -> int:
    """How many ranks there are."""
    return global_process_set.world.size


def local_rank() -> int:
    """This rank's number among those of its node."""
    return global_process_set.world.local_rank


def local_size() -> int:
    """How many ranks this node has."""
    return global_process_set.world.local_size


def cross_rank() -> int:
    """This rank's number among those that have the same ``local_rank``, each on its node."""
    return _same_place(global_process_set.world).index(rank())


def cross_size() -> int:
    """How many ranks have the same ``local_rank`` as this one: the nodes, where all are alike."""
    return len(_same_place(global_process_set.world))


def is_homogeneous() -> bool:
    """Has every node the same number of ranks?"""
    return global_process_set.world.even_nodes


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Wait until all ranks have come here."""
    negotiation = process_set.negotiation
    name = negotiation.name("barrier", None)
    negotiation.submit(Handle("barrier", name, "nothing", lambda world: None)).wait()


def join(device: int = -1) -> int:
    """This rank has no more data: take part in what the others reduce, until all have joined.

    Meanwhile it brings zeros to their sums and averages (which are divided by the number of all
    ranks), and no rows to their ``allgather``. Returns the rank that joined last. ``device`` is
    taken, and not needed.
    """
    return global_process_set.negotiation.join()


def mpi_threads_supported() -> bool:
    """May several threads call MPI at a time?"""
    return global_process_set.world.thread_level == "multiple"


def mpi_built() -> bool:
    """True: everything goes over MPI."""
    return True


def mpi_enabled() -> bool:
    """True: everything goes over MPI."""
    return True


def gloo_built() -> bool:
    """False: there is no Gloo in here."""
    return False


def gloo_enabled() -> bool:
    """False: there is no Gloo in here."""
    return False


def nccl_built() -> int:
    """0: there is no NCCL in here."""
    return 0


def ddl_built() -> bool:
    """False: there is no IBM DDL in here."""
    return False


def ccl_built() -> bool:
    """False: there is no Intel oneCCL in here."""
    return False


def rocm_built() -> bool:
    """False: AMD's GPUs are not supported."""
    return False


def cuda_built() -> bool:
    """Can tensors on NVIDIA's GPUs be reduced here (a torch with CUDA, and CuPy)?"""
    return torch.version.cuda is not None and importlib.util.find_spec("cupy") is not None


def _same_place(world: World) -> list[int]:
    """The ranks that have this one's place on their nodes."""
    place = world.local_rank
    return sorted(ranks[place] for ranks in world.nodes if len(ranks) > place)


def _world(comm: Any) -> World:
    if isinstance(comm, Sequence):
        part = _world(None).subworld([int(each) for each in comm])
        if part is None:
            raise ArgumentError("hvd.init()", "comm", f"{list(comm)}", "ranks, this one among them")
        return part
    if comm is None and survival.is_offered(os.environ):
        try:
            return runtime.init(elastic=True)
        except ArgumentError:  # a World came before, which would not survive
            return runtime.init()
    return runtime.init(comm)
