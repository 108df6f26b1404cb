"""A checkpoint's folder is there wholly or not at all.

Everything is written into a folder beside it, whose name tells what it is, and which gets the right
name last. What stands under the right name already is put aside for the moment of the change; if
the change is cut off in between, ``recover`` finds it.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from pathlib import Path

from mpizero.checkpoint import files
from mpizero.checkpoint.manifest import MANIFEST
from mpizero.errors import CheckpointError

_PARTIAL, _OLD = ".partial-", ".old-"


def staging_for(path: Path) -> Path:
    """A new folder beside ``path``, to be ``publish``ed. Removes what failed saves have left.

    Raises CheckpointError if something stands there that is no checkpoint: it stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    if path.exists() and not is_complete(path) and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} is no checkpoint, and will not be replaced by one")
    remove_leftovers(path)
    staging = _aside(path, _PARTIAL)
    staging.mkdir()
    return staging


def publish(staging: Path, path: Path) -> None:
    """Let a complete folder have its name, instead of what has it now."""
    files.sync_folder(staging)
    old = _aside(path, _OLD)
    if path.exists():
        files.rename(path, old)
        try:
            files.rename(staging, path)
        except OSError:
            files.rename(old, path)
            raise
    else:
        files.rename(staging, path)
    files.sync_folder(path.parent)
    discard(old)


def recover(path: Path) -> None:
    """If a change was cut off between its two steps, let the old one have its name again."""
    if path.exists() or not path.parent.is_dir():
        return
    asides = filter(is_complete, path.parent.glob(f"{_literally(path.name)}{_OLD}*"))
    for aside in sorted(asides, key=lambda each: each.stat().st_mtime)[-1:]:
        # Another process may have done the same by now.
        with contextlib.suppress(OSError):
            files.rename(aside, path)


def remove_leftovers(path: Path) -> None:
    """Remove what saves that failed have left beside ``path``."""
    for mark in (_PARTIAL, _OLD):
        for left in path.parent.glob(f"{_literally(path.name)}{mark}*"):
            discard(left)


def leftovers(folder: Path) -> list[Path]:
    """What saves that failed have left in a folder of checkpoints."""
    if not folder.is_dir():
        return []
    return [each for each in folder.iterdir() if _PARTIAL in each.name or _OLD in each.name]


def discard(path: Path) -> None:
    """Remove a folder, if it is there, and can be removed.

    Under another name first: what is half removed is no checkpoint, and the next save ends it.
    """
    if not path.is_dir() or path.is_symlink():
        return
    leaving = path
    if _PARTIAL not in path.name:
        leaving = _aside(path.with_name(path.name.partition(_OLD)[0]), _PARTIAL)
        try:
            files.rename(path, leaving)
        except OSError:  # better whole than half
            return
    shutil.rmtree(leaving, ignore_errors=True)


def is_complete(path: Path) -> bool:
    """Does it have a manifest, which is written last?"""
    return (path / MANIFEST).is_file()


def _aside(path: Path, mark: str) -> Path:
    return path.with_name(f"{path.name}{mark}{secrets.token_hex(4)}")


def _literally(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
