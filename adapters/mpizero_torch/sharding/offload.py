"""The optimizer's state out of the way: in a GPU's host memory, or in files. Both exact."""

from __future__ import annotations

import os
import tempfile
import weakref
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
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
    """Keeps tensors in memory-mapped files of a folder of its own, gone with it.

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
        self._mapped: list[Any] = []  # for good, so that no other memory lies where they do
        self._starts: list[int] = []  # of the memory of each file, ascending,
        self._ends: list[int] = []  # and where it ends
        self.nbytes = 0

    def keep(self, value: Any) -> Any:
        """A tensor in a file for one that is not, if that is worth it."""
        is_large = isinstance(value, torch.Tensor) and value.numel() > 1
        if not is_large or self._holds(value):
            return value
        kept = self.empty_like(value)
        kept.copy_(value.detach())
        return kept

    def empty_like(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor in a file."""
        mapped = self.zeros(value.numel(), tensors.numpy_dtype(value.dtype))
        return tensors.as_tensor(mapped).view(value.shape)

    def _holds(self, value: torch.Tensor) -> bool:
        if value.device.type != "cpu":
            return False
        at = bisect_right(self._starts, value.data_ptr()) - 1
        return at >= 0 and value.data_ptr() < self._ends[at]

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
        self._mapped.append(mapped)
        at = bisect_right(self._starts, mapped.ctypes.data)
        self._starts.insert(at, mapped.ctypes.data)
        self._ends.insert(at, mapped.ctypes.data + nbytes)
        # A plain array over the mapping: torch asks no more of it.
        array: np.ndarray[Any, Any] = np.asarray(mapped)[: count * dtype.itemsize].view(dtype)
        return array


class States(defaultdict[Any, dict[str, Any]]):
    """An optimizer's state by parameter, of which every tensor goes to a file as it is put here.

    So that there is no moment at which all of it is in memory.
    """

    def __init__(self, aside: StateOnDisk, state: Mapping[Any, Any]) -> None:
        super().__init__(lambda: State(aside, {}))
        self._aside = aside
        for parameter, values in state.items():
            self[parameter] = values

    def __setitem__(self, parameter: Any, values: dict[str, Any]) -> None:
        kept = isinstance(values, State)
        super().__setitem__(parameter, values if kept else State(self._aside, values))


class State(dict[str, Any]):
    """Of one parameter."""

    def __init__(self, aside: StateOnDisk, values: Mapping[str, Any]) -> None:
        super().__init__()
        self._aside = aside
        self.update(values)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, self._aside.keep(value))

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value


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
