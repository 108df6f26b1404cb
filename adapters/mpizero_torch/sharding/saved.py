"""What autograd keeps of sharded parameters from forward to backward: where they are, not values.

Hooks on what autograd saves see every tensor of it. One that lies in memory of a unit, be it a
parameter or a view of one, is kept as its place in there; when backward comes to it the unit is
gathered, whatever there was to announce it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mpizero import MpizeroError
from mpizero_torch import slices
from mpizero_torch.sharding.whole_space import hooks_are_allowed, storage_address

if TYPE_CHECKING:
    from mpizero_torch.sharding.schedule import UnitSchedule


class Place(NamedTuple):
    """A tensor that lay in the memory of a unit, as it was after so many changes of the values."""

    unit: int
    space: int  # the number of the unit's space
    offset: Any
    size: Any
    stride: Any
    dtype: torch.dtype
    changes: int
    cut: Any  # how torch had cut it over the ranks, for its slices


class SavedTensors:
    """Hooks for what autograd saves in a forward of the model that ``schedule`` serves."""

    def __init__(self, schedule: UnitSchedule, any_cut: bool) -> None:
        # Weakly: what torch keeps of hooks, Python's collector does not see.
        found = weakref.ref(schedule)
        places, memory = schedule.places, schedule.memory

        def pack(tensor: torch.Tensor) -> Any:
            own = slices.local(tensor) if any_cut else tensor
            try:
                at = places.get(storage_address(own))
            except NotImplementedError:  # a tensor of another kind, as sparse ones are
                at = None
            if at is None or own.is_conj() or own.is_neg():
                # Not the output of a node itself: the two would keep each other for good.
                return tensor if tensor.grad_fn is None else tensor.detach(), own._version
            return Place(
                *at, own.storage_offset(), own.size(), own.stride(), own.dtype,
                memory.changes, slices.cut_of(tensor),
            )  # fmt: skip

        def unpack(packed: Any) -> torch.Tensor:
            if not isinstance(packed, Place):
                return _unchanged(*packed)
            owner = found()
            if owner is None:
                raise MpizeroError(
                    "backward(): the sharded model of this graph is gone, and its parameters with "
                    "it. Keep what mz.zero() gave back until the gradients have been computed."
                )
            return slices.put_together(owner.recall(packed), packed.cut)

        self._hooks: tuple[Callable[[Any], Any], Callable[[Any], Any]] = pack, unpack
        self.is_open = False

    def open(self) -> bool:
        """Begin to see what autograd saves; returns False where torch would not have it.

        Where the user's own hooks are at work (a checkpoint's, or those that offload activations)
        they stay in charge: what is kept under them is theirs, and keeps its memory.
        """
        if not hooks_are_allowed():
            return False  # within a transform of torch.func
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            torch._C._autograd._push_saved_tensors_default_hooks(*self._hooks)
            self.is_open = True
        return True

    def close(self) -> None:
        """End what ``open`` has begun."""
        if self.is_open:
            self.is_open = False
            top = torch._C._autograd._top_saved_tensors_default_hooks(True)
            if top is not None and top[0] is self._hooks[0]:
                torch._C._autograd._pop_saved_tensors_default_hooks()


def _unchanged(tensor: torch.Tensor, version: int) -> torch.Tensor:
    """What was saved; RuntimeError if it has been written to, which torch leaves to its hooks."""
    now = slices.local(tensor)._version
    if now != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a tensor of shape {list(tensor.shape)} is at version {now}; expected "
            f"version {version} instead."
        )
    return tensor
