"""Autograd hooks: from torch's backward to the engine's open, ready, close.

A backward pass begins at the first of three events: a gradient for the module's output, for one of
its parameters before it is accumulated, or after. It ends with a callback that the autograd
engine runs last. The output comes first where it can: under reentrant checkpointing parameters get
their gradients in nested backward passes, whose end is not the end of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from mpizero import ArgumentError, MpizeroError, World
from mpizero.engine import GradientReducer, Weight
from mpizero_torch import batch_weight, tensors
from mpizero_torch.replicate import Buffers


class Owner(Protocol):
    """What the hooks need of the module that they serve."""

    world: World
    _synchronise: bool
    _stated: Weight | None
    _buffers_in_sync: Buffers | None


class GradientHooks:
    """Watches ``named`` parameters' gradients come, and has a reducer average them.

    ``make_reducer`` is given what fills gradients into the reducer's views.
    """

    def __init__(
        self,
        owner: Owner,
        named: Sequence[tuple[str, nn.Parameter]],
        make_reducer: Callable[[Callable[[Sequence[int]], None]], GradientReducer],
    ) -> None:
        self._owner = owner
        self._names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        self._reducer = make_reducer(self._fill)
        self._in_backward = False
        self._weight = Weight()
        self._scales = False
        self.steps = 0
        self._see_views()
        self._handles: list[Any] = [
            parameter.register_post_accumulate_grad_hook(self._on_accumulated(index))
            for index, parameter in enumerate(self._parameters)
        ]

    def remove(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()

    def scale_gradients(self) -> None:
        """From now on multiply gradients by the weight, before they are accumulated.

        Costs a call per parameter and step, so it is done only once weights differ from 1.
        """
        if not self._scales:
            self._scales = True
            self._handles += [p.register_hook(self._on_incoming) for p in self._parameters]

    def watch_output(self, output: Any) -> None:
        """Let backward through ``output`` (tensors, however nested) announce itself."""
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(self._on_output)

    def check_last_pass(self) -> None:
        """Before a forward: did an exception end the last backward before its end?

        Gradients that stay on this rank may simply be computed again. But averages that had begun
        cannot be taken back from the other ranks: MpizeroError.
        """
        if not self._in_backward or torch._C._current_graph_task_id() != -1:
            return
        if self._reducer.is_open:
            raise MpizeroError(
                "An earlier backward() ended with an exception while gradients were being "
                "averaged, so the ranks may hold different ones. Load the last checkpoint and "
                "wrap the module again."
            )
        self._in_backward = False

    def shadow(self) -> bool:
        """Take part in one pass of the other ranks; False if there is none any more."""
        anywhere = self._reducer.shadow()
        if anywhere is None:
            return False
        self._take_over(anywhere)
        self._sync_buffers(active=False)
        return True

    def _on_output(self, gradient: torch.Tensor) -> None:
        self._begin()

    def _on_incoming(self, gradient: torch.Tensor) -> torch.Tensor | None:
        self._begin()
        if self._weight.value == 1.0:
            return None
        if self._weight.value == 0.0:  # zero times NaN would be NaN
            return torch.zeros_like(gradient)
        return gradient * self._weight.value

    def _on_accumulated(self, index: int) -> Callable[[torch.Tensor], None]:
        # Called once per parameter and step, hundreds of times: nothing here that can wait.
        def accumulated(parameter: torch.Tensor) -> None:
            if not self._in_backward:
                self._begin()
            ready(index)

        ready = self._reducer.ready
        return accumulated

    def _begin(self) -> None:
        """Enter a backward pass, once."""
        if self._in_backward:
            return
        self._in_backward = True
        # The engine's own way to run something at the end of backward; torch's DDP uses it too.
        torch.autograd.Variable._execution_engine.queue_callback(self._end)
        self._weight = batch_weight.current(self._owner._stated)
        if self._weight.value != 1.0 and not self._scales:
            raise ArgumentError(
                "backward()",
                "weight",
                f"{self._weight.value}, after a forward of the inner module",
                "weights other than 1 where the wrapped module's own forward is called",
            )
        # Kept gradients matter to stated weights only, which they carry; gradients are then seen
        # before they are accumulated (``_on_incoming``), so what is there is from earlier passes.
        kept = not self._weight.stated or any(
            parameter.grad is not None and bool(parameter.grad.any())
            for parameter in self._parameters
        )
        if not self._owner._synchronise:
            self._reducer.accumulate(self._weight, kept)
            return
        buffers = self._owner._buffers_in_sync
        self._reducer.open(self._weight, kept, buffers is not None and buffers.changed())

    def _end(self) -> None:
        """Backward is over: average what is left, and hand the results over."""
        self._in_backward = False
        self._owner._stated = None
        batch_weight.state(None)
        if not self._reducer.is_open:
            return
        self.steps += 1
        has_gradient = [parameter.grad is not None for parameter in self._parameters]
        self._take_over(self._reducer.close(has_gradient))
        self._sync_buffers(active=True)

    def _fill(self, members: Sequence[int]) -> None:
        """Make the gradients of a bucket's parameters its views, where they are not already.

        The first gradients of a step arrive in memory of autograd's own: one copy, for a whole
        bucket in one call, where accumulating into zeroed buckets would read and write them twice
        more.
        """
        views, gradients = [], []
        for index in members:
            parameter, view = self._parameters[index], self._views[index]
            gradient = parameter.grad
            if gradient is view or gradient is None:
                continue
            if gradient.is_sparse or gradient.requires_grad:
                given = "sparse" if gradient.is_sparse else "differentiable (create_graph=True)"
                raise ArgumentError(
                    "backward()",
                    "gradient",
                    f"{given} for parameter '{self._names[index]}'",
                    "dense gradients without a graph of their own",
                )
            views.append(view)
            gradients.append(gradient)
            parameter.grad = view
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

    def _sync_buffers(self, active: bool) -> None:
        buffers = self._owner._buffers_in_sync
        if buffers is None or not self._reducer.buffers_changed:
            return
        root = 0
        if not self._reducer.all_active:
            root = self._owner.world.gather_objects(active).index(True)
        buffers.broadcast(self._owner.world, root)

    def _see_views(self) -> None:
        self._generation = self._reducer.generation
        self._views = [
            tensors.as_tensor(self._reducer.view(index)) for index in range(len(self._parameters))
        ]
