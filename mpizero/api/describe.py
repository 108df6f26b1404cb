"""A call in words, as the other ranks are told it; and is ``out`` of the form that it must have?"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from mpizero.errors import ArgumentError
from mpizero.memory.arrays import OpenArray


def check_form(function: str, out: OpenArray, shape: tuple[int, ...], dtype: Any) -> None:
    if out.shape != shape or out.dtype != dtype:
        raise ArgumentError(
            function,
            "out",
            f"an array of {out.dtype}, shape {out.shape}",
            f"an array of {dtype}, shape {shape}",
        )


def describe(function: str, array: OpenArray, *options: object) -> str:
    # Host and device arrays travel in different messages, so ranks must not mix them.
    place = "" if isinstance(array.array, np.ndarray) else " on a GPU"
    return _sentence(function, array.dtype, array.shape, place, options)


def describe_rows(function: str, array: OpenArray) -> str:
    """``describe`` for what has another number of rows on each rank."""
    place = "" if isinstance(array.array, np.ndarray) else " on a GPU"
    rest = "".join(f", {extent}" for extent in array.shape[1:])
    return f"{function}({array.dtype}, rows of shape (*{rest}){place})"


@lru_cache(maxsize=4096)  # names of dtypes are slow to make, and training repeats its calls
def _sentence(
    function: str, dtype: Any, shape: tuple[int, ...], place: str, options: tuple[object, ...]
) -> str:
    return f"{function}({dtype}, shape {shape}{place}; {', '.join(map(str, options))})"
