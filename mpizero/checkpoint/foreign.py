"""Safetensors files that others have written: one, or a folder of them with the usual index.

They have no checksums, so any range can be read by itself. What a header says is checked against
the file before it is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mpizero.api import World
from mpizero.checkpoint import files
from mpizero.checkpoint.format import (
    LENGTH_BYTES,
    FileLayout,
    TensorSpec,
    header_length,
    parse_header,
)
from mpizero.errors import ArgumentError, CheckpointError

_INDEX = ".safetensors.index.json"
_PART = "weights"


class SafetensorsFiles:
    """Tensors by name in a file, or in all files of a folder. A ``Readable`` of one part.

    Opened by all ranks of ``world`` (rank 0 reads the headers, and tells the others). Raises
    CheckpointError if there are none, or one is damaged: on all ranks.
    """

    def __init__(self, path: str | os.PathLike[str], world: World) -> None:
        self.path = Path(path)
        found: Any = _describe(self.path) if world.rank == 0 else None
        found = world.broadcast_object(found)
        if isinstance(found, CheckpointError):
            found.reported_elsewhere = world.rank != 0
            raise found
        layouts: list[tuple[Path, FileLayout]] = found
        self._where = {name: (file, layout) for file, layout in layouts for name in layout.specs}
        self._handles: dict[Path, int] = {}

    def __enter__(self) -> SafetensorsFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        while self._handles:
            files.close(self._handles.popitem()[1])

    @property
    def values(self) -> dict[str, Any]:
        return {}

    def specs(self, part: str) -> Mapping[str, TensorSpec]:
        return {name: layout.specs[name] for name, (_, layout) in self._where.items()}

    def metadata(self, part: str) -> dict[str, str]:
        return {}

    def read(self, part: str, name: str, elements: slice | None = None) -> Any:
        """The ``elements`` of a tensor, 1-D, or all of it in its shape."""
        file, layout = self._where[name]
        spec = layout.specs[name]
        place = slice(0, spec.count) if elements is None else elements
        out = np.empty(place.stop - place.start, spec.dtype)
        if file not in self._handles:
            self._handles[file] = os.open(file, os.O_RDONLY)
        if out.nbytes:
            first = layout.starts[name] + place.start * spec.dtype.itemsize
            files.read_at(self._handles[file], first, out.view(np.uint8))
        return out.reshape(spec.shape) if elements is None else out

    def borrow(self, part: str, name: str, elements: slice) -> Any:
        return self.read(part, name, elements)


def _describe(path: Path) -> list[tuple[Path, FileLayout]] | CheckpointError:
    """The files and what is in them, or the error to raise."""
    try:
        found = [(file, _layout(file)) for file in _files_of(path)]
        names = [name for _, layout in found for name in layout.specs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            return CheckpointError(f"{path}: two files have a tensor named {twice!r}.")
        return found
    except CheckpointError as error:
        return error
    except (OSError, ValueError, ArgumentError) as error:
        return CheckpointError(f"{path} cannot be read: {error}.")


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if not path.name.endswith(_INDEX) else _of_index(path)
    if not path.is_dir():
        raise CheckpointError(f"There is neither a file nor a folder at {path}.")
    indices = sorted(each for each in path.iterdir() if each.name.endswith(_INDEX))
    if len(indices) == 1:
        return _of_index(indices[0])
    found = sorted(each for each in path.iterdir() if each.name.endswith(".safetensors"))
    single = [each for each in found if each.name == "model.safetensors"]
    if len(found) == 1 or single:
        return single or found
    raise CheckpointError(
        f"{path} has {len(found)} files *.safetensors and {len(indices)} indices; give the "
        "safetensors file, or the index, that is meant."
    )


def _of_index(path: Path) -> list[Path]:
    table = json.loads(path.read_bytes())
    names = set(table["weight_map"].values()) if isinstance(table, dict) else set()
    if not names or any(not isinstance(n, str) or n != Path(n).name for n in names):
        raise CheckpointError(f"{path} is no index of files beside it.")
    return sorted(path.parent / name for name in names)


def _layout(path: Path) -> FileLayout:
    # Files of hubs are often links into a cache, which is why links are followed here.
    handle = os.open(path, os.O_RDONLY)
    try:
        nbytes = files.size(handle)
        first = bytearray(min(LENGTH_BYTES, nbytes))
        files.read_at(handle, 0, first)
        header = bytearray(header_length(path.name, nbytes, bytes(first)))
        files.read_at(handle, 0, header)
        return parse_header(path.name, nbytes, bytes(header), any_name=True)
    finally:
        files.close(handle)
