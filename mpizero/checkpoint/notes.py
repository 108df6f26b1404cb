"""Folders that are there for a moment: how they are called, and what proves that they are ours.

What is being written, replaced or removed has a name of its own beside the checkpoint, and a *note*
inside. It says that very name, and which files are ours. So a folder that somebody has copied,
renamed or made himself is never taken for one, whatever it is called. Whoever is at work on it
holds a lock on the note, which the kernel takes back from who dies.

Making a folder and writing its first file are two steps, and so are removing its last file and
removing it. What a death between them leaves holds nothing, and is known by a number at the end of
its name that only this file computes.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpizero.checkpoint import files
from mpizero.checkpoint.checksums import crc32
from mpizero.checkpoint.manifest import MANIFEST
from mpizero.errors import CheckpointError

NOTE = "unfinished.json"
PARTIAL, OLD = ".partial-", ".old-"

Stamp = tuple[int, int]  # size in bytes, and when it was written, in ns

_FORMAT = "mpizero unfinished"
_LARGEST = 16 << 20  # bytes of a note
_NAME = re.compile(r"(?s)(.+)(\.partial-|\.old-)([0-9a-f]{8})([0-9a-f]{8})")

# Who gives a checkpoint back while its owner exchanges it waits this long for the end of that.
_PATIENCE_SECONDS, _NAP_SECONDS = 2.0, 0.01


@dataclass(frozen=True)
class Note:
    """``name``: of the folder it is in; ``of``: of the checkpoint; ``files``: which are ours.

    With their stamps, if they were written before the note was.
    """

    name: str
    of: str
    files: Mapping[str, Stamp | None]

    def to_json(self) -> bytes:
        """As it is written."""
        return json.dumps({**self._body(), "crc32": self._checksum()}).encode()

    @classmethod
    def parse(cls, text: bytes) -> Note | None:
        """None for everything that ``to_json`` could not have written."""
        try:
            body = json.loads(text)
            stamps = {str(name): _stamp(value) for name, value in body["files"].items()}
            note = cls(str(body["name"]), str(body["of"]), stamps)
            is_note = body["format"] == _FORMAT and body["crc32"] == note._checksum()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return note if is_note and all(map(is_plain, [note.of, *stamps])) else None

    def _body(self) -> dict[str, Any]:
        stamps = {name: stamp and list(stamp) for name, stamp in self.files.items()}
        return {"format": _FORMAT, "name": self.name, "of": self.of, "files": stamps}

    def _checksum(self) -> int:
        return crc32(json.dumps(self._body(), sort_keys=True).encode())


class Claim:
    """A note that has just been written, and is held until ``let_go``."""

    def __init__(self, folder: Path, note: Note) -> None:
        """Write it. Raises OSError, FileExistsError if there is a file of that name."""
        self._handle = -1
        self._handle = files.write_note(folder / NOTE, note.to_json())
        _claims.add(self)

    def let_go(self) -> None:
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    __del__ = let_go


_claims: weakref.WeakSet[Claim] = weakref.WeakSet()


def _let_go_of_all() -> None:
    """In the child of a fork, such as a DataLoader's worker: the lock dies with the parent."""
    for claim in list(_claims):
        claim.let_go()


os.register_at_fork(after_in_child=_let_go_of_all)


def aside(path: Path, mark: str) -> Path:
    """A name beside ``path`` that nothing has yet."""
    start = f"{path.name}{mark}{secrets.token_hex(4)}"
    return path.with_name(f"{start}{_number(start)}")


def is_plain(name: str) -> bool:
    """Is it the name of something in a folder, and not of something elsewhere?"""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def note_in(folder: Path) -> Note | None:
    """The note that proves a folder to be ours, and unfinished; None if there is none."""
    text = _text(folder)
    note = Note.parse(text) if text else None
    return note if note is not None and note.name == folder.name else None


def is_unfinished(folder: Path) -> bool:
    return note_in(folder) is not None


def has_note(folder: Path) -> bool:
    """Is there a note of ours, be it of another name that the folder has had, or was to have?

    Also one without a word, of a save that died as it wrote it.
    """
    text = _text(folder)
    return text is not None and (not text or Note.parse(text) is not None)


def is_held(folder: Path) -> bool:
    """Is somebody at work on it, here or on another node (as far as the file system tells)?"""
    return files.is_locked(folder / NOTE)


def is_put_aside(folder: Path) -> bool:
    """Is it, by its name, a checkpoint that was to be exchanged for another?"""
    found = _NAME.fullmatch(folder.name)
    return found is not None and found[2] == OLD and is_complete(folder)


def is_complete(path: Path) -> bool:
    """Does it have a manifest, which is written last?"""
    return (path / MANIFEST).is_file()


def unfinished(parent: Path, of: str | None = None) -> Iterator[tuple[Path, Note]]:
    """The folders in ``parent`` that saves have left (of the checkpoint of that name).

    Without those that somebody is at work on.
    """
    try:
        with os.scandir(parent) as entries:
            names = sorted(each.name for each in entries if each.is_dir(follow_symlinks=False))
    except OSError:
        return
    for name in names:
        base = _base_of(name)
        if of is not None and of not in (base, name):
            continue
        folder = parent / name
        note = note_in(folder)
        if note is None and base is not None and _holds_nothing(folder):
            note = Note(name, base, {})
        if note is not None and of in (None, note.of) and not is_held(folder):
            yield folder, note


def leftovers(parent: Path) -> list[Path]:
    """What saves that did not end have left in a folder of checkpoints."""
    return [folder for folder, _ in unfinished(parent)]


def lookalikes(parent: Path) -> list[Path]:
    """Folders that are called as if a save had left them, and do not prove it: they stay."""
    if not parent.is_dir():
        return []
    called_so = (each for each in parent.iterdir() if PARTIAL in each.name or OLD in each.name)
    return sorted(
        each
        for each in called_so
        if not is_unfinished(each) and not (_base_of(each.name) and _holds_nothing(each))
    )


def recover(path: Path) -> None:
    """If an exchange was cut off between its two steps, let the old checkpoint have its name again.

    One that another process is about to end is waited for.
    """
    begun = time.monotonic()
    while not os.path.lexists(path):
        found = [
            each
            for each in path.parent.glob(f"{_literally(path.name)}{OLD}*")
            if _base_of(each.name) == path.name
            and not each.is_symlink()
            and is_unfinished(each)
            and is_put_aside(each)
        ]
        if not found:
            return
        last = max(found, key=lambda each: each.stat().st_mtime)
        if not is_held(last):
            with suppress(OSError):  # another process may have done the same by now
                files.rename(last, path)
                files.remove(path / NOTE)
            return
        if time.monotonic() - begun > _PATIENCE_SECONDS:
            return
        time.sleep(_NAP_SECONDS)


def is_as_stamped(path: Path, stamp: Stamp | None) -> bool:
    """Is it an ordinary file, and the one that was written then?

    A file system may have cut the time to whole seconds.
    """
    try:
        found = os.lstat(path)
    except OSError:
        return False
    if not stat.S_ISREG(found.st_mode):
        return False
    if stamp is None:
        return True
    times = {stamp[1], stamp[1] - stamp[1] % 1_000_000_000}
    return found.st_size == stamp[0] and found.st_mtime_ns in times


def _holds_nothing(folder: Path) -> bool:
    """Is it empty, but perhaps for a note without a word?"""
    try:
        with os.scandir(folder) as entries:
            return all(each.name == NOTE for each in entries) and not _text(folder)
    except OSError:
        return False


def _text(folder: Path) -> bytes | None:
    try:
        return files.read_small(folder / NOTE, _LARGEST)
    except (OSError, CheckpointError):
        return None


def _base_of(name: str) -> str | None:
    """The checkpoint's name, of a name that ``aside`` has made."""
    found = _NAME.fullmatch(name)
    if found is None or _number(name[: -len(found[4])]) != found[4]:
        return None
    return found[1]


def _number(start: str) -> str:
    return f"{crc32(f'{_FORMAT}: {start}'.encode()):08x}"


def _stamp(value: Any) -> Stamp | None:
    if value is None:
        return None
    size, written = value
    return int(size), int(written)


def _literally(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
