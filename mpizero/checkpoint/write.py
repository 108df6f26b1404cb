"""Writing: every rank puts its own bytes where they belong, rank 0 makes the whole of it valid."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpizero.api import World
from mpizero.checkpoint import files, mpi_io
from mpizero.checkpoint.aside import Aside
from mpizero.checkpoint.checksums import LONGEST, RECORD, complete, crc32
from mpizero.checkpoint.folder import Staging
from mpizero.checkpoint.format import FileLayout, TensorSpec, index_name, index_of, lay_out
from mpizero.checkpoint.manifest import CHECKSUMS, MANIFEST, Manifest
from mpizero.checkpoint.progress import Progress
from mpizero.errors import ArgumentError, CheckpointError, in_words

WRITERS = ("auto", "posix", "mpi-io")
LARGEST_FILE = 5_000_000_000  # what file systems and hubs are at ease with


@dataclass(frozen=True)
class Piece:
    """Elements of a tensor (C order), from element ``start`` on: a 1-D array, numpy or CuPy."""

    name: str
    start: int
    values: Any


@dataclass(frozen=True)
class Part:
    """Tensors that get files of their own: all of them, and the ``pieces`` that this rank writes.

    ``specs`` are the same on all ranks; together the ranks' pieces are every element once.
    """

    name: str
    specs: Sequence[TensorSpec]
    pieces: Sequence[Piece]
    metadata: dict[str, str] | None = None  # strings for the files' headers


class Save:
    """One save: ``prepare`` and ``copy`` where the ranks are in step, then ``write``, anywhere.

    All of it is collective over ``world``; raises CheckpointError on every rank if one fails, and
    removes what was written. What stood under ``path`` before stays until the end.
    """

    def __init__(
        self,
        path: Path,
        world: World,
        parts: Sequence[Part],
        values: dict[str, Any],
        *,
        largest_file: int = LARGEST_FILE,
        writers_per_node: int | None = None,
        writer: str = "auto",
        managed: bool = False,
    ) -> None:
        self.path, self._world, self._values = path, world, values
        self._managed = managed  # may a manager remove it?
        if writers_per_node is not None and writers_per_node < 1:
            raise ArgumentError(
                "save()", "writers_per_node", str(writers_per_node), "None, or 1 or more"
            )
        if writer not in WRITERS:
            raise ArgumentError("save()", "writer", repr(writer), f"one of {', '.join(WRITERS)}")
        largest_node = max(map(len, world.nodes))
        self._writers, self._writer = writers_per_node or largest_node, writer
        self._turns = -(-largest_node // self._writers)  # the same everywhere: all wait in between
        world.agree(
            [str(spec) for part in parts for spec in part.specs], "the tensors of the checkpoint"
        )
        self._parts = list(parts)
        self._layouts: list[list[FileLayout]] = [
            lay_out(part.name, part.specs, largest_file, part.metadata) for part in parts
        ]
        self._files = [file for each in self._layouts for file in each]
        self._staging = path
        self._made: Staging | None = None  # on rank 0
        self._records: list[tuple[int, int, int, int]] = []
        self._failure = ""
        self._aside: Aside | None = None
        own = sum(piece.values.nbytes for part in parts for piece in part.pieces)
        self._progress = Progress(f"saving {path}", own, world.rank == 0)

    def prepare(self) -> None:
        """Rank 0 makes the folder and its files, empty."""
        staging, failure, writer = "", "", self._writer
        if self._world.rank == 0:
            try:
                self._made = Staging(self.path, self._names())
                where = self._made.folder
                staging = str(where)
                if writer == "auto":
                    parallel = mpi_io.file_system(where) in mpi_io.PARALLEL
                    writer = "mpi-io" if parallel and self._world.size > 1 else "posix"
                for file in self._files:
                    files.create(where / file.name, file.nbytes)
            except Exception as error:
                failure = f"[rank 0] {in_words(error)}"
                self._discard()
        staging, failure, self._writer = self._world.broadcast_object((staging, failure, writer))
        if failure:
            raise self._failed([failure])
        self._staging = Path(staging)

    def copy(self) -> None:
        """Put this rank's pieces aside, so that the originals may change from here on."""
        host = [p.values for part in self._parts for p in part.pieces if _is_host(p.values)]
        self._aside = aside = Aside(sum(map(Aside.room_for, host)))

        def copied(values: Any) -> Any:
            return aside.put(values) if _is_host(values) else values.get()

        for at, part in enumerate(self._parts):
            pieces = [Piece(p.name, p.start, copied(p.values)) for p in part.pieces]
            self._parts[at] = Part(part.name, part.specs, pieces, part.metadata)
        self._progress.quiet = True

    def give_up(self) -> None:
        """Nothing is written: remove the folder. On all ranks."""
        self._release()
        self._discard()

    def write(self, world: World | None = None) -> None:
        """Write this rank's pieces; when all have, give the checkpoint its name.

        ``world``: another of the same ranks to talk over, for a thread of its own.
        """
        self._write_in_turn(world or self._world)
        self.commit(world or self._world)

    def _write_in_turn(self, world: World) -> None:
        """All at once, or so many of a node at a time; or in concert."""
        if self._writer == "mpi-io":
            self._write_together(world)
            return
        for turn in range(self._turns):
            if turn > 0:
                world.barrier()
            if world.local_rank // self._writers == turn:
                self.write_own()

    def _write_together(self, world: World) -> None:
        """Write all files by MPI-IO. Collective; ``commit`` tells how it went."""
        for number, (layout, own) in enumerate(self._own_of_files()):
            ranges: list[tuple[int, Any]] = []
            try:
                ranges = list(self._own_ranges(layout, own))
                self._records += [(number, at, at + each.size, crc32(each)) for at, each in ranges]
            except Exception as error:  # the others write all the same, in concert
                self._failure = f"[rank {world.rank}] {in_words(error)}"
            try:
                mpi_io.write_together(world.comm, self._staging / layout.name, ranges)
            except OSError as error:
                self._failure = f"[rank {world.rank}] {error}"

    def write_own(self) -> None:
        """Write this rank's pieces. Talks to nobody; ``commit`` tells how it went."""
        try:
            self._records = list(self._write_pieces())
        except Exception as error:
            self._failure = f"[rank {self._world.rank}] {in_words(error)}"

    def commit(self, world: World) -> None:
        """When all ranks have written: give the checkpoint its name, or remove it."""
        own = np.array(self._records, RECORD), self._failure
        everyones = world.gather_objects(own)
        failures = [failure for _, failure in everyones if failure]
        if self._made is not None and not failures:
            try:
                self._finish(
                    self._made, np.concatenate([each for each, _ in everyones]), world.size
                )
            except Exception as error:
                failures = [f"[rank 0] {in_words(error)}"]
        if failures:
            self._discard()
        failures = world.broadcast_object(failures)
        self._release()
        nbytes = 0 if failures else sum(file.nbytes for file in self._files)
        self._progress.close(f"{self.path} saved", nbytes)
        if failures:
            raise self._failed(failures)

    def _discard(self) -> None:
        made, self._made = self._made, None
        if made is not None:
            made.discard()

    def _names(self) -> list[str]:
        """All files of the checkpoint."""
        several = [each[0].part for each in self._layouts if len(each) > 1]
        names = [file.name for file in self._files]
        return [*names, *map(index_name, several), CHECKSUMS, MANIFEST]

    def _release(self) -> None:
        """The bytes are written; whoever saves next may have the copies' memory."""
        self._parts = []
        if self._aside is not None:
            self._aside.give_back()

    def _write_pieces(self) -> Iterator[tuple[int, int, int, int]]:
        """Write this rank's ranges, and tell each with its checksum."""
        for number, (layout, own) in enumerate(self._own_of_files()):
            if not own and self._world.rank > 0:
                continue
            handle = files.open_to_write(self._staging / layout.name)
            try:
                for at, data in self._own_ranges(layout, own):
                    files.write_at(handle, data, at)
                    files.start_sync(handle, at, data.size)
                    self._progress.add(data.size)
                    yield number, at, at + data.size, crc32(data)
                files.sync(handle)
            finally:
                files.close(handle)

    def _own_of_files(self) -> Iterator[tuple[FileLayout, list[Piece]]]:
        """Every file, and this rank's pieces of it, in the file's order."""
        for part, layouts in zip(self._parts, self._layouts, strict=True):
            of_part: dict[str, list[Piece]] = {}
            for piece in part.pieces:
                of_part.setdefault(piece.name, []).append(piece)
            for layout in layouts:
                yield layout, [piece for name in layout.specs for piece in of_part.get(name, ())]

    def _own_ranges(self, layout: FileLayout, own: Sequence[Piece]) -> Iterator[tuple[int, Any]]:
        """Where in a file to put what: the header (rank 0), and the pieces' bytes."""
        if self._world.rank == 0:
            yield 0, np.frombuffer(layout.header, np.uint8)
        for piece in own:
            data = _on_host(piece.values).view(np.uint8)
            first = layout.starts[piece.name]
            first += piece.start * layout.specs[piece.name].dtype.itemsize
            for start in range(0, data.size, LONGEST):
                yield first + start, data[start : start + LONGEST]

    def _finish(self, made: Staging, records: Any, ranks: int) -> None:
        sizes = [file.nbytes for file in self._files]
        names = [file.name for file in self._files]
        data = complete(records, sizes, names).tobytes()
        files.write_whole(self._staging / CHECKSUMS, data)
        for layouts in self._layouts:
            if len(layouts) > 1:
                name = index_name(layouts[0].part)
                files.write_whole(self._staging / name, index_of(layouts))
        written = {n: files.stamp(self._staging / n) for n in self._names() if n != MANIFEST}
        manifest = Manifest(
            list(zip(names, sizes, strict=True)),
            (len(data), crc32(data)),
            ranks,
            datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            self._values,
            written,
            made.path.name if self._managed else "",
        )
        files.write_whole(self._staging / MANIFEST, manifest.to_json())
        made.publish()

    def _failed(self, failures: Sequence[str]) -> CheckpointError:
        return CheckpointError(
            f"{os.fspath(self.path)} was not saved: {'; '.join(failures)}. What was there before "
            "is as it was."
        )


def shared_part(name: str, arrays: Mapping[str, Any], world: World) -> Part:
    """A part of arrays that all ranks have: each rank writes some of their bytes."""
    specs: list[TensorSpec] = []
    pieces: list[Piece] = []
    before = 0
    for key, array in arrays.items():
        spec = TensorSpec(key, np.dtype(array.dtype), tuple(array.shape))
        specs.append(spec)
        pieces += _shared_out(spec, array, world.rank, world.size, before)
        before += spec.nbytes
    return Part(name, specs, pieces)


def _shared_out(spec: TensorSpec, values: Any, rank: int, ranks: int, before: int) -> list[Piece]:
    """The part of a tensor that all ``ranks`` have which ``rank`` is to write.

    The tensors' bytes, one behind the other, are dealt out in blocks of 4 MiB; ``before`` are those
    of the tensors before this one. Small ones so go to one rank each, large ones to several.
    """
    size, pieces = spec.dtype.itemsize, []
    flat = values.reshape(-1)
    start = 0
    while start < spec.count:
        block = (before + start * size) // LONGEST
        stop = min(spec.count, max(start + 1, ((block + 1) * LONGEST - before) // size))
        if block % ranks == rank:
            pieces.append(Piece(spec.name, start, flat[start:stop]))
        start = stop
    return pieces


def _on_host(values: Any) -> Any:
    return np.ascontiguousarray(values if _is_host(values) else values.get())


def _is_host(values: Any) -> bool:
    return isinstance(values, np.ndarray)
