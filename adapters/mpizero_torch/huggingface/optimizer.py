"""A sharded optimizer as Accelerate wants one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer

from mpizero_torch.clip import clip_grad_norm_


class ZeroOptimizer(AcceleratedOptimizer):  # type: ignore[misc]
    """Steps where Accelerate says that gradients are complete, and clips them if it was told to.

    ``clipping``: the largest norm of the gradients of ``model``, if the configuration has one.
    """

    def __init__(self, optimizer: Any, model: Any, clipping: float | None) -> None:
        super().__init__(optimizer, device_placement=False, scaler=None)
        self.model, self.clipping = model, clipping
        self.is_clipped = False  # by the program itself, for the next step
        self._collected: dict[str, Any] | None = None

    def step(self, closure: Any = None) -> None:
        """Update, at the end of a step. Collective."""
        if self.gradient_state.sync_gradients and self.clipping is not None and not self.is_clipped:
            clip_grad_norm_(self.model, self.clipping)
        super().step(closure)
        if self.gradient_state.sync_gradients:
            self.is_clipped = False
            self._is_overflow = bool(getattr(self.optimizer, "step_was_skipped", False))

    def state_dict(self) -> dict[str, Any]:
        """The plain optimizer's. Collective, unless it is ``collected``."""
        if self._collected is not None:
            return self._collected
        found: dict[str, Any] = self.optimizer.state_dict()
        return found

    @contextmanager
    def collected(self) -> Iterator[None]:
        """In here rank 0 alone has the state, and may ask for it alone. Collective on entry."""
        root = {"root": 0} if hasattr(self.optimizer, "sharded_state") else {}
        self._collected = self.optimizer.state_dict(**root)
        try:
            yield
        finally:
            self._collected = None
