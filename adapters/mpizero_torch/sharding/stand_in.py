"""What ``.grad`` is where gradients are sharded: a stand-in that explains itself.

``None`` would be silently wrong: ``torch.nn.utils.clip_grad_norm_`` of the parameters would find
nothing to clip, and say that the norm is 0.
"""

from __future__ import annotations

from typing import Any

import torch

from mpizero import MpizeroError
from mpizero_torch import compiling

# What may be done to it: forgetting it, and looking at its form.
_HARMLESS = {"zero_", "detach_", "requires_grad_", "__get__", "size", "dim", "numel", "is_sparse"}


class ShardedGradient(torch.Tensor):
    """Has the form of a parameter's gradient, and no values."""

    @classmethod
    def for_parameter(cls, parameter: torch.Tensor) -> ShardedGradient:
        one = torch.empty((), dtype=parameter.dtype, device=parameter.device)
        found: ShardedGradient = one.expand(parameter.shape).as_subclass(cls)
        return found

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if compiling.is_describing():
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", str(function))
        if name in ("zero_", "detach_", "requires_grad_"):
            return args[0]
        if name in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        raise MpizeroError(
            f"{name}() on the .grad of a sharded model's parameter: the gradients' mean is spread "
            "over the ranks. Clip with mz.clip_grad_norm_(model, ...) or mz.clip_grad_value_; "
            "look at one with model.gradient(name); the optimizer's param_groups hold this rank's "
            "part."
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<gradient of shape {tuple(self.shape)}, sharded over the ranks>"


class HeldGradient(ShardedGradient):
    """Stands for a gradient that stayed on this rank, in memory of its own.

    Pipeline schedules divide gradients by the number of micro-batches: so one may.
    """

    held: torch.Tensor

    @classmethod
    def of(cls, parameter: torch.Tensor, held: torch.Tensor) -> HeldGradient:
        """For a parameter whose gradient so far is ``held``."""
        one = torch.empty((), dtype=parameter.dtype, device=parameter.device)
        found: HeldGradient = one.expand(parameter.shape).as_subclass(cls)
        found.held = held
        return found

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name in ("div_", "mul_") and len(args) == 2 and isinstance(args[0], cls):
            getattr(args[0].held, name)(args[1])
            return args[0]
        return super().__torch_function__(function, types, args, kwargs)


def values_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """A parameter's gradient on this rank, if it is one."""
    gradient = parameter.grad
    return None if isinstance(gradient, ShardedGradient) else gradient
