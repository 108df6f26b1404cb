"""Numbers on the command line: 7e9, 512GB, 480GiB."""

from __future__ import annotations

import re
from math import isfinite

import click

_UNITS = {
    "": 1e9, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
    "KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40,
}  # fmt: skip
_QUANTITY = re.compile(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)")


def number(text: str | float) -> float:
    """A number >= 0, written as Python's floats are."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not (isfinite(found) and found >= 0):
        raise click.BadParameter(f"{text!r} is no number >= 0; write 7e9 or 7000000000")
    return found


def memory_size(text: str) -> float:
    """Bytes: 512GB (10^9), 480GiB (2^30); a number alone is in GB."""
    found = _QUANTITY.fullmatch(text.strip())
    if found is None or found[2].upper() not in _UNITS or found[1].count(".") > 1:
        raise click.BadParameter(f"{text!r} is no amount of memory; write 512GB or 480GiB")
    return number(found[1]) * _UNITS[found[2].upper()]
