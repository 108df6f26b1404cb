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
from torch import nn

from mpizero import MpizeroError
from mpizero_torch import slices
from mpizero_torch.sharding.whole_space import hooks_are_allowed, storage_address

if TYPE_CHECKING:
    from mpizero_torch.sharding.schedule import UnitSchedule


Hooks = tuple[Callable[[Any], Any], Callable[[Any], Any]]


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

        def place_of(own: torch.Tensor) -> tuple[int, int] | None:
            try:
                return places.get(storage_address(own))
            except NotImplementedError:  # a tensor of another kind, as sparse ones are
                return None

        def pack(tensor: torch.Tensor) -> Any:
            own = slices.local(tensor) if any_cut else tensor
            at = place_of(own)
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

        def is_of_unit(tensor: torch.Tensor) -> bool:
            own = slices.local(tensor) if any_cut else tensor
            return isinstance(tensor, nn.Parameter) and place_of(own) is not None

        self._hooks: Hooks = pack, unpack
        self._is_of_unit = is_of_unit
        self._own = {pack}  # by which hooks of ours are known

    def open(self) -> tuple[bool, bool]:
        """Begin to see what autograd saves: (does torch allow it, must ``close`` end it).

        Where somebody else's hooks are at work (a checkpoint's, or those that offload activations)
        they stay in charge: what is kept under them is theirs, and keeps its memory.
        """
        if not hooks_are_allowed():
            return False, False  # within a transform of torch.func
        top: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if top is not None and top[0] in self._own:
            return True, False
        torch._C._autograd._push_saved_tensors_default_hooks(*self._on(top))
        return True, True

    def close(self) -> None:
        """End what ``open`` has begun."""
        top: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if top is not None and top[0] in self._own:
            torch._C._autograd._pop_saved_tensors_default_hooks()
            if top[0] is not self._hooks[0]:
                self._own.discard(top[0])

    def _on(self, others: Hooks | None) -> Hooks:
        """Hooks to lie on those of others, who shall not be given a parameter itself.

        They could keep the object, which does not show; of a tensor in its memory it shows.
        """
        if others is None:
            return self._hooks
        their_pack, their_unpack = others

        def pack(tensor: torch.Tensor) -> Any:
            return their_pack(tensor.detach() if self._is_of_unit(tensor) else tensor)

        self._own.add(pack)
        return pack, their_unpack


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
