"""Gradients of replicas: views of the reducer's buckets, which every rank keeps whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mpizero.engine import GradientReducer
from mpizero_torch import slices, tensors
from mpizero_torch.hooks import BackwardHooks, Owner, check_dense


class ReplicaHooks(BackwardHooks):
    """Has a GradientReducer average the gradients of ``named`` parameters.

    ``make_reducer`` is given what fills gradients into the reducer's views.
    """

    _reducer: GradientReducer

    def __init__(
        self,
        owner: Owner,
        named: Sequence[tuple[str, nn.Parameter]],
        make_reducer: Callable[[Callable[[Sequence[int]], None]], GradientReducer],
    ) -> None:
        self._names = [name for name, _ in named]
        self._any_cut = any(slices.is_slice(parameter) for _, parameter in named)
        super().__init__(owner, make_reducer(self._fill))
        self.watch(list(enumerate(parameter for _, parameter in named)))
        self._see_views()

    @property
    def bucket_bytes(self) -> int:
        return sum(int(bucket.flat.nbytes) for bucket in self._reducer.pieces)

    def kept(self, parameter: torch.Tensor) -> torch.Tensor | None:
        return slices.local_gradient(parameter)

    def _any_kept(self) -> bool:
        return any(p.grad is not None and bool(p.grad.any()) for p in self._parameters)

    def _has_gradient(self) -> list[bool]:
        return [parameter.grad is not None for parameter in self._parameters]

    def _fill(self, members: Sequence[int]) -> None:
        """Make the gradients of a bucket's parameters its views, where they are not already.

        The first gradients of a step arrive in memory of autograd's own: one copy, for a whole
        bucket in one call, where accumulating into zeroed buckets would read and write them twice
        more.
        """
        views: list[torch.Tensor] = []
        gradients: list[Any] = []
        for index in members:
            parameter, view = self._parameters[index], self._views[index]
            gradient = parameter.grad
            if gradient is view or gradient is None:
                continue
            check_dense(gradient, self._names[index])
            if self._any_cut:
                view, gradient = slices.local(view), slices.local_gradient(parameter)
            views.append(view)
            gradients.append(gradient)
            parameter.grad = self._views[index]
        if views:
            torch._foreach_copy_(views, gradients)

    def _take_over(self, anywhere: list[bool]) -> None:
        """Let ``.grad`` be the averaged view, or None where no rank has a gradient."""
        if self._generation != self._reducer.generation:
            self._see_views()
        for parameter, view, used in zip(self._parameters, self._views, anywhere, strict=True):
            wanted = view if used else None
            if parameter.grad is not wanted:
                parameter.grad = wanted

    def _see_views(self) -> None:
        self._generation = self._reducer.generation
        self._views = [
            slices.wrap(tensors.as_tensor(self._reducer.view(index)), parameter)
            for index, parameter in enumerate(self._parameters)
        ]
