"""Files under names that the user has chosen: whole or not at all, and over nobody else's.

What stands there already is overwritten only if its content shows that it is an earlier output of
the same kind, or if it holds nothing. Each kind of output knows that by something that we write
into it. Where the name is a link, that holds for what it leads to; pipes and devices are just
written to.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mpizero.errors import ArgumentError

IsOurs = Callable[[bytes], bool]

MARK = "written by mpizero"  # what pictures say of themselves


def refuse_foreign(path: Path, is_ours: IsOurs, function: str, argument: str) -> None:
    """Raise ArgumentError if something stands at ``path`` that is not ours to overwrite."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _refused(path, error.strerror or str(error), function, argument) from error
    if stat.S_ISDIR(found.st_mode):
        raise _refused(path, "a folder", function, argument)
    if stat.S_ISREG(found.st_mode) and found.st_size and not is_ours(path.read_bytes()):
        raise _refused(path, "which holds something else", function, argument)


def write(path: Path, data: bytes, is_ours: IsOurs, function: str, argument: str) -> None:
    """Write a file, unless ``refuse_foreign`` does. Raises OSError, too."""
    refuse_foreign(path, is_ours, function, argument)
    place = Path(os.path.realpath(path))
    there = os.path.lexists(place)
    if there and not place.is_file():  # a pipe, or a device
        with place.open("wb") as device:
            device.write(data)
        return
    draft = place.with_name(f".{place.name}.{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        if there:
            draft.chmod(stat.S_IMODE(os.stat(place).st_mode))
            draft.replace(place)
        else:
            put(draft, place)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise


def put(draft: Path, path: Path) -> None:
    """Let a file that this process has made have the name ``path``, which nothing has yet.

    Raises FileExistsError if something has it.
    """
    try:
        os.link(draft, path)  # a rename would replace what has come there since
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists already") from None
        draft.rename(path)
    else:
        draft.unlink()


def is_marked(data: bytes) -> bool:
    """Is it a picture of ours?"""
    return MARK.encode() in data


def marks(path: Path) -> dict[str, str] | None:
    """What matplotlib is to write into a picture of that name; None where it can write nothing."""
    keys = {".png": "Software", ".svg": "Creator", ".pdf": "Creator", ".ps": "Creator"}
    keys[".eps"] = "Creator"
    key = keys.get(path.suffix.lower())
    return None if key is None else {key: MARK}


def _refused(path: Path, what: str, function: str, argument: str) -> ArgumentError:
    return ArgumentError(
        function, argument, f"{os.fspath(path)!r}, {what}",
        "a new name, or a file that the same command has written",
        "It stays as it is: move it away, or choose another name.",
    )  # fmt: skip
