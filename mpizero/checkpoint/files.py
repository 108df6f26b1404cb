"""The calls to the file system that a checkpoint is made of, in one place.

Positioned writes of many ranks into one file need no lock: they never touch the same byte (POSIX
pwrite). A test replaces these functions to make them fail.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from pathlib import Path
from typing import Any

from mpizero.checkpoint.format import damaged
from mpizero.errors import CheckpointError

# A symbolic link in a checkpoint that came from elsewhere could point anywhere, and opening a pipe
# there could wait for ever.
_NAP_SECONDS = 0.1  # between two looks for a file

_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | os.O_NONBLOCK
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


def write_note(path: Path, data: bytes) -> int:
    """A new small file, on the disk when this returns, and locked as long as its handle is open.

    Where the file system has no locks, not locked.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        while data:  # of a note that is not there wholly there is mostly nothing
            data = data[os.write(handle, data) :]
        os.fsync(handle)
    except BaseException:
        os.unlink(path)
        os.close(handle)
        raise
    return handle


def is_locked(path: Path) -> bool:
    """Has somebody else a lock on it?"""
    try:
        handle = os.open(path, _READ)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)
    return False


def make_folder(path: Path) -> None:
    path.mkdir()


def remove(path: Path) -> None:
    """One file. Whoever calls has the proof that it is ours."""
    os.unlink(path)


def remove_folder(path: Path) -> None:
    """An empty one."""
    os.rmdir(path)


def sync_folder(path: Path) -> None:
    """Let the names in a folder reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        sync(handle)
    finally:
        close(handle)


def rename(old: Path, new: Path) -> None:
    old.rename(new)


def open_to_read(path: Path, patience: float = 0.0) -> int:
    """Raises CheckpointError for what is no ordinary file.

    ``patience``: for so many seconds ask again for one that is not there. Another node may have
    just written it, and file systems such as NFS remember for a while that there was none.
    """
    given_up = time.monotonic() + patience
    while True:
        try:
            handle = os.open(path, _READ)
            break
        except (FileNotFoundError, NotADirectoryError) as error:
            if time.monotonic() >= given_up:
                waited = f", for {patience:g} s" if patience else ""
                text = f"{path} cannot be opened: {error.strerror}{waited}."
                raise CheckpointError(text) from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}.") from None
        time.sleep(_NAP_SECONDS)
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # which asks the server
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


def stamp(path: Path) -> tuple[int, int]:
    """Size, and when it was written, in ns: also where another node has written it.

    For a network file system says what is new of a file to those who open it (close-to-open).
    """
    handle = open_to_read(path)
    try:
        found = os.fstat(handle)
        return found.st_size, found.st_mtime_ns
    finally:
        close(handle)


def read_small(path: Path, largest: int) -> bytes:
    """All of a small file. Raises CheckpointError for what is none, or has more bytes."""
    handle = open_to_read(path)
    try:
        nbytes = size(handle)
        if nbytes > largest:
            raise damaged(path.name, f"it has {nbytes} bytes; at most {largest} are expected")
        data = bytearray(nbytes)
        read_at(handle, 0, data)
        return bytes(data)
    finally:
        close(handle)


def read_at(handle: int, place: int, buffer: Any) -> None:
    """Fill ``buffer`` from byte ``place`` on. Raises CheckpointError where the file ends early."""
    view = memoryview(buffer).cast("B")
    while view.nbytes:
        done = os.preadv(handle, [view], place)
        if done == 0:
            raise CheckpointError("the file ends too early")
        view, place = view[done:], place + done
