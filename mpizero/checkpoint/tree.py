"""Nested Python values as JSON, with the arrays in them put aside: no pickle, so no code.

Knows what states of schedulers, loaders and generators consist of: None, bool, int, float, str,
bytes, lists, tuples, sets, dicts (with any such keys), counters and numpy arrays and scalars. What
JSON cannot say is written as a table with one key that begins with ``$``.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mpizero.checkpoint.format import damaged
from mpizero.errors import ArgumentError

# How many lists, dicts, ... may lie within each other. They are walked by recursion, on every rank.
DEEPEST = 100

AsArray = Callable[[Any], Any]

_SEQUENCES: dict[str, Callable[[Any], Any]] = {
    "$tuple": tuple, "$set": set, "$frozenset": frozenset, "$deque": deque,
}  # fmt: skip
_TABLES: dict[str, Callable[[Any], Any]] = {
    "$dict": dict, "$counter": Counter, "$ordered": OrderedDict,
}  # fmt: skip


def encode(
    value: Any,
    where: str,
    arrays: dict[str, Any],
    as_array: AsArray | None = None,
    depth: int = 0,
) -> Any:
    """``value`` as JSON; arrays go to ``arrays``, under names that begin with ``where``.

    ``as_array(value)`` gives an array for what is one in a framework's way, None for the rest.
    Raises ArgumentError, naming the place, for what could only be pickled, and for what lies
    deeper than ``DEEPEST`` within other values.
    """

    def inner(each: Any, key: object) -> Any:
        return encode(each, f"{where}.{key}", arrays, as_array, depth + 1)

    if depth > DEEPEST:
        raise ArgumentError(
            "save()", f"{where[:60]}...", f"a value nested more than {DEEPEST} deep",
            f"at most {DEEPEST} lists or dicts within each other",
        )  # fmt: skip
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, np.generic) and value.dtype.kind in "biufc":
        value = np.asarray(value)
        arrays[where] = value
        return {"$scalar": where}
    array = value if isinstance(value, np.ndarray) else as_array(value) if as_array else None
    if array is not None:
        arrays[where] = array
        return {"$array" if array is value else "$tensor": where}
    if kind is list:
        return [inner(each, at) for at, each in enumerate(value)]
    if kind is dict and all(type(key) is str and not key.startswith("$") for key in value):
        return {key: inner(each, key) for key, each in value.items()}
    for tag, make in _SEQUENCES.items():
        if kind is make:
            return {tag: [inner(each, at) for at, each in enumerate(value)]}
    if kind is defaultdict:
        kind = dict  # its factory is code
    for tag, make in _TABLES.items():
        if kind is make:
            return {
                tag: [[inner(key, f"{at}.key"), inner(each, at)]
                      for at, (key, each) in enumerate(value.items())]
            }  # fmt: skip
    raise ArgumentError(
        "save()", where, f"a {kind.__module__}.{kind.__qualname__}",
        "numbers, strings, arrays and containers of these",
        "Checkpoints hold no pickles; give its state as such values.",
    )  # fmt: skip


def decode(
    value: Any,
    arrays: Callable[[str], Any],
    as_tensor: Callable[[Any], Any] | None = None,
    depth: int = 0,
) -> Any:
    """What ``encode`` was given; ``arrays(name)`` reads one, ``as_tensor`` makes a tensor of it."""

    def inner(each: Any) -> Any:
        return decode(each, arrays, as_tensor, depth + 1)

    if depth > DEEPEST:
        raise damaged("manifest.json", f"a value is nested more than {DEEPEST} deep")
    if isinstance(value, list):
        return [inner(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    tag = next(iter(value), "")
    if len(value) != 1 or not tag.startswith("$"):
        return {key: inner(each) for key, each in value.items()}
    content = value[tag]
    try:
        if tag == "$float":
            return float(content)
        if tag == "$bytes":
            return base64.b64decode(content)
        if tag == "$scalar":
            return arrays(content)[()]
        if tag == "$array":
            return arrays(content)
        if tag == "$tensor":
            found = arrays(content)
            return found if as_tensor is None else as_tensor(found)
        if tag in _SEQUENCES:
            return _SEQUENCES[tag](inner(each) for each in content)
        if tag in _TABLES:
            return _TABLES[tag]({inner(key): inner(each) for key, each in content})
    except (TypeError, ValueError, KeyError) as error:
        raise damaged("manifest.json", f"a value of kind {tag} cannot be right: {error}") from None
    raise damaged("manifest.json", f"there is no kind of value {tag!r}")
