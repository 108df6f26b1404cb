"""What a disk can do, with nothing but plain calls: the bound of whoever saves and loads."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np

BLOCK = 4 << 20


def write(path: Path, nbytes: int) -> None:
    """As ``dd bs=4M conv=fsync`` does it: the same 4 MiB again and again, then fsync."""
    block = memoryview(np.random.default_rng(0).bytes(BLOCK))
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for at in range(0, nbytes, BLOCK):
            os.pwrite(handle, block[: nbytes - at], at)
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path) -> None:
    """All of a file, always into the same 4 MiB."""
    block = bytearray(BLOCK)
    handle = os.open(path, os.O_RDONLY)
    try:
        at = 0
        while done := os.preadv(handle, [block], at):
            at += done
    finally:
        os.close(handle)


def forget(path: Path) -> None:
    """Let files be read from the disk next time, not from the kernel's memory."""
    for each in files(path):
        handle = os.open(each, os.O_RDONLY)
        try:
            os.fsync(handle)  # what is not on the disk yet cannot be forgotten
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def sync(path: Path) -> None:
    """For those who leave that to the kernel: let their files reach the disk."""
    for each in files(path):
        handle = os.open(each, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def files(path: Path) -> list[Path]:
    """A file, or all files in a folder."""
    return [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]


def nbytes(path: Path) -> int:
    return sum(each.stat().st_size for each in files(path))


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class ExtraMemory:
    """The most resident memory that there is from now on, over what there is now."""

    def __init__(self) -> None:
        with suppress(OSError):  # where it is not permitted, the peak is that since the start
            Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmRSS")

    def most(self) -> int:
        return max(0, _status("VmHWM") - self.before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return 0
