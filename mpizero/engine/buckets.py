"""Gradient buckets: flat memory in which gradients lie, reduced a bucket at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpizero.engine.passes import Piece
from mpizero.engine.specs import ParameterSpec
from mpizero.layout import FlatLayout
from mpizero.memory.arrays import on_device

Allocate = Callable[[int, Any], Any]  # (elements, dtype) -> zeroed 1-D memory

# Behind its gradients a bucket carries two numbers for each of them: is there a gradient at all,
# and has one come since the last average? Summed with the rest, they tell every rank for free. To
# read them on a device the host would have to wait for it: there they have memory of their own.
_USED, _FRESH = "(used)", "(fresh)"


@dataclass(kw_only=True)
class Bucket(Piece):
    """Some parameters' gradients in one flat array, and how far their reduction is."""

    layout: FlatLayout
    flat: Any
    views: dict[int, Any]
    used: Any  # one element per member, 0 or more: has any rank a gradient for it?
    fresh: Any  # the same: has one come on any rank, that was not averaged before?
    marks: Any = None  # ``used`` and ``fresh``, where they are on the host and the rest is not

    @property
    def gradients(self) -> Any:
        """The flat array without ``used``."""
        if self.marks is not None:
            return self.flat
        return self.flat[: self.layout.entries[_USED].offset]


def cut_into_buckets(
    specs: Sequence[ParameterSpec], order: Sequence[int], first_bytes: int, bytes_each: int
) -> list[tuple[int, ...]]:
    """Group parameters, in the ``order`` in which their gradients come, into buckets by dtype.

    The first bucket is small, so that communication starts early; a parameter larger than
    ``bytes_each`` has one of its own. Buckets are listed in the order in which they fill.
    """
    finished: list[tuple[int, ...]] = []
    filling: dict[np.dtype[Any], list[int]] = {}
    filled_bytes: dict[np.dtype[Any], int] = {}
    for index in order:
        dtype = specs[index].dtype
        filling.setdefault(dtype, []).append(index)
        filled_bytes[dtype] = filled_bytes.get(dtype, 0) + specs[index].nbytes
        if filled_bytes[dtype] >= (bytes_each if finished else first_bytes):
            finished.append(tuple(filling.pop(dtype)))
            del filled_bytes[dtype]
    position = {index: at for at, index in enumerate(order)}
    rest = sorted((tuple(members) for members in filling.values()), key=lambda m: position[m[-1]])
    return finished + rest


def make_bucket(
    specs: Sequence[ParameterSpec], members: tuple[int, ...], allocate: Allocate
) -> Bucket:
    """Lay ``members`` out in newly allocated memory."""
    dtype = specs[members[0]].dtype
    shapes = [(str(index), specs[index].shape) for index in members]
    count = len(members)
    behind = [(_USED, (count,)), (_FRESH, (count,))]
    layout = FlatLayout.of([*shapes, *behind], dtype)
    flat = allocate(layout.size, dtype)
    views = {index: layout.view(flat, str(index)) for index in members}
    if on_device(flat):
        marks = np.zeros(2 * count)
        return Bucket(
            members=members, layout=layout, flat=flat, views=views,
            used=marks[:count], fresh=marks[count:], marks=marks,
        )  # fmt: skip
    used, fresh = layout.view(flat, _USED), layout.view(flat, _FRESH)
    return Bucket(members=members, layout=layout, flat=flat, views=views, used=used, fresh=fresh)
