"""The optimizer's state out of the way: in a GPU's host memory, or in files. Both exact."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpizero_torch import tensors
from mpizero_torch.sharding.runs import Run


def pinned_zeros(count: int, dtype: Any) -> Any:
    """A zeroed 1-D host array that a GPU copies to and from at full speed."""
    found = torch.zeros(count, dtype=tensors.torch_dtype(dtype), pin_memory=True)
    return tensors.as_array(found)


def with_gradients(runs: Iterable[Run]) -> Iterator[tuple[Run, torch.Tensor]]:
    """Each run that has a gradient, with it, where and in the dtype that the optimizer works.

    From a GPU the next one travels while this one is used.
    """
    waiting: tuple[Run, torch.Tensor, Any] | None = None
    for run in runs:
        if not run.has_gradient:
            continue
        leaving = (run, *_fetch(run))
        if waiting is not None:
            yield _arrived(*waiting)
        waiting = leaving
    if waiting is not None:
        yield _arrived(*waiting)


def _fetch(run: Run) -> tuple[torch.Tensor, Any]:
    """Begin to bring a gradient to its parameter; returns where to, and what to wait for."""
    gradient = run.gradient
    if gradient.device.type == "cpu" or run.parameter.device.type != "cpu":
        return gradient, None
    host = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=True)
    host.copy_(gradient, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def _arrived(run: Run, gradient: torch.Tensor, event: Any) -> tuple[Run, torch.Tensor]:
    if event is not None:
        event.synchronize()
    return run, gradient.to(run.parameter.dtype)


class StateOnDisk:
    """Keeps tensors of state in memory-mapped files of a folder of its own, gone with it.

    The kernel writes pages back and drops them as it needs the room. ``folder``: on a local disk;
    by default where temporary files go (which may be memory, on some machines). What somebody else
    puts into the folder stays, and so does the folder then.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="mpizero-state-", dir=folder))
        self._made: list[tuple[Path, tuple[int, int]]] = []  # with device and inode
        weakref.finalize(self, _remove, os.getpid(), self._folder, self._made)  # at exit, too
        self._known: dict[int, torch.Tensor] = {}
        self.nbytes = 0

    def take(self, state: dict[str, Any]) -> None:
        """Replace the tensors of ``state`` that are not in files yet by ones that are."""
        for key, value in state.items():
            is_large = isinstance(value, torch.Tensor) and value.numel() > 1
            if is_large and id(value) not in self._known:
                mapped = self.zeros(value.numel(), tensors.numpy_dtype(value.dtype))
                kept = tensors.as_tensor(mapped).view(value.shape)
                kept.copy_(value)
                state[key] = kept
                self._known[id(kept)] = kept

    def zeros(self, count: int, dtype: Any) -> Any:
        """A zeroed 1-D array in a file."""
        dtype = np.dtype(dtype)
        nbytes = max(1, count) * dtype.itemsize
        path = self._folder / f"{len(self._made) + 1}.bin"
        with path.open("x+b") as file:
            found = os.fstat(file.fileno())
            self._made.append((path, (found.st_dev, found.st_ino)))
            mapped = np.memmap(file, np.uint8, "r+", shape=(nbytes,))
        self.nbytes += nbytes
        # A plain array over the mapping: torch asks no more of it.
        array: np.ndarray[Any, Any] = np.asarray(mapped)[: count * dtype.itemsize].view(dtype)
        return array


def _remove(pid: int, folder: Path, made: list[tuple[Path, tuple[int, int]]]) -> None:
    """Remove the files that this process (no fork of it) has made, and their folder, if empty."""
    if os.getpid() != pid:
        return
    for path, made_as in made:
        with suppress(OSError):
            found = path.lstat()
            if (found.st_dev, found.st_ino) == made_as:
                path.unlink()
    with suppress(OSError):
        folder.rmdir()
