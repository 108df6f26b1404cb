"""Dynamic loss scaling for float16: gradients too small for it are multiplied on their way.

Micikevicius et al. 2018 (arXiv 1710.03740), section 3.2. The scale is applied where gradients enter
the model, and divided out where they are summed in float32, so that the loop never sees it.
"""

from __future__ import annotations

from typing import Any

import torch


class LossScale:
    """A factor that halves when gradients overflow, and doubles after many steps without that."""

    def __init__(self, initial: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.value = initial
        self.skipped = 0  # steps that were left out
        self._growth_interval = growth_interval
        self._good_steps = 0

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"value": self.value, "skipped": self.skipped, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = float(state["value"])
        self.skipped, self._good_steps = int(state["skipped"]), int(state["good_steps"])

    def apply(self, output: torch.Tensor) -> torch.Tensor:
        """``output``, whose gradient will be multiplied by the scale."""
        scaled: torch.Tensor = _ScaleGradient.apply(output, self)  # type: ignore[no-untyped-call]
        return scaled

    def update(self, overflowed: bool) -> bool:
        """Learn how the last gradients came out; returns whether the step should be made."""
        if overflowed:
            self.value = max(self.value / 2, 2.0**-14)
            self._good_steps = 0
            self.skipped += 1
            return False
        self._good_steps += 1
        if self._good_steps == self._growth_interval:
            self.value *= 2
            self._good_steps = 0
        return True


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, scale: LossScale) -> torch.Tensor:
        ctx.scale = scale
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient * ctx.scale.value, None
