"""A checkpoint's folder is there wholly or not at all.

Everything is written into a folder beside it, which gets the right name last. What stands under the
right name already is put aside for the moment of the exchange; if that is cut off in between,
``notes.recover`` finds it. Nothing is removed, renamed or replaced but what a note (``notes``) or
a manifest (``ownership``) proves to be ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from mpizero.checkpoint import files
from mpizero.checkpoint.manifest import LARGEST, MANIFEST, Manifest
from mpizero.checkpoint.notes import (
    NOTE,
    OLD,
    PARTIAL,
    Claim,
    Note,
    Stamp,
    aside,
    has_note,
    is_as_stamped,
    is_complete,
    is_put_aside,
    recover,
    unfinished,
)
from mpizero.checkpoint.ownership import Inventory, inventory
from mpizero.errors import CheckpointError

_MOST_LINKS = 40  # as Linux follows
_MOST_NAMED = 5  # files in a message


class Staging:
    """A new folder beside ``path``, in which a checkpoint is written until it gets its name.

    Removes what failed saves have left of the same checkpoint. Where ``path`` is a link, beside
    what it leads to. Raises CheckpointError if something stands there that is no checkpoint, or
    more than one: it stays. ``names``: of the files that will be written.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.path = _followed(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        recover(self.path)
        remove_leftovers(self.path)
        _replaceable(self.path)
        self.folder = aside(self.path, PARTIAL)
        self._note = Note(self.folder.name, self.path.name, dict.fromkeys(names))
        files.make_folder(self.folder)
        try:
            self._claim = Claim(self.folder, self._note)
        except OSError:
            with suppress(OSError):
                files.remove_folder(self.folder)
            raise

    def publish(self) -> None:
        """Let the complete folder have its name, instead of what has it now."""
        path, folder = self.path, self.folder
        files.sync_folder(folder)
        there = _replaceable(path)
        if there is None:
            files.rename(folder, path)
            files.sync_folder(path.parent)
        else:
            self._exchange(there)
        with suppress(OSError):
            files.remove(path / NOTE)
        self._claim.let_go()
        remove_leftovers(path)

    def discard(self) -> None:
        """The save has failed: remove what is in it."""
        _take_apart(self.folder, self._note)
        self._claim.let_go()

    def _exchange(self, there: Inventory) -> None:
        path = self.path
        old = aside(path, OLD)
        note = Note(old.name, path.name, _but_notes(there.ours))
        claim = _write_note(path, note)
        try:
            files.sync_folder(path)  # recovery needs it
            files.rename(path, old)
        except OSError:
            _remove_note(path)
            claim.let_go()
            raise
        try:
            files.rename(self.folder, path)
        except OSError:
            files.rename(old, path)
            _remove_note(path)
            claim.let_go()
            raise
        files.sync_folder(path.parent)
        _take_apart(old, note)
        claim.let_go()


def remove_leftovers(path: Path) -> None:
    """Remove what saves that failed have left beside ``path``, or what was not wholly removed."""
    for left, note in list(unfinished(path.parent, path.name)):
        _remove_leftover(left, note)


def tidy(parent: Path) -> None:
    """Give back and remove what saves that failed have left in a folder of checkpoints."""
    for left, note in list(unfinished(parent)):
        recover(parent / note.of)
        if left.is_dir():
            _remove_leftover(left, note)


def is_managed(path: Path) -> bool:
    """Is it a checkpoint that a manager has saved, in this place?"""
    if path.is_symlink():
        return False
    try:
        return Manifest.parse(files.read_small(path / MANIFEST, LARGEST)).managed == path.name
    except CheckpointError:
        return False


def discard(path: Path) -> Inventory:
    """Remove a checkpoint, if it is there, as we wrote it, and can be removed.

    Returns what it has found. Other files in the folder stay where they are, and if files of the
    checkpoint have been changed, all of it does.
    """
    try:
        found = Inventory() if path.is_symlink() else inventory(path)
    except (OSError, CheckpointError):
        return Inventory()
    if not found.is_checkpoint:
        return found
    # Under another name first: what is half removed is no checkpoint. With others' files in it, it
    # keeps its name; the manifest goes first.
    leaving = path if found.others else aside(path, PARTIAL)
    note = Note(leaving.name, path.name, _but_notes(found.ours))
    try:
        claim = _write_note(path, note)
        try:
            if leaving != path:
                files.rename(path, leaving)
            _take_apart(leaving, note)
        finally:
            claim.let_go()
    except OSError:  # better whole than half
        with suppress(OSError):
            _remove_note(path)
    return found


def _replaceable(path: Path) -> Inventory | None:
    """The checkpoint that is to be replaced; None if there is none, or an empty folder.

    Raises CheckpointError for what must stay.
    """
    if not os.path.lexists(path):
        return None
    if not path.is_dir() or path.is_symlink():
        raise CheckpointError(f"{path} is no checkpoint, and will not be replaced by one")
    found = inventory(path)
    if not found.ours and not found.others:
        return None
    if MANIFEST not in found.ours:
        raise CheckpointError(f"{path} is no checkpoint, and will not be replaced by one")
    kept = [*found.changed, *found.others]
    if kept:
        named = ", ".join(kept[:_MOST_NAMED]) + ", ..." * (len(kept) > _MOST_NAMED)
        why = "have been changed since" if found.changed else "are not the checkpoint's"
        raise CheckpointError(
            f"{path} will not be replaced: there are files in it that {why} ({named}). Move them, "
            "or save under another name"
        )
    return found


def _remove_leftover(left: Path, note: Note) -> None:
    """Unless it is the only one there is: a checkpoint put aside for another that is not there."""
    only_one = is_put_aside(left) and not is_complete(left.with_name(note.of))
    if not only_one:
        _take_apart(left, note)


def _take_apart(folder: Path, note: Note) -> None:
    """Remove the files that the note proves to be ours, and the folder if nothing else is in it.

    The manifest first, and the note when all are gone: what is cut off is ended by the next save.
    """
    with suppress(OSError):
        for name in sorted(note.files, key=lambda each: each != MANIFEST):
            if is_as_stamped(folder / name, note.files[name]):
                files.remove(folder / name)
        _remove_note(folder)
        files.remove_folder(folder)


def _write_note(folder: Path, note: Note) -> Claim:
    """In the place of one that has had its time."""
    _remove_note(folder)
    return Claim(folder, note)


def _remove_note(folder: Path) -> None:
    if has_note(folder):
        files.remove(folder / NOTE)


def _but_notes(ours: Mapping[str, Stamp]) -> dict[str, Stamp]:
    return {name: stamp for name, stamp in ours.items() if name != NOTE}


def _followed(path: Path) -> Path:
    """Where a link leads to, for a checkpoint is written to where it leads.

    No more of the path is followed: another node may get to the same folder by other links.
    """
    for _ in range(_MOST_LINKS):
        if not path.is_symlink():
            return path if path.name not in ("", "..") else Path(os.path.realpath(path))
        path = path.parent / os.readlink(path)
    raise CheckpointError(f"{path} is a link that leads nowhere")
