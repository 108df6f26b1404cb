"""Gradients of replicas: averaged in the reducer's buckets, which every rank keeps whole."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from mpizero.engine import GradientReducer, Merge, ParameterSpec
from mpizero_torch import slices, tensors
from mpizero_torch.alike import Alike
from mpizero_torch.bucket_gradients import BucketGradients
from mpizero_torch.bucket_places import Layout
from mpizero_torch.hooks import BackwardHooks, Owner

Make = Callable[
    [BucketGradients, Callable[[], Mapping[int, ParameterSpec]], Callable[[], float]],
    GradientReducer,
]


class ReplicaHooks(BackwardHooks):
    """Has a GradientReducer average the gradients of ``named`` parameters.

    ``make_reducer`` is given what fills gradients into the reducer's buckets, what says which
    parameters have got another dtype, and what marks writes to them. ``own_gradients``: see
    BucketGradients. ``alike``: are replicas to have the same parameters?
    """

    _reducer: GradientReducer

    def __init__(
        self,
        owner: Owner,
        named: Sequence[tuple[str, nn.Parameter]],
        make_reducer: Make,
        *,
        layouts: Sequence[Layout],
        own_gradients: bool,
        alike: bool,
    ) -> None:
        self._after: list[AfterAverage] = []
        self._handles: list[Any] = []
        self._gradients = BucketGradients(named, layouts, own=own_gradients)
        forms = Forms(named)
        self._alike = Alike(named if alike else ())
        super().__init__(owner, make_reducer(self._gradients, forms.changed, self._alike.mark))
        self.watch(list(enumerate(parameter for _, parameter in named)))
        self._after = [AfterAverage.of(parameter) for _, parameter in named]
        self._gradients.serve(self._reducer)

    @property
    def bucket_bytes(self) -> int:
        return sum(int(bucket.flat.nbytes) for bucket in self._reducer.pieces)

    def kept(self, parameter: torch.Tensor) -> torch.Tensor | None:
        return slices.local_gradient(parameter)

    def shadow(self) -> bool:
        self._gradients.lend()
        taking_part = super().shadow()
        if not taking_part:
            self._gradients.give_back()
        return taking_part

    def remove(self) -> None:
        super().remove()
        while self._after:
            self._after.pop().give_back()

    def __del__(self) -> None:
        self.remove()  # the parameters' other hooks are called by torch again

    def _after_average(self, active: bool) -> None:
        super()._after_average(active)
        self._alike.check(self._owner.world, self._reducer.told, active)

    def _any_kept(self) -> bool:
        return any(p.grad is not None and bool(p.grad.any()) for p in self._parameters)

    def _put_aside(self, merge: Merge) -> None:
        self._gradients.put_aside(merge)

    def _bring_back(self) -> None:
        self._gradients.bring_back()

    def _keep(self) -> None:
        self._gradients.keep()

    def _take_over(self, anywhere: list[bool]) -> None:
        self._gradients.take_over(anywhere)
        if not any(after.others for after in self._after):
            return
        fresh = self._reducer.fresh
        for parameter, after, comes in zip(self._parameters, self._after, fresh, strict=True):
            if comes and after.others and parameter.grad is not None:
                after.call(parameter)


class Forms:
    """The dtypes of parameters, and which have changed: by ``module.half()``, for instance."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        self._named = list(named)
        self._each = [parameter for _, parameter in named]
        self._dtypes = [parameter.dtype for parameter in self._each]

    def changed(self) -> Mapping[int, ParameterSpec]:
        """What gradients have become since the last time, by their numbers."""
        now = list(map(attrgetter("dtype"), self._each))
        if now == self._dtypes:
            return {}
        before, self._dtypes = self._dtypes, now
        return {
            index: parameter_spec(*self._named[index])
            for index in range(len(now))
            if now[index] != before[index]
        }


def parameter_spec(name: str, parameter: nn.Parameter) -> ParameterSpec:
    """What the engine is to know of a parameter: its part on this rank."""
    dtype = tensors.numpy_dtype(parameter.dtype)
    return ParameterSpec(name, tuple(slices.local(parameter).shape), dtype)


class AfterAverage(OrderedDict):  # type: ignore[type-arg]
    """A parameter's hooks on accumulated gradients: others' wait until theirs is averaged.

    Such a hook takes the optimizer's step, say, with this one gradient. torch calls what lies in
    this dictionary; what others put in it, before or after, is kept beside and called afterwards.
    Under ``no_sync`` there is no average, and they are not called.
    """

    def __init__(self, own: Mapping[int, Any], parameter: nn.Parameter, others: Any) -> None:
        super().__init__(own)
        self._parameter, self.others = parameter, others

    @classmethod
    def of(cls, parameter: nn.Parameter) -> AfterAverage:
        """Take the place of a parameter's hooks, of which ours is the last."""
        known: Any = parameter._post_accumulate_grad_hooks
        # Handles of the others' hooks know the dictionary that they are in: it stays theirs.
        others = known.others if isinstance(known, AfterAverage) else known
        own = dict(known) if isinstance(known, AfterAverage) else {}
        own.update([others.popitem()])
        made = cls(own, parameter, others)
        parameter._post_accumulate_grad_hooks = made
        return made

    def take(self, own: int | None) -> None:
        """Let the others' hook with this id be ours, and no other any more; None: have none."""
        self.clear()
        if own is not None:
            super().__setitem__(own, self.others.pop(own))

    def __setitem__(self, key: int, hook: Any) -> None:
        if "others" in vars(self):
            self.others[key] = hook
        else:
            super().__setitem__(key, hook)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self.others

    def __delitem__(self, key: int) -> None:
        if key in self.others:
            del self.others[key]
        else:
            super().__delitem__(key)

    def call(self, parameter: nn.Parameter) -> None:
        """The gradient is the average now."""
        for hook in list(self.others.values()):
            hook(parameter)

    def give_back(self) -> None:
        """Let torch call the others' hooks again."""
        if self._parameter._post_accumulate_grad_hooks is self:
            self._parameter._post_accumulate_grad_hooks = self.others
