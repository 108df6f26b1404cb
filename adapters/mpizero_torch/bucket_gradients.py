"""Gradients between ``.grad`` and the reducer's buckets, in both directions.

The layout of gradients is the parameters' (torch's gradient layout contract): an optimizer may go
through the memory of both side by side. Where ``.grad`` is a view of a bucket, what it shares is
known by its address, never by which object it is: programs give gradients other memory
(``.grad.data = ...``), and keep those of earlier passes.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence

import torch
from torch import nn

from mpizero import MpizeroError
from mpizero.engine import GradientReducer, Merge
from mpizero.engine.buckets import Bucket
from mpizero_torch import slices, tensors
from mpizero_torch.hooks import check_dense, times

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides


class BucketGradients:
    """The gradients of ``named`` parameters on their way through a reducer's buckets.

    ``own``: after a pass each ``.grad`` is a tensor with memory of its own. Otherwise it is a view
    of its bucket, except where somebody still holds the view of an earlier pass: that one keeps its
    values, and ``.grad`` is a tensor of its own. ``layouts``: the same on all ranks. ``prescale``:
    what gradients are multiplied by before they are summed.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        layouts: Sequence[Layout],
        *,
        own: bool,
        prescale: float = 1.0,
    ) -> None:
        self._names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        self._layouts = list(layouts)
        self._own, self._prescale = own, prescale
        self._any_cut = any(slices.is_slice(parameter) for parameter in self._parameters)
        self._bucket_of: dict[int, Bucket] = {}
        self._views: dict[int, torch.Tensor] = {}  # of bucket memory; nobody else sees them
        self._aliases: dict[int, torch.Tensor] = {}  # of the same, to be given away
        self._pointers: dict[int, int] = {}
        self._strides: dict[int, tuple[int, ...]] = {}
        self._storage_of: dict[int, torch.UntypedStorage] = {}
        self._uses: dict[int, int] = {}  # by whom, while nobody else uses a storage
        self._lent: dict[int, torch.Tensor] = {}  # in a pass: what others hold of that memory
        self._aside: dict[int, torch.Tensor] = {}  # gradients kept from before the pass
        self._merge = Merge()
        # Parameters whose gradients have stayed on this rank.
        self.unreduced: set[int] = set()
        self._generation = -1

    def serve(self, reducer: GradientReducer) -> None:
        """Fill the buckets of this reducer from now on."""
        self._reducer = weakref.ref(reducer)
        self._see()

    def _see(self) -> None:
        """Find the places of gradients, where they have changed."""
        reducer = self._reducer()
        if reducer is None or self._generation == reducer.generation:
            return
        self._generation = reducer.generation
        for bucket in reducer.pieces:
            flat = tensors.as_tensor(bucket.flat)
            new = [
                index
                for index in bucket.members
                if reducer.bucket_of(index) is bucket and self._bucket_of.get(index) is not bucket
            ]
            for index in new:
                self._bucket_of[index] = bucket
                offset = bucket.layout.entries[str(index)].offset
                self._views[index] = view = self._view(flat, offset, index)
                self._pointers[index], self._strides[index] = view.data_ptr(), view.stride()
                self._aliases[index] = self._alias(index)
                # As it is while nobody else holds one: how that is counted is torch's business.
                self._alone = sys.getrefcount(self._aliases[index])
                self._storage_of[index] = view.untyped_storage()
            if new:
                del flat, view
                storage = self._storage_of[new[0]]
                self._uses.update(dict.fromkeys(new, _uses(storage)))

    def trained(self) -> list[bool]:
        """For each parameter: has it a gradient that is to be averaged, or will it get one?"""
        found = [parameter.requires_grad for parameter in self._parameters]
        for index in self.unreduced:
            found[index] = True
        return found

    def fill(self, members: Sequence[int]) -> list[bool]:
        """Bring the gradients of a bucket's parameters into it; says which there are.

        The first gradients of a step arrive in memory of autograd's own: one copy, for a whole
        bucket in one call, where accumulating into zeroed buckets would read and write them twice
        more.
        """
        self._see()
        has: list[bool] = []
        views: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        merges = not self._merge.is_plain
        for index in members:
            parameter, view = self._parameters[index], self._views[index]
            gradient = parameter.grad
            if merges and self._is_averaged(index):
                gradient = self._merged(index)
            if gradient is None:
                has.append(False)
                if self._is_held(index):
                    self._lent[index] = view.clone()
                continue
            shares = self._shares(gradient, index)
            if not self._is_averaged(index):
                # Frozen, with the mean of an earlier pass: nobody's business in this one.
                has.append(False)
                if shares or self._is_held(index):
                    self._lent[index] = view.clone()
                continue
            has.append(True)
            if shares:
                if self._prescale != 1.0:
                    view.mul_(self._prescale)
                continue
            if gradient.is_sparse or gradient.requires_grad:
                check_dense(gradient, self._names[index])
            if self._is_held(index):
                self._lent[index] = view.clone()
            if self._any_cut:
                gradient = self._local(parameter, gradient)
            if gradient.shape != view.shape:
                raise MpizeroError(
                    f"backward(): the gradient of '{self._names[index]}' is of shape "
                    f"{tuple(gradient.shape)}, and was of {tuple(view.shape)} when the parameter "
                    "was wrapped. Wrap the module again after parameters have got another shape."
                )
            views.append(view)
            gradients.append(gradient)
            if not self._own and index not in self._lent and self._fits(index):
                parameter.grad = self._given(index)  # the other memory is free again
        if views:
            torch._foreach_copy_(views, gradients)
            if self._prescale != 1.0:
                torch._foreach_mul_(views, self._prescale)
        return has

    def take_over(self, anywhere: Sequence[bool]) -> None:
        """Let ``.grad`` be the averaged gradient, where any rank has one."""
        self._see()
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for index, view in self._views.items():
            if not anywhere[index]:
                continue
            if not self._own and index not in self._lent:
                parameter, alias = self._parameters[index], self._aliases[index]
                if parameter.grad is alias:
                    continue
                if self._fits(index):
                    parameter.grad = self._given(index)
                    continue
            targets.append(slices.local(self._target(index)))
            sources.append(view)
        if targets:
            torch._foreach_copy_(targets, sources)
        for index, values in self._lent.items():
            self._views[index].copy_(values)
        self._lent.clear()
        self.bring_back()
        self.unreduced.clear()

    def lend(self) -> None:
        """Before a pass that fills nothing in: keep what others hold of the buckets' memory."""
        self._see()
        for index, view in self._views.items():
            if self._is_held(index):
                self._lent[index] = view.clone()

    def give_back(self) -> None:
        """There was no such pass."""
        self._lent.clear()

    def put_aside(self, merge: Merge) -> None:
        """Keep what there is apart from the gradients that are about to come."""
        self._merge = merge
        for index, parameter in enumerate(self._parameters):
            if parameter.grad is not None and self._is_averaged(index):
                self._aside[index] = parameter.grad
                parameter.grad = None

    def bring_back(self) -> None:
        """Put back what was put aside and nobody has asked for since."""
        for index, gradient in self._aside.items():
            self._parameters[index].grad = gradient
        self._aside.clear()
        self._merge = Merge()

    def keep(self) -> None:
        """What has come stays on this rank, added to what was put aside."""
        if not self._merge.is_plain:
            for index in range(len(self._parameters)):
                if self._is_averaged(index):
                    self._merged(index)
            self._merge = Merge()
        self.unreduced.update(
            index
            for index, each in enumerate(self._parameters)
            if each.grad is not None and self._is_averaged(index)
        )

    def _is_averaged(self, index: int) -> bool:
        """Or is the parameter frozen, with the mean of an earlier pass, if any?"""
        return self._parameters[index].requires_grad or index in self.unreduced

    def _merged(self, index: int) -> torch.Tensor | None:
        """Let ``.grad`` be what was put aside and what has come, as the pass adds them."""
        parameter = self._parameters[index]
        gradient, kept = parameter.grad, self._aside.pop(index, None)
        for each in (gradient, kept):
            if each is not None:
                check_dense(each, self._names[index])
        terms = (times(kept, self._merge.keep), times(gradient, self._merge.new))
        found = [each for each in terms if each is not None]
        if found:
            parameter.grad = found[0] if len(found) == 1 else found[0] + found[1]
        elif gradient is not None or kept is not None:
            parameter.grad = torch.zeros_like(parameter)  # it weighs nothing, but it is there
        return parameter.grad

    def _view(self, flat: torch.Tensor, offset: int, index: int) -> torch.Tensor:
        """A parameter's place in a bucket, laid out as the parameter is; no view to torch."""
        shape, strides = self._layouts[index]
        made = torch.empty(0, dtype=flat.dtype, device=flat.device)
        made.set_(flat.untyped_storage(), flat.storage_offset() + offset, shape, strides)
        return made

    def _alias(self, index: int) -> torch.Tensor:
        """The same memory as another object, to be given away."""
        return slices.wrap(self._views[index].detach(), self._parameters[index])

    def _shares(self, gradient: torch.Tensor, index: int) -> bool:
        """Is that gradient the parameter's place in its bucket?"""
        if gradient is not self._aliases[index]:
            return False
        return self._given(index) is gradient

    def _given(self, index: int) -> torch.Tensor:
        """The view that is given away: another object if that one has got other memory since."""
        alias, view = self._aliases[index], self._views[index]
        local = slices.local(alias) if self._any_cut else alias
        same = local.data_ptr() == self._pointers[index] and local.shape == view.shape
        if not (same and local.stride() == self._strides[index] and local.dtype == view.dtype):
            alias = self._aliases[index] = self._alias(index)
        return alias

    def _fits(self, index: int) -> bool:
        """May ``.grad`` be the bucket's memory: is it laid out as the parameter is now?"""
        parameter: torch.Tensor = self._parameters[index]
        if self._any_cut:
            parameter = slices.local(parameter)
        strides = self._strides[index]
        if parameter.dtype != self._views[index].dtype:
            return False
        return len(strides) < 2 or parameter.stride() == strides or not _is_dense(parameter)

    def _is_held(self, index: int) -> bool:
        """Does somebody hold the view that was this parameter's gradient after an earlier pass?"""
        if self._own:
            return False
        if sys.getrefcount(self._aliases[index]) > self._alone:
            return True
        return _uses(self._storage_of[index]) > self._uses[index]

    def _target(self, index: int) -> torch.Tensor:
        """A gradient tensor with memory of its own, laid out as the parameter is."""
        parameter = self._parameters[index]
        gradient = parameter.grad
        shares = gradient is not None and (
            slices.local(gradient).data_ptr() == self._pointers[index] or gradient.is_sparse
        )
        if gradient is None or shares or gradient.dtype != parameter.dtype:
            gradient = slices.wrap(torch.empty_like(slices.local(parameter)), parameter)
            parameter.grad = gradient
        return gradient

    def _local(self, parameter: nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
        parameter.grad = gradient
        found = slices.local_gradient(parameter)
        assert found is not None  # it has just been given one
        return found


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
