"""What of a folder is the checkpoint that we wrote, and what is somebody else's.

A checkpoint is exchanged or removed file by file: a file goes if its manifest says that we wrote
it, and it is as we wrote it. That is seen by its size and time, or else by its content.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mpizero.checkpoint import files
from mpizero.checkpoint.format import FileLayout, index_name, index_of, part_of
from mpizero.checkpoint.manifest import CHECKSUMS, LARGEST, MANIFEST, Manifest
from mpizero.checkpoint.notes import NOTE, Stamp, has_note, is_as_stamped
from mpizero.checkpoint.read import Checkpoint
from mpizero.errors import CheckpointError


@dataclass(frozen=True)
class Inventory:
    """What is in a folder.

    ``ours``: files that we wrote, as they were written. ``changed``: files of the checkpoint that
    are not as we wrote them. ``others``: what else there is. ``managed``: the name under which a
    manager has saved it.
    """

    ours: Mapping[str, Stamp] = field(default_factory=dict)
    changed: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    managed: str = ""

    @property
    def is_checkpoint(self) -> bool:
        """Have we written it, and is it as we wrote it?"""
        return MANIFEST in self.ours and not self.changed


def inventory(folder: Path) -> Inventory:
    """Look at everything in a folder. Raises OSError.

    Reads all of a checkpoint whose files have other times than those they were written at.
    """
    names = sorted(os.listdir(folder))
    try:
        manifest = Manifest.parse(files.read_small(folder / MANIFEST, LARGEST))
    except CheckpointError:
        return Inventory(others=tuple(names))
    indexes = map(index_name, _parts_in_several(manifest))
    known = {MANIFEST, CHECKSUMS, *(name for name, _ in manifest.files), *indexes}
    ours = [MANIFEST, *(name for name in names if _is_as_written(folder, name, manifest))]
    doubtful = [name for name in names if name in known and name not in ours]
    if doubtful:
        ours += _same_content(folder).intersection(doubtful)
    return Inventory(
        {name: files.stamp(folder / name) for name in ours},
        tuple(name for name in doubtful if name not in ours),
        tuple(name for name in names if name not in known and name not in ours),
        manifest.managed,
    )


def _is_as_written(folder: Path, name: str, manifest: Manifest) -> bool:
    """By size and time; or a note, which is known by what it says."""
    if name == NOTE:
        return has_note(folder)
    return name in manifest.written and is_as_stamped(folder / name, manifest.written[name])


def _same_content(folder: Path) -> set[str]:
    """The files of a checkpoint, if all that they hold is what we wrote; else none."""
    try:
        with Checkpoint(folder) as found:
            if found.verify():
                return set()
            same = {CHECKSUMS, *(layout.name for layout in found.layouts)}
            for part in _parts_in_several(found.manifest):
                of_part = [layout for layout in found.layouts if layout.part == part]
                if _is_index(folder / index_name(part), of_part):
                    same.add(index_name(part))
            return same
    except (OSError, CheckpointError):
        return set()


def _is_index(path: Path, layouts: Sequence[FileLayout]) -> bool:
    try:
        return bool(json.loads(files.read_small(path, LARGEST)) == json.loads(index_of(layouts)))
    except (ValueError, RecursionError, CheckpointError):
        return False


def _parts_in_several(manifest: Manifest) -> list[str]:
    """The parts that have several files, and so an index."""
    parts = [part_of(name) for name, _ in manifest.files]
    return [part for part in dict.fromkeys(parts) if parts.count(part) > 1]
