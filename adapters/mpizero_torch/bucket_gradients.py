"""Gradients between ``.grad`` and the reducer's buckets, in both directions."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from operator import attrgetter

import torch
from torch import nn

from mpizero import MpizeroError
from mpizero.engine import GradientReducer, Merge
from mpizero.engine.buckets import Bucket
from mpizero_torch import slices, tensors
from mpizero_torch.bucket_places import BucketMemory, Layout, Place
from mpizero_torch.hooks import check_dense, times


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
        self._memories: dict[int, BucketMemory] = {}  # by the identity of buckets
        self._places: dict[int, Place] = {}  # the latest of each parameter
        self._lent: dict[Place, torch.Tensor] = {}  # in a pass: what others hold of that memory
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
        self._generation, before = reducer.generation, self._memories
        self._memories = {}
        for bucket in reducer.pieces:
            memory = before.get(id(bucket)) or self._lay_out(bucket)
            self._memories[id(bucket)] = memory
            for index, place in memory.places.items():
                if reducer.bucket_of(index) is bucket:
                    self._places[index] = place

    def _lay_out(self, bucket: Bucket) -> BucketMemory:
        flat = tensors.as_tensor(bucket.flat)
        offsets = [bucket.layout.entries[str(index)].offset for index in bucket.members]
        places = [
            Place(self._parameters[index], flat, offset, self._layouts[index])
            for index, offset in zip(bucket.members, offsets, strict=True)
        ]
        memory = BucketMemory(bucket, flat)
        del flat
        memory.serve(bucket.members, places)
        return memory

    def trained(self) -> list[bool]:
        """For each parameter: has it a gradient that is to be averaged, or will it get one?"""
        found = list(map(attrgetter("requires_grad"), self._parameters))
        for index in self.unreduced:
            found[index] = True
        return found

    def fill(self, bucket: Bucket, members: Sequence[int]) -> list[bool]:
        """Bring the gradients of these members of a bucket into it; says which there are.

        The first gradients of a step arrive in memory of autograd's own: one copy, for a whole
        bucket in one call, where accumulating into zeroed buckets would read and write them twice
        more.
        """
        self._see()
        memory = self._memories[id(bucket)]
        merges, keeps_view = not self._merge.is_plain, not self._own
        is_whole = not merges and keeps_view and self._prescale == 1.0
        everyone = len(members) == len(memory.places)
        if is_whole and everyone and memory.take_all():
            return [True] * len(members)
        has: list[bool] = []
        views: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        held = keeps_view and memory.is_held()
        if keeps_view and not everyone:
            self._lend(memory, held, apart_from=members)
        for index in members:
            place = self._places[index]
            parameter = place.parameter
            is_averaged = parameter.requires_grad or index in self.unreduced
            gradient = self._merged(index) if merges and is_averaged else parameter.grad
            # A frozen one with the mean of an earlier pass is nobody's business in this one.
            comes = is_averaged and gradient is not None
            has.append(comes)
            shares = gradient is place.alias
            if comes and shares:
                if self._prescale != 1.0:
                    place.view.mul_(self._prescale)
                continue
            is_lent = shares or (keeps_view and (held or place.is_given_away()))
            if is_lent:
                self._lent[place] = place.view.clone()
            if gradient is None or not comes:
                continue
            if gradient.is_sparse or gradient.requires_grad:
                check_dense(gradient, self._names[index])
            if self._any_cut:
                gradient = self._local(parameter, gradient)
            if gradient.shape != place.shape:
                raise MpizeroError(
                    f"backward(): the gradient of '{self._names[index]}' is of shape "
                    f"{tuple(gradient.shape)}, and was of {place.shape} when the parameter "
                    "was wrapped. Wrap the module again after parameters have got another shape."
                )
            views.append(place.view)
            gradients.append(gradient)
            if keeps_view and not is_lent and place.fits():
                parameter.grad = place.alias  # the other memory is free again
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
        keeps_view = not self._own
        for index, place in self._places.items():
            if not anywhere[index]:
                continue
            if keeps_view and place not in self._lent:
                parameter = place.parameter
                if parameter.grad is place.alias:
                    continue
                if place.fits():
                    parameter.grad = place.alias
                    continue
            targets.append(slices.local(self._target(place)))
            sources.append(place.view)
        if targets:
            torch._foreach_copy_(targets, sources)
        for place, values in self._lent.items():
            place.view.copy_(values)
        self._lent.clear()
        self.bring_back()
        self.unreduced.clear()

    def lend(self) -> None:
        """Before a pass that fills nothing in: keep what others hold of the buckets' memory."""
        self._see()
        if self._own:
            return
        for memory in self._memories.values():
            self._lend(memory, memory.is_held(), apart_from=())

    def _lend(self, memory: BucketMemory, held: bool, *, apart_from: Collection[int]) -> None:
        """Keep what others hold, also where gradients lay that have another place now."""
        apart = set(apart_from)
        for index, place in memory.places.items():
            if index not in apart and (held or place.is_given_away()):
                self._lent[place] = place.view.clone()

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

    def _target(self, place: Place) -> torch.Tensor:
        """A gradient tensor with memory of its own, laid out as the parameter is."""
        parameter = place.parameter
        gradient = parameter.grad
        shares = gradient is not None and (place.is_memory_of(gradient) or gradient.is_sparse)
        if gradient is None or shares or gradient.dtype != parameter.dtype:
            gradient = slices.wrap(torch.empty_like(slices.local(parameter)), parameter)
            parameter.grad = gradient
        return gradient

    def _local(self, parameter: nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
        parameter.grad = gradient
        found = slices.local_gradient(parameter)
        assert found is not None  # it has just been given one
        return found
