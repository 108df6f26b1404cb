"""Parts of whole tensors, as ranges of a checkpoint."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mpizero
from mpizero.checkpoint import Box, read_box


@st.composite
def boxes(draw: Any) -> Box:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=4)))
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    sizes = tuple(draw(st.integers(0, size - at)) for at, size in zip(offsets, shape, strict=True))
    return Box(shape, offsets, sizes)


class Whole:
    """A stored tensor whose elements are their own places."""

    path, values = Path("nowhere"), {}

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.flat = np.arange(int(np.prod(shape)))
        self.read_elements = 0

    def borrow(self, part: str, name: str, elements: slice) -> Any:
        self.read_elements += elements.stop - elements.start
        return self.flat[elements].copy()


@given(boxes(), st.data())
def test_strips_are_where_numpy_finds_the_elements(box: Box, data: Any) -> None:
    whole = Whole(box.shape)
    place = tuple(
        slice(offset, offset + size) for offset, size in zip(box.offsets, box.sizes, strict=True)
    )
    expected = whole.flat.reshape(box.shape)[place].reshape(-1)
    assert box.count == expected.size
    start = data.draw(st.integers(0, box.count))
    wanted = slice(start, data.draw(st.integers(start, box.count)))
    found = np.full(wanted.stop - wanted.start, -1)
    strips = list(box.strips(wanted))
    for first, which in strips:
        stop = first + which.stop - which.start
        found[which.start - start : which.stop - start] = whole.flat[first:stop]
    assert found.tolist() == expected[wanted].tolist()
    # As long as can be: one strip does not end where the next begins.
    for (first, which), (following, _) in pairwise(strips):
        assert first + which.stop - which.start < following or box.is_whole
    read = read_box(whole, "p", "n", box, wanted)  # type: ignore[arg-type]
    assert read.tolist() == expected[wanted].tolist()
    cover = box.cover(wanted)
    if wanted.stop > wanted.start:
        assert (cover.start, cover.stop - 1) == (expected[wanted][0], expected[wanted][-1])
    assert whole.read_elements == cover.stop - cover.start


def test_a_box_is_within_its_tensor() -> None:
    for offsets, sizes in product([(0, 3), (-1, 0)], [(2, 2), (3, 1)]):
        with pytest.raises(mpizero.ArgumentError, match="a part of the whole"):
            Box((2, 4), offsets, sizes)
