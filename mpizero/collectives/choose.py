"""Which algorithm runs a collective: the one place that decides.

The answer depends only on what all ranks have agreed upon (the collective, the size, the dtype,
the place of the memory), so that it is the same on every rank, always.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from numpy.typing import DTypeLike

from mpizero.collectives.tuning import Tuning, case, device_case
from mpizero.memory.dtypes import is_half, kind_of

# They enqueue work on a stream, and never touch the host.
DEVICE_ALGORITHMS = ("nccl",)

# Small device reductions that MPI cannot do keep to few messages; large ones to few bytes.
_SMALL_BYTES = 64 * 1024


@dataclass(frozen=True)
class Place:
    """Where a collective's ranks and memory are, as all ranks see it."""

    one_node: bool
    shared: bool  # the array lies in node-shared memory
    on_device: bool


def choose(
    collective: str, nbytes: int, dtype: DTypeLike, op: str | None, place: Place, tuning: Tuning
) -> str:
    """Name the algorithm that "auto" stands for."""
    if place.on_device:
        if op in ("max", "min") and kind_of(dtype) == "float" and not is_half(dtype):
            # MPI's own MAX and MIN may lose a NaN, and an operation of ours would run on the host.
            return "halving_doubling" if nbytes <= _SMALL_BYTES else "ring"
        return "native"
    if op is None:  # nothing to sum: MPI moves bytes as well as we do
        return "native"
    # The table is of all-reduces; a reduce-scatter is half of one.
    return tuning.algorithm(case(is_half(dtype), place.shared, place.one_node), nbytes) or "native"


def device_order(nbytes: int, one_node: bool, tuning: Tuning) -> Iterable[str]:
    """The algorithms that go from GPU to GPU, in the order in which "auto" takes what there is."""
    first = tuning.algorithm(device_case(one_node), nbytes)
    return dict.fromkeys([*([first] if first in DEVICE_ALGORITHMS else []), *DEVICE_ALGORITHMS])
