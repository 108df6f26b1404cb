"""Gradients that are about to be added to a stand-in: of a loss that does without an output.

Most passes are announced by a gradient that comes to the module's output. A term of the loss that
is computed from parameters themselves comes to them earlier, and torch would add it to what stands
for the mean: it has to go first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge


class Guards:
    """Call ``come()`` before torch accumulates a gradient of those that are watched."""

    def __init__(self, parameters: Sequence[nn.Parameter], come: Callable[[], None]) -> None:
        self._parameters, self._come = list(parameters), come
        # With the node that has the hook: torch makes another if nobody keeps it.
        self._watched: dict[int, tuple[Any, Any]] = {}

    def watch(self, index: int) -> None:
        """Until ``remove``."""
        if index in self._watched:
            return
        parameter = self._parameters[index]
        frozen = not parameter.requires_grad
        if frozen:
            parameter.requires_grad_(True)  # it may be trained again by then
        try:
            with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False):
                node: Any = get_gradient_edge(parameter).node
        finally:
            if frozen:
                parameter.requires_grad_(False)
        come = self._come
        self._watched[index] = node, node.register_prehook(lambda _: come())

    def remove(self) -> None:
        """Watch none any more."""
        for _, handle in self._watched.values():
            handle.remove()
        self._watched.clear()
