"""Autograd hooks: from torch's backward to the engine's open, ready, close.

A backward pass begins at the first of three events: a gradient for the module's output, for one of
its parameters before it is accumulated, or after. It ends with a callback that the autograd
engine runs last. The output comes first where it can: under reentrant checkpointing parameters get
their gradients in nested backward passes, whose end is not the end of the whole.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from mpizero import ArgumentError, MpizeroError, World
from mpizero.diagnostics import recorder
from mpizero.engine import ReducedPasses, Weight
from mpizero_torch.replicate import Buffers


class Owner(Protocol):
    """What the hooks need of the module that they serve."""

    world: World
    _synchronise: bool
    _stated: Weight | None
    _weight: Weight
    _buffers_in_sync: Buffers | None

    def _check_pass(self) -> None:
        """May a backward pass begin?"""


class BackwardHooks(ABC):
    """Tells a reducer of backward passes; what becomes of gradients is for those who derive."""

    def __init__(self, owner: Owner, reducer: ReducedPasses) -> None:
        self._owner = owner
        self._reducer = reducer
        self._in_backward = False
        self._weight = Weight()
        self._scales = False
        self.steps = 0
        self._handles: list[Any] = []

    def watch(
        self,
        parameters: Sequence[tuple[int, nn.Parameter]],
        announcing: Collection[int] | None = None,
    ) -> None:
        """Watch these parameters, by their numbers, and no others from now on.

        ``announcing``: those whose gradients are announced one by one; by default, all.
        """
        self.remove()
        self._parameters = [parameter for _, parameter in parameters]
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._on_accumulated(index))
            for index, parameter in parameters
            if announcing is None or index in announcing
        ]
        if self._scales:
            self._scales = False
            self.scale_gradients()

    def remove(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def scale_gradients(self) -> None:
        """From now on multiply gradients by the weight, before they are accumulated.

        Costs a call per parameter and step, so it is done only once weights differ from 1.
        """
        if not self._scales:
            self._scales = True
            self._handles += [p.register_hook(self._weakly_incoming()) for p in self._parameters]

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

    def average_kept(self) -> None:
        """Average what earlier passes have left on this rank, without a pass of its own."""
        buffers = self._owner._buffers_in_sync
        self._reducer.open_kept(buffers is not None and buffers.changed())
        self._average()

    @abstractmethod
    def kept(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """This rank's part of a parameter's gradient that stayed here, or None."""

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

    def _weakly_incoming(self) -> Callable[[torch.Tensor], torch.Tensor | None]:
        found = weakref.ref(self)

        def incoming(gradient: torch.Tensor) -> torch.Tensor | None:
            hooks = found()
            return None if hooks is None else hooks._on_incoming(gradient)

        return incoming

    def _on_incoming(self, gradient: torch.Tensor) -> torch.Tensor | None:
        self._begin()
        if self._weight.value == 1.0:
            return None
        if self._weight.value == 0.0:  # zero times NaN would be NaN
            return torch.zeros_like(gradient)
        return gradient * self._weight.value

    def _on_accumulated(self, index: int) -> Callable[[torch.Tensor], None]:
        # Called once per parameter and step, hundreds of times: nothing here that can wait. torch
        # keeps hooks where Python's collector does not see them: strong references would keep this
        # module, and its memory, for good.
        found = weakref.ref(self)

        def accumulated(parameter: torch.Tensor) -> None:
            hooks = found()
            if hooks is not None:
                if not hooks._in_backward:
                    hooks._begin()
                hooks._reducer.ready(index)

        return accumulated

    def _begin(self) -> None:
        """Enter a backward pass, once."""
        if self._in_backward:
            return
        self._owner._check_pass()
        self._in_backward = True
        self._span = recorder().begin_span("backward")
        # The engine's own way to run something at the end of backward; torch's DDP uses it too.
        torch.autograd.Variable._execution_engine.queue_callback(self._end)
        self._weight = self._owner._weight
        stated = self._owner._stated
        if stated is not None and not self._weight.stated:
            self._weight = stated if self._weight.value > 0 else Weight(0.0, stated=True)
        if self._weight.value != 1.0 and not self._scales:
            raise ArgumentError(
                "backward()",
                "weight",
                f"{self._weight.value}, after a forward of the inner module",
                "weights other than 1 where the wrapped module's own forward is called",
            )
        # Kept gradients matter to stated weights only, which they carry; gradients are then seen
        # before they are accumulated (``_on_incoming``), so what is there is from earlier passes.
        kept = not self._weight.stated or self._any_kept()
        if not self._owner._synchronise:
            self._reducer.accumulate(self._weight, kept)
            return
        buffers = self._owner._buffers_in_sync
        self._reducer.open(self._weight, kept, buffers is not None and buffers.changed())

    def _end(self) -> None:
        """Backward is over: average what is left, and hand the results over."""
        try:
            self._average()
        finally:
            recorder().end_span(self._span)

    def _average(self) -> None:
        self._in_backward = False
        self._owner._stated = None
        if not self._reducer.is_open:
            return
        self.steps += 1
        self._take_over(self._reducer.close(self._has_gradient()))
        self._sync_buffers(active=True)

    @abstractmethod
    def _any_kept(self) -> bool:
        """Are there gradients, not all zero, from earlier passes?"""

    @abstractmethod
    def _has_gradient(self) -> list[bool]:
        """For each parameter: is there a gradient on this rank, at the end of backward?"""

    @abstractmethod
    def _take_over(self, anywhere: list[bool]) -> None:
        """Give the reduced gradients to those of whose parameters any rank has one."""

    def _sync_buffers(self, active: bool) -> None:
        buffers = self._owner._buffers_in_sync
        if buffers is None or not self._reducer.buffers_changed:
            return
        root = 0
        if not self._reducer.all_active:
            root = self._owner.world.gather_objects(active).index(True)
        buffers.broadcast(self._owner.world, root)


def check_dense(gradient: torch.Tensor, name: str) -> None:
    """Raise ArgumentError for gradients that cannot lie in flat memory."""
    if gradient.is_sparse or gradient.requires_grad:
        given = "sparse" if gradient.is_sparse else "differentiable (create_graph=True)"
        raise ArgumentError(
            "backward()",
            "gradient",
            f"{given} for parameter '{name}'",
            "dense gradients without a graph of their own",
        )
