"""Where the worker processes of loaders come from."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import resource_tracker, spawn
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch.utils.data import DataLoader

from mpizero import ArgumentError
from mpizero.world.children import leave_scripts_alone


def fork_server() -> Any:
    """A context for ``multiprocessing`` that is fit for a rank.

    Forked children of an MPI process may crash or hang (they share its connections); a fork server
    is a fresh process that never had any. It imports torch once, rather than each worker in each
    epoch (0.1 s instead of 10 s for two workers on two cores). What has been set up to be imported
    stays if the server runs already. Scripts that would train when they are imported are left out.
    """
    leave_scripts_alone()
    with suppress(AttributeError, OSError):  # then without
        _start_tracker()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "torch", "mpizero_torch.data.reading"])
    return context


def begin(loader: DataLoader[Any]) -> Iterator[Any]:
    """``iter(loader)``. ArgumentError for what its workers need, and cannot be sent to them."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Got pickle error")  # torch's guess at the cause
            return iter(loader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        for name in ("collate_fn", "worker_init_fn", "dataset") if loader.num_workers else ():
            value = getattr(loader, name)
            if not _can_be_sent(value):
                raise ArgumentError(
                    "mz.shard()", name, f"{value!r}, with num_workers={loader.num_workers}",
                    "what can be pickled",
                    "It is sent to worker processes, which are no copies of a rank: forked from "
                    "one they might hang. Define functions and classes at the top of a module (not "
                    f"as lambda, nor within a function), or load with num_workers=0. ({error})",
                ) from error  # fmt: skip
        raise


def _can_be_sent(value: Any) -> bool:
    try:
        ForkingPickler.dumps(value)
    except Exception:
        return False
    return True


def _start_tracker() -> None:
    """Start Python's resource tracker so that it outlives a launcher's way to end a job.

    It removes the semaphores of queues, which have names in /dev/shm, when their processes are
    gone. A launcher kills a rank's whole group of processes; so the tracker gets one of its own. It
    ends when the last process that could use it has.
    """
    tracker: Any = resource_tracker._resource_tracker
    if tracker._fd is not None or not hasattr(tracker, "_pid"):
        return
    read, write = os.pipe()
    try:
        program = f"from multiprocessing.resource_tracker import main; main({read})"
        process = subprocess.Popen(
            [os.fspath(spawn.get_executable()), "-c", program], pass_fds=[read],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    except OSError:
        os.close(write)
        raise
    finally:
        os.close(read)
    process.returncode = 0  # the module waits for it itself
    tracker._fd, tracker._pid = write, process.pid
