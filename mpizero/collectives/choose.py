"""Which algorithm runs a collective: the one place that decides.

The answer depends only on what all ranks have agreed upon (the collective, the size, the dtype,
the place of the memory), so that it is the same on every rank, always.
"""

from __future__ import annotations

from numpy.typing import DTypeLike

from mpizero.memory.dtypes import is_half, kind_of

# Small device reductions that MPI cannot do keep to few messages; large ones to few bytes.
_SMALL_BYTES = 64 * 1024


def choose(
    collective: str, nbytes: int, dtype: DTypeLike, op: str | None, on_device: bool, one_node: bool
) -> str:
    """Name the algorithm that "auto" stands for."""
    if on_device and op in ("max", "min") and kind_of(dtype) == "float" and not is_half(dtype):
        # MPI's own MAX and MIN may lose a NaN, and an operation of ours would run on the host.
        return "halving_doubling" if nbytes <= _SMALL_BYTES else "ring"
    if one_node and not on_device and nbytes > _SMALL_BYTES:
        return "node_shared"
    return "native"
