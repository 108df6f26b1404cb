"""The calls to the file system that a checkpoint is made of, in one place.

Positioned writes of many ranks into one file need no lock: they never touch the same byte (POSIX
pwrite). A test replaces these functions to make them fail.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Any

from mpizero.errors import CheckpointError

# A symbolic link in a checkpoint that came from elsewhere could point anywhere.
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
_ADVISE = getattr(os, "posix_fadvise", None)  # macOS has none


def create(path: Path, nbytes: int) -> None:
    """A new file of so many bytes, none of them written yet."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.ftruncate(handle, nbytes)
    finally:
        os.close(handle)


def open_to_write(path: Path) -> int:
    return os.open(path, os.O_WRONLY)


def write_at(handle: int, data: Any, place: int) -> None:
    """All of ``data`` at byte ``place``, also where the system writes a part at a time."""
    view = memoryview(data).cast("B")
    while view.nbytes:
        done = os.pwrite(handle, view, place)
        view, place = view[done:], place + done


def start_sync(handle: int, place: int, nbytes: int) -> None:
    """Let what was just written begin to go to the disk, so that ``sync`` waits for less.

    By itself the kernel would leave it in memory for long. It answers this advice, which is of
    what nobody needs any more, by writing that out, and keeps it until it is written.
    """
    if _ADVISE is not None:
        with contextlib.suppress(OSError):  # advice; not every file system takes it
            _ADVISE(handle, place, nbytes, os.POSIX_FADV_DONTNEED)


def sync(handle: int) -> None:
    """Let it reach the disk."""
    os.fsync(handle)


def close(handle: int) -> None:
    os.close(handle)


def write_whole(path: Path, data: bytes) -> None:
    """A small file, on the disk when this returns."""
    create(path, len(data))
    handle = open_to_write(path)
    try:
        write_at(handle, data, 0)
        sync(handle)
    finally:
        close(handle)


def sync_folder(path: Path) -> None:
    """Let the names in a folder reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        sync(handle)
    finally:
        close(handle)


def rename(old: Path, new: Path) -> None:
    old.rename(new)


def open_to_read(path: Path) -> int:
    """Raises CheckpointError for what is no ordinary file."""
    try:
        handle = os.open(path, os.O_RDONLY | _NO_LINKS | os.O_NONBLOCK)  # nor wait for a pipe
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}.") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        close(handle)
        raise CheckpointError(f"{path} is no ordinary file.")
    return handle


def expect(handle: int, place: int, nbytes: int) -> None:
    """Let the disk read ahead what will be asked for soon, while the processor has other work."""
    if _ADVISE is not None:
        with contextlib.suppress(OSError):
            _ADVISE(handle, place, nbytes, os.POSIX_FADV_WILLNEED)


def size(handle: int) -> int:
    return os.fstat(handle).st_size


def read_at(handle: int, place: int, buffer: Any) -> None:
    """Fill ``buffer`` from byte ``place`` on. Raises CheckpointError where the file ends early."""
    view = memoryview(buffer).cast("B")
    while view.nbytes:
        done = os.preadv(handle, [view], place)
        if done == 0:
            raise CheckpointError("the file ends too early")
        view, place = view[done:], place + done
