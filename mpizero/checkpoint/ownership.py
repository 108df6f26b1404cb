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
from mpizero.checkpoint.asides import NOTE, Stamp, has_note, is_as_stamped
from mpizero.checkpoint.format import FileLayout, index_name, index_of, part_of
from mpizero.checkpoint.manifest import CHECKSUMS, LARGEST, MANIFEST, Manifest
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
    written = manifest.written
    known = {*written, *(name for name, _ in manifest.files), CHECKSUMS}
    known |= {index_name(part) for part in _parts(manifest)}
    ours, doubtful, others = [MANIFEST], [], []
    for name in names:
        if name == MANIFEST:
            continue
        if name == NOTE and has_note(folder):
            ours.append(name)
        elif name in written and is_as_stamped(folder / name, written[name]):
            ours.append(name)
        elif name in known:
            doubtful.append(name)
        else:
            others.append(name)
    if doubtful:
        as_written = _as_written(folder)
        ours += [name for name in doubtful if name in as_written]
        doubtful = [name for name in doubtful if name not in as_written]
    stamps = {name: files.stamp(folder / name) for name in ours}
    return Inventory(stamps, tuple(doubtful), tuple(others), manifest.managed)


def _as_written(folder: Path) -> set[str]:
    """The files of a checkpoint whose content is what we wrote, if all is; else none."""
    try:
        with Checkpoint(folder) as found:
            if found.verify():
                return set()
            names = {CHECKSUMS, *(layout.name for layout in found.layouts)}
            return names | {
                index_name(part)
                for part in _parts(found.manifest)
                if _is_index(
                    folder / index_name(part), [x for x in found.layouts if x.part == part]
                )
            }
    except (OSError, CheckpointError):
        return set()


def _is_index(path: Path, layouts: Sequence[FileLayout]) -> bool:
    try:
        return bool(json.loads(files.read_small(path, LARGEST)) == json.loads(index_of(layouts)))
    except (ValueError, RecursionError, CheckpointError):
        return False


def _parts(manifest: Manifest) -> list[str]:
    """The parts that have several files, and so an index."""
    parts = [part_of(name) for name, _ in manifest.files]
    return [part for part in dict.fromkeys(parts) if parts.count(part) > 1]
