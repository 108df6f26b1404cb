"""Reading: any range of any tensor, checked, by any number of ranks.

What a checkpoint says of itself is checked before it is used: it may be damaged, or made to harm.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mpizero.api import World
from mpizero.checkpoint import files, notes
from mpizero.checkpoint.checksums import LONGEST, RECORD, complete, crc32
from mpizero.checkpoint.format import (
    LENGTH_BYTES,
    FileLayout,
    TensorSpec,
    damaged,
    header_length,
    parse_header,
)
from mpizero.checkpoint.manifest import CHECKSUMS, LARGEST, MANIFEST, Manifest
from mpizero.checkpoint.progress import Progress
from mpizero.errors import ArgumentError, CheckpointError, MpizeroError, in_words

# Seconds for which a rank asks for a file that rank 0 has seen.
PATIENCE = 30.0

_AHEAD = 32 << 20  # bytes that the disk reads ahead of us


class Checkpoint:
    """A complete checkpoint, open for reading.

    Opened by one process, or by all ranks of ``world`` (rank 0 reads and checks what describes it,
    and tells the others). Raises CheckpointError if there is none, or it is damaged: on all ranks.
    """

    def __init__(self, path: str | os.PathLike[str], world: World | None = None) -> None:
        with world.telling() if world is not None else nullcontext():
            self.path = Path(path)
        found: Any = _found(self.path) if world is None or world.rank == 0 else None
        if world is not None:
            found = world.broadcast_object(found)
        if isinstance(found, CheckpointError):
            found.reported_elsewhere = world is not None and world.rank != 0
            raise found
        self.manifest: Manifest = found[0]
        self.layouts: list[FileLayout] = found[1]
        self._records: list[Any] = found[2]
        # Rank 0 has seen all files; what another rank does not see yet will come.
        self._patience = PATIENCE if world is not None and world.rank > 0 else 0.0
        self._handles: dict[int, int] = {}
        self._lent = np.empty(0, np.uint8)
        self._expected: dict[int, int] = {}  # up to where each file is being read ahead
        self._where = {
            (layout.part, name): at
            for at, layout in enumerate(self.layouts)
            for name in layout.specs
        }
        self._progress = Progress(f"loading {path}", None, world is not None and world.rank == 0)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close its files, and tell how fast reading was."""
        while self._handles:
            files.close(self._handles.popitem()[1])
        self._progress.close(f"rank 0's part of {self.path} loaded")

    @property
    def values(self) -> dict[str, Any]:
        """What was saved that is no tensor, by part."""
        return self.manifest.values

    def specs(self, part: str) -> dict[str, TensorSpec]:
        """The tensors of a part, by name; empty if there is no such part."""
        return {
            name: spec for layout in self._files_of(part) for name, spec in layout.specs.items()
        }

    def metadata(self, part: str) -> dict[str, str]:
        """The strings in the headers of a part's files."""
        return {
            key: value for layout in self._files_of(part) for key, value in layout.metadata.items()
        }

    def spec(self, part: str, name: str) -> TensorSpec:
        """Raises ArgumentError for a tensor that there is not."""
        at = self._where.get((part, name))
        if at is None:
            raise ArgumentError("load()", part, f"tensor {name!r}", f"one of those in {self.path}")
        return self.layouts[at].specs[name]

    def read(self, part: str, name: str, elements: slice | None = None) -> Any:
        """The ``elements`` of a tensor, 1-D in C order, or all of it in its shape.

        Reads no more than the ranges that were written at a time (4 MiB), and checks them.
        Raises CheckpointError, naming file and tensor, if they are not what was written.
        """
        spec = self.spec(part, name)
        place = slice(0, spec.count) if elements is None else elements
        out = np.empty(place.stop - place.start, spec.dtype)
        self.read_into(part, name, place.start, out)
        return out.reshape(spec.shape) if elements is None else out

    def borrow(self, part: str, name: str, elements: slice) -> Any:
        """The same, 1-D, in memory that the next ``borrow`` uses again: to be copied at once.

        Memory that is new for each tensor would cost a page fault for every 4 KiB.
        """
        spec = self.spec(part, name)
        nbytes = (elements.stop - elements.start) * spec.dtype.itemsize
        if self._lent.size < nbytes:
            self._lent = np.empty(nbytes, np.uint8)
        out = self._lent[:nbytes].view(spec.dtype)
        self.read_into(part, name, elements.start, out)
        return out

    def read_into(self, part: str, name: str, start: int, out: Any) -> None:
        """Fill ``out`` (1-D, of the tensor's dtype) with the elements from ``start`` on."""
        spec = self.spec(part, name)
        at = self._where[part, name]
        size = spec.dtype.itemsize
        first = self.layouts[at].starts[name] + start * size
        target = out.view(np.uint8)
        for begin, stop, data in self._ranges(at, first, first + target.size, name, target):
            if data is not None:
                low, high = max(begin, first), min(stop, first + target.size)
                target[low - first : high - first] = data[low - begin : high - begin]

    def verify(self, progress: Callable[[int], None] | None = None) -> list[str]:
        """Read everything; what is wrong, a line for each range that is. Empty if all is well."""
        wrong = []
        for at, layout in enumerate(self.layouts):
            try:
                self._handle(at)
            except CheckpointError as error:
                wrong.append(str(error))
                continue
            for record in self._records[at]:
                start, stop = int(record["start"]), int(record["stop"])
                name = next(
                    (n for n, s in layout.specs.items()
                     if layout.starts[n] <= start < layout.starts[n] + s.nbytes),
                    "the header",
                )  # fmt: skip
                try:
                    for _ in self._ranges(at, start, stop, name, None):
                        pass
                except CheckpointError as error:
                    wrong.append(str(error))
                if progress is not None:
                    progress(stop - start)
        return wrong

    def _ranges(
        self, at: int, first: int, last: int, name: str, target: Any
    ) -> Iterator[tuple[int, int, Any]]:
        """Every range of file ``at`` that has bytes of ``first`` to ``last``, checked.

        One that lies wholly in ``target`` (which begins at ``first``) is read there at once.
        """
        if first == last:
            return
        records = self._records[at]
        low = int(np.searchsorted(records["stop"], first, "right"))
        high = int(np.searchsorted(records["start"], last, "left"))
        handle = self._handle(at)
        for record in records[low:high]:
            start, stop = int(record["start"]), int(record["stop"])
            inside = target is not None and first <= start and stop <= last
            self._read_ahead(at, stop)
            data = target[start - first : stop - first] if inside else np.empty(stop - start, "u1")
            try:
                files.read_at(handle, start, data)
            except (OSError, CheckpointError) as error:
                raise self._damaged(at, name, str(error)) from None
            if crc32(data) != int(record["crc"]):
                raise self._damaged(at, name, f"bytes {start} to {stop} are not as written")
            self._progress.add(stop - start)
            yield start, stop, None if inside else data

    def _read_ahead(self, at: int, place: int) -> None:
        """Keep the disk busy from ``place`` on: the next range may be of the next tensor."""
        until = self._expected.get(at, 0)
        if not place <= until <= place + _AHEAD:
            until = place  # not where the last range was
        if until <= place + _AHEAD // 2:
            files.expect(self._handle(at), until, place + _AHEAD - until)
            self._expected[at] = place + _AHEAD

    def _files_of(self, part: str) -> list[FileLayout]:
        return [layout for layout in self.layouts if layout.part == part]

    def _handle(self, at: int) -> int:
        if at not in self._handles:
            path = self.path / self.layouts[at].name
            self._handles[at] = files.open_to_read(path, self._patience)
        return self._handles[at]

    def _damaged(self, at: int, name: str, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path / self.layouts[at].name} is damaged at tensor {name!r}: {why}. "
            "Load an older checkpoint."
        )


@contextmanager
def agreed(world: World) -> Iterator[None]:
    """Ranks read by themselves in here; if one of them fails, all raise its error in the end.

    Otherwise the others would go on, and wait for it later. No collective may be called inside.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # told to all, whatever it is
        failure = error
    own = None if failure is None else f"[rank {world.rank}] {in_words(failure)}"
    everyones = world.gather_objects(own)
    told = [text for text in everyones if text is not None]
    if told and failure is None:
        failure = CheckpointError("; ".join(told))
    if failure is not None:
        if isinstance(failure, MpizeroError):
            failure.reported_elsewhere = everyones.index(told[0]) != world.rank
        world.settle(failure)
        raise failure


def exists(path: str | os.PathLike[str]) -> bool:
    """Is there a complete checkpoint? (One process; see ``notes.recover``.)"""
    notes.recover(Path(path))
    return notes.is_complete(Path(path))


def newest(path: str | os.PathLike[str]) -> Path:
    """The checkpoint at ``path``, or the newest complete one in that folder, by when it was saved.

    If there is neither, ``path``, whose opening tells so.
    """
    folder_of = Path(path)
    if exists(folder_of) or not folder_of.is_dir():
        return folder_of
    whole = [
        each
        for each in folder_of.iterdir()
        if notes.is_complete(each) and not notes.is_unfinished(each)
    ]
    if not whole:
        return folder_of
    return max(whole, key=lambda each: ((each / MANIFEST).stat().st_mtime, each.name))


def _found(path: Path) -> Any:
    """What a checkpoint says of itself, or the CheckpointError to raise."""
    try:
        return _describe(path)
    except CheckpointError as error:
        return error
    except Exception as error:  # whatever else a damaged file, or a full memory, brings about
        return CheckpointError(f"{path} cannot be read: {in_words(error)}.")


def _describe(path: Path) -> tuple[Manifest, list[FileLayout], list[Any]]:
    """What a checkpoint says of itself, checked against itself and against its files' sizes."""
    if not exists(path):
        begun = f": it has no {MANIFEST}, so its save never ended" if path.exists() else ""
        raise CheckpointError(f"There is no checkpoint at {path}{begun}.")
    manifest = Manifest.parse(files.read_small(path / MANIFEST, LARGEST))
    layouts = [_layout(path, name, nbytes) for name, nbytes in manifest.files]
    tensors = [(layout.part, name) for layout in layouts for name in layout.specs]
    if len(set(tensors)) < len(tensors):
        raise damaged(MANIFEST, "two files have the same tensor")
    nbytes, crc = manifest.checksums
    data = files.read_small(path / CHECKSUMS, nbytes)
    if len(data) != nbytes or nbytes % RECORD.itemsize or crc32(data) != crc:
        raise damaged(CHECKSUMS, "it is not the one that the manifest names")
    names = [name for name, _ in manifest.files]
    sizes = [size for _, size in manifest.files]
    records = complete(np.frombuffer(data, RECORD), sizes, names)
    if records.size and int((records["stop"] - records["start"]).max()) > max(
        LONGEST, *(len(layout.header) for layout in layouts)
    ):
        raise damaged(CHECKSUMS, "a range is too long")
    of_files = [records[records["file"] == at] for at in range(len(names))]
    for layout, own in zip(layouts, of_files, strict=True):
        end = int(own["stop"][0])
        if end != len(layout.header) or crc32(layout.header) != int(own["crc"][0]):
            raise damaged(layout.name, "its header is not as written")
    return manifest, layouts, of_files


def _layout(path: Path, name: str, nbytes: int) -> FileLayout:
    handle = files.open_to_read(path / name)
    try:
        if files.size(handle) != nbytes:
            raise damaged(name, f"it has {files.size(handle)} bytes instead of {nbytes}")
        first = bytearray(min(LENGTH_BYTES, nbytes))
        files.read_at(handle, 0, first)
        header = bytearray(header_length(name, nbytes, bytes(first)))
        files.read_at(handle, 0, header)
        return parse_header(name, nbytes, bytes(header))
    finally:
        files.close(handle)
