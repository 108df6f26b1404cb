"""The manifest: a checkpoint's table of contents. JSON, for people and programs; trusted by nobody.

It names the files with their sizes and the list of checksums with its own, and holds the values
that are no tensors. Its own checksum is of the text without the line that says it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpizero.checkpoint import tree
from mpizero.checkpoint.checksums import crc32
from mpizero.checkpoint.format import damaged, part_of, unique
from mpizero.errors import CheckpointError

MANIFEST, CHECKSUMS = "manifest.json", "checksums.bin"
VERSION = 1
LARGEST = 256 << 20  # bytes; a larger one was not written by us
_FORMAT = "mpizero checkpoint"
_DEEPEST = 4 * tree.DEEPEST  # a level of a value takes up to three in JSON


@dataclass(frozen=True)
class Manifest:
    """``files``: name and bytes of each; ``values``: what is no tensor, by part.

    ``written``: bytes and time, in ns, of all files but this one, by which they are known again.
    ``managed``: the folder's name, if a ``CheckpointManager`` has saved it, and may remove it.
    """

    files: Sequence[tuple[str, int]]
    checksums: tuple[int, int]  # bytes and CRC-32 of the list
    ranks: int  # that saved it
    saved: str  # when, ISO 8601
    values: dict[str, Any] = field(default_factory=dict)
    written: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    managed: str = ""

    def to_json(self) -> bytes:
        """As it is written."""
        body = {
            "format": _FORMAT,
            "version": VERSION,
            "saved": self.saved,
            "ranks": self.ranks,
            "files": [{"name": name, "bytes": nbytes} for name, nbytes in self.files],
            "checksums": {"bytes": self.checksums[0], "crc32": self.checksums[1]},
            "values": self.values,
            "written": {name: list(stamp) for name, stamp in self.written.items()},
            "managed": self.managed,
        }
        return json.dumps({**body, "crc32": _checksum(body)}, indent=1, allow_nan=False).encode()

    @classmethod
    def parse(cls, text: bytes) -> Manifest:
        """Raises CheckpointError for everything that ``to_json`` could not have written."""
        try:
            body = json.loads(text, object_pairs_hook=unique)
            _check_depth(body)
            crc = body.pop("crc32")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise damaged(MANIFEST, f"it cannot be read ({error})") from None
        if body.get("format") != _FORMAT:
            raise damaged(MANIFEST, f"it is of format {body.get('format')!r}")
        if body.get("version") != VERSION:
            raise CheckpointError(
                f"{MANIFEST} is of version {body.get('version')!r}; this mpizero reads version "
                f"{VERSION}. Use the mpizero that wrote it, or a newer one."
            )
        if _checksum(body) != crc:
            raise damaged(MANIFEST, "its checksum differs")
        try:
            found = cls(
                [(each["name"], _count(each["bytes"])) for each in body["files"]],
                (_count(body["checksums"]["bytes"]), _count(body["checksums"]["crc32"])),
                _count(body["ranks"]),
                str(body["saved"]),
                dict(body["values"]),
                {name: _pair(stamp) for name, stamp in body.get("written", {}).items()},
                str(body.get("managed", "")),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise damaged(MANIFEST, f"it lacks something ({error!r})") from None
        names = [name for name, _ in found.files]
        for name in names:
            part_of(name)
        if len(set(names)) < len(names):
            raise damaged(MANIFEST, "it names a file twice")
        return found


def _check_depth(body: Any) -> None:
    """ValueError for tables within tables, deeper than values of ours are; without recursion."""
    level, depth = [body], 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"values are nested more than {_DEEPEST} deep")
        tables = [each.values() if isinstance(each, dict) else each for each in level]
        level = [each for table in tables for each in table if isinstance(each, dict | list)]


def _checksum(body: dict[str, Any]) -> int:
    return crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _pair(value: Any) -> tuple[int, int]:
    size, written = value
    return _count(size), _count(written)
