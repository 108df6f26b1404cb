"""A call in words, as the other ranks are told it; and is ``out`` of the form that it must have?"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from mpizero.errors import ArgumentError
from mpizero.memory.arrays import OpenArray, on_device


def check_form(
    function: str, out: OpenArray, shape: tuple[int, ...], dtype: Any, source: OpenArray
) -> None:
    """Raise ArgumentError unless ``out`` is of this form, and on the host or a GPU as x is."""
    moved = on_device(out.array) != on_device(source.array)
    if out.shape != shape or out.dtype != dtype or moved:
        given, allowed = _place(out.array, moved), _place(source.array, moved)
        raise ArgumentError(
            function,
            "out",
            f"an array of {out.dtype}, shape {out.shape}{given}",
            f"an array of {dtype}, shape {shape}{allowed}",
        )


def _place(array: Any, differs: bool) -> str:
    if on_device(array):
        return " on a GPU"
    return " in host memory" if differs else ""


def describe(function: str, array: OpenArray, *options: object) -> str:
    # Host and device arrays travel in different messages, so ranks must not mix them.
    place = _place(array.array, False)
    return _sentence(function, array.dtype, array.shape, place, options)


def describe_rows(function: str, array: OpenArray) -> str:
    """``describe`` for what has another number of rows on each rank."""
    place = _place(array.array, False)
    rest = "".join(f", {extent}" for extent in array.shape[1:])
    return f"{function}({array.dtype}, rows of shape (*{rest}){place})"


@lru_cache(maxsize=4096)  # names of dtypes are slow to make, and training repeats its calls
def _sentence(
    function: str, dtype: Any, shape: tuple[int, ...], place: str, options: tuple[object, ...]
) -> str:
    return f"{function}({dtype}, shape {shape}{place}; {', '.join(map(str, options))})"
