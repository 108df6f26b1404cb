"""How flat memory is cut among parts: what every cut must keep, whatever the parameters."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpizero.engine.partition import Space, balanced_owners, cut_by_parameter, cut_flat
from mpizero.engine.specs import ParameterSpec
from mpizero.layout import ALIGNMENT_BYTES

pytestmark = pytest.mark.once

shapes = st.lists(
    st.lists(st.integers(0, 40), max_size=2).map(tuple), min_size=1, max_size=12
)  # scalars and empty ones too
parts_of = st.integers(1, 9)
segment_bytes_of = st.sampled_from([1, 256, 4096, 1 << 20])
dtypes = st.sampled_from([np.float16, np.float32, np.float64])


def specs_of(found: list[tuple[int, ...]], dtype: object) -> list[ParameterSpec]:
    return [ParameterSpec(f"p{i}", shape, np.dtype(dtype)) for i, shape in enumerate(found)]


def owner_of_each_element(space: Space, parts: int) -> np.ndarray:
    """Which part has each element of a space; fails if two have it, or none."""
    owner = np.full(space.size, -1)
    end = 0
    for segment in space.segments:
        assert segment.start == end and len(segment.blocks) == parts
        end = segment.stop
        for part in range(parts):
            block = segment.block(part)
            assert (owner[block] == -1).all()
            owner[block] = part
    assert end == space.size and (owner >= 0).all()
    return owner


def assert_members_are_those_inside(space: Space) -> None:
    """A large parameter is also a member of the segment of its padding alone."""
    for segment in space.segments:
        for index in space.members:
            place = space.place(index)
            inside = place.start < segment.stop and segment.start < place.stop
            if inside and place.stop > place.start:
                assert index in segment.members
            if index in segment.members and len(segment.members) > 1:
                assert inside or place.start == place.stop


@given(shapes, parts_of, segment_bytes_of, dtypes)
def test_flat_cuts_are_even_and_on_cache_lines(
    found: list[tuple[int, ...]], parts: int, segment_bytes: int, dtype: object
) -> None:
    specs = specs_of(found, dtype)
    space = cut_flat(specs, range(len(specs)), parts, segment_bytes)
    counts = np.bincount(owner_of_each_element(space, parts), minlength=parts)
    assert len(set(counts)) == 1
    line = ALIGNMENT_BYTES // specs[0].dtype.itemsize
    for segment in space.segments:
        for part in range(parts):
            assert segment.block(part).start % line == 0
            # No larger than asked, unless it is as small as it can be.
            assert segment.size * specs[0].dtype.itemsize <= max(
                segment_bytes, parts * ALIGNMENT_BYTES
            )
    assert_members_are_those_inside(space)
    assert all(space.shard_size(part) == counts[part] for part in range(parts))


@given(shapes, parts_of, segment_bytes_of, dtypes)
def test_cuts_by_parameter_leave_each_whole(
    found: list[tuple[int, ...]], parts: int, segment_bytes: int, dtype: object
) -> None:
    specs = specs_of(found, dtype)
    owners = balanced_owners(specs, parts)
    space = cut_by_parameter(specs, range(len(specs)), owners, parts, segment_bytes)
    owner = owner_of_each_element(space, parts)
    assert_members_are_those_inside(space)
    for index, spec in enumerate(specs):
        place = space.place(index)
        assert place.stop - place.start == prod(spec.shape)
        assert (owner[place] == owners[index]).all()
        if not prod(spec.shape):
            continue
        for part in range(parts):
            own = space.owned_place(index, part)
            assert (own is not None) == (part == owners[index])
            if own is not None:
                assert own.stop - own.start == prod(spec.shape) <= space.shard_size(part)


@given(shapes, parts_of)
def test_owners_are_balanced(found: list[tuple[int, ...]], parts: int) -> None:
    """Graham's bound, against what no assignment can do better than."""
    specs = specs_of(found, np.float32)
    owners = balanced_owners(specs, parts)
    sizes = [prod(spec.shape) for spec in specs]
    load = [sum(s for s, o in zip(sizes, owners, strict=True) if o == p) for p in range(parts)]
    descending = sorted(sizes, reverse=True)
    two_on_one = sum(descending[parts - 1 : parts + 1]) if len(sizes) > parts else 0
    least = max(sum(sizes) / parts, descending[0], two_on_one)
    assert max(load) <= 4 / 3 * least + 1e-9
