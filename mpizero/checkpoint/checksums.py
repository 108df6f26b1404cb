"""What was written where, with its CRC-32: so that a range can be read and checked by itself.

Whoever writes a range of a file notes its checksum; together the ranges are the whole file, each
byte once. Whoever reads reads whole ranges.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpizero.checkpoint.format import damaged

# A range: the number of its file, the first byte and the one after the last, and its checksum.
RECORD = np.dtype([("file", "<u4"), ("start", "<u8"), ("stop", "<u8"), ("crc", "<u4")])

# No range is longer, so that little is read in vain by those who want a part of one. A checksum
# takes longer than the call that it is part of from 64 KiB on.
LONGEST = 4 << 20


def crc32(data: Any, before: int = 0) -> int:
    """The CRC-32 of bytes, following on ``before``."""
    return zlib.crc32(data, before)


def complete(records: np.ndarray[Any, Any], sizes: Sequence[int], names: Sequence[str]) -> Any:
    """The records, by file and place. Raises CheckpointError unless they are the files, once."""
    records = np.sort(records, order=("file", "start", "stop"))
    if records.size and records["file"][-1] >= len(sizes):
        raise damaged("the list of checksums", "it names a file that there is not")
    for number, (size, name) in enumerate(zip(sizes, names, strict=True)):
        own = records[records["file"] == number]
        starts, stops = own["start"], own["stop"]
        fits = (
            own.size > 0
            and starts[0] == 0
            and stops[-1] == size
            and (starts < stops).all()
            and (starts[1:] == stops[:-1]).all()
        )
        if not fits:
            raise damaged(name, "some of its bytes were written twice, or never")
    return records
