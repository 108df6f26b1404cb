"""The optimizer's state in files: for machines short of memory. Exact: the same numbers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpizero_torch import tensors


class StateOnDisk:
    """Keeps tensors of state in memory-mapped files of a folder of its own, gone at exit.

    The kernel writes pages back and drops them as it needs the room. ``folder``: on a local disk;
    by default where temporary files go (which may be memory, on some machines).
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mpizero-state-", dir=folder)
        self._known: dict[int, torch.Tensor] = {}
        self._count = 0
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
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}.bin"
        dtype = np.dtype(dtype)
        nbytes = max(1, count) * dtype.itemsize
        mapped = np.memmap(path, np.uint8, "w+", shape=(nbytes,))
        self.nbytes += nbytes
        # A plain array over the mapping: torch asks no more of it.
        found: np.ndarray[Any, Any] = np.asarray(mapped)[: count * dtype.itemsize].view(dtype)
        return found
