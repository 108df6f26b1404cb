"""A gradient's place in a bucket, and who else holds its memory.

The layout of gradients is the parameters' (torch's gradient layout contract): an optimizer may go
through the memory of both side by side. Where ``.grad`` is a view of a bucket, what it shares is
known by its address, never by which object it is: programs give gradients other memory
(``.grad.data = ...``), and keep those of earlier passes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import nn

from mpizero.engine.buckets import Bucket
from mpizero_torch import slices

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides

_IS_SPARSE, _IS_TRAINED, _DTYPE = map(attrgetter, ("is_sparse", "requires_grad", "dtype"))


class Place:
    """Where in ``flat`` memory the gradient of ``parameter`` lies, laid out as ``form`` says.

    ``view`` is that memory, and nobody else's object. ``alias`` is the same memory as another
    object, which is given away as ``.grad``.
    """

    __slots__ = (
        "alias",
        "alone",
        "dtype",
        "is_cut",
        "parameter",
        "pointer",
        "shape",
        "strides",
        "view",
    )

    def __init__(
        self, parameter: nn.Parameter, flat: torch.Tensor, offset: int, form: Layout
    ) -> None:
        self.parameter = parameter
        self.shape, self.strides = form
        self.dtype = flat.dtype
        self.is_cut = slices.is_slice(parameter)
        # No view to torch: those know each other.
        self.view = torch.empty(0, dtype=flat.dtype, device=flat.device)
        self.view.set_(flat.untyped_storage(), flat.storage_offset() + offset, *form)
        self.pointer = self.view.data_ptr()
        self.new_alias()
        self.alone = 0

    def new_alias(self) -> None:
        self.alias = slices.wrap(self.view.detach(), self.parameter)

    def is_given_away(self) -> bool:
        """Does somebody hold the alias? (As ``.grad`` alone, it does not count.)"""
        return sys.getrefcount(self.alias) > self.alone

    def fits(self) -> bool:
        """May ``.grad`` be this memory: is it laid out as the parameter is now?"""
        parameter: torch.Tensor = self.parameter
        if self.is_cut:
            parameter = slices.local(parameter)
        if parameter.dtype != self.dtype:
            return False
        strides = self.strides
        return len(strides) < 2 or parameter.stride() == strides or not _is_dense(parameter)

    def is_memory_of(self, tensor: torch.Tensor) -> bool:
        """Does a tensor lie where this gradient does?"""
        return slices.local(tensor).data_ptr() == self.pointer


class BucketMemory:
    """The memory of one bucket, and the places in it.

    Looks at all of them in few calls: there may be hundreds, in a step of some milliseconds.
    """

    def __init__(self, bucket: Bucket, flat: torch.Tensor) -> None:
        self._bucket = bucket  # it is known by its identity, which must not be another's
        self._storage = flat.untyped_storage()
        self._dtypes = {flat.dtype}

    def serve(self, numbers: Sequence[int], places: Sequence[Place]) -> None:
        """These lie in it, by their numbers; whatever holds the memory now is ours."""
        self.places = dict(zip(numbers, places, strict=True))
        self._places = list(places)
        self._parameters = [place.parameter for place in places]
        self._views = [place.view for place in places]
        self._aliases = [place.alias for place in places]
        self._any_cut = any(place.is_cut for place in places)
        self._pointers = [place.pointer for place in places]
        self._strides = [place.strides for place in places]
        self._shapes = [place.shape for place in places]
        for place in places:
            # As it is while nobody else has it: how that is counted is torch's business.
            place.alone = sys.getrefcount(place.alias)
        self._alone = max(map(sys.getrefcount, self._aliases), default=0)
        self._uses = _uses(self._storage)

    def is_held(self) -> bool:
        """Does somebody hold the memory, from after an earlier pass? (Aliases apart.)

        Those that have got other memory are renewed first: they would make up for strangers.
        """
        own = self._aliases
        if self._any_cut:
            own = [slices.local(alias) for alias in own]
        lie_here = list(map(torch.Tensor.data_ptr, own)) == self._pointers
        if not lie_here or list(map(torch.Tensor.stride, own)) != self._strides:
            self._renew()
        del own
        return _uses(self._storage) > self._uses

    def _renew(self) -> None:
        for number, place in enumerate(self._places):
            own = slices.local(place.alias)
            same = own.data_ptr() == place.pointer and own.stride() == place.strides
            if not (same and own.shape == place.shape and own.dtype == place.dtype):
                place.new_alias()
                self._aliases[number] = place.alias

    def take_all(self) -> bool:
        """Do what is usual: copy all gradients here at once, and let ``.grad`` be this memory.

        False, and nothing has been done, if anything about any of them is unusual.
        """
        parameters, aliases = self._parameters, self._aliases
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        if set(map(type, gradients)) != {torch.Tensor} or any(map(is_, gradients, aliases)):
            return False
        usual = (
            not any(map(_IS_SPARSE, gradients))
            and not any(map(_IS_TRAINED, gradients))
            and all(map(_IS_TRAINED, parameters))
            and set(map(_DTYPE, parameters)) == self._dtypes
            and list(map(torch.Tensor.size, gradients)) == self._shapes
            and list(map(torch.Tensor.stride, parameters)) == self._strides
            and not self.is_held()
            and max(map(sys.getrefcount, aliases)) <= self._alone
        )
        if not usual:
            return False
        torch._foreach_copy_(self._views, gradients)
        for parameter, alias in zip(parameters, aliases, strict=True):
            parameter.grad = alias  # the other memory is free again
        return True


def layout(parameter: torch.Tensor) -> Layout:
    """How a parameter's gradient lies in memory: as it does, if it has no gaps or overlaps."""
    own = slices.local(parameter)
    if not _is_dense(own):
        own = torch.empty(own.shape, device="meta")
    return tuple(own.shape), tuple(own.stride())


def _is_dense(tensor: torch.Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def _uses(storage: torch.UntypedStorage) -> int:
    """How many tensors and others hold a storage."""
    return int(torch._C._storage_Use_Count(storage._cdata))
