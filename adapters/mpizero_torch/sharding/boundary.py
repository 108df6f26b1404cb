"""What goes into a module of 16 bits, and what comes out: there its precision begins and ends.

Inputs become 16 bits wide and outputs float32, and with a loss scale gradients are scaled at every
output and unscaled at every input. That holds for calls of the wrapped module and of the one
within: whichever is called first is the boundary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from mpizero import ArgumentError
from mpizero_torch import engine_runs, names
from mpizero_torch.compiling import as_it_is
from mpizero_torch.outputs import replaced, tensors_in
from mpizero_torch.sharding.loss_scale import LossScale
from mpizero_torch.sharding.precision import MixedPrecision

# In what torch says of tensors that do not fit each other.
_OF_DTYPES = re.compile(r"dtype|scalar type|data type|type \(|BFloat16|Half", re.IGNORECASE)


class Boundary:
    """Around ``module``, which computes as ``policy`` says."""

    def __init__(self, module: nn.Module, policy: MixedPrecision, scale: LossScale | None) -> None:
        self._module, self._policy, self._scale = module, policy, scale
        self._dtype: Any = policy.torch_dtype
        self._inside = False
        self._begun_by_hook = False

    def hook(self) -> None:
        """Let it hold for calls of the inner module, too."""
        inner = names.uncompiled(self._module)
        inner.register_forward_pre_hook(self._before, with_kwargs=True)
        inner.register_forward_hook(self._after, always_call=True)

    @contextmanager
    def crossed(self) -> Iterator[None]:
        """While the wrapped module's forward runs.

        Raises ArgumentError in the place of what torch says of dtypes that do not fit.
        """
        before, self._inside = self._inside, True
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, ArgumentError) or not _OF_DTYPES.search(str(error)):
                raise
            raise self._explained(error) from error
        finally:
            self._inside = before

    @as_it_is
    def taken_in(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The inputs as the module computes with them."""
        unscaled = self._scale is not None and torch.is_grad_enabled()
        if not self._policy.cast_inputs and not unscaled:
            return args, kwargs
        if not unscaled:
            found: tuple[Any, Any] = tree_map(self._narrow, (args, kwargs))
            return found
        try:
            args, kwargs = replaced((args, kwargs), self._take_in)
        except TypeError as error:
            raise self._not_replaced("an input", error) from error
        return args, kwargs

    @as_it_is
    def given_out(self, output: Any) -> Any:
        """The outputs as the loop goes on with them."""
        try:
            return replaced(output, self._give_out)
        except TypeError as error:
            if self._scale is None or not any(t.requires_grad for t in tensors_in(output)):
                return output
            raise self._not_replaced("an output", error) from error

    def _narrow(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(self._dtype)
        return value

    def _take_in(self, value: torch.Tensor) -> torch.Tensor:
        if value.requires_grad and self._scale is not None:
            value = self._scale.unscale(value)
        found: torch.Tensor = self._narrow(value) if self._policy.cast_inputs else value
        return found

    def _give_out(self, value: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if value.dtype == self._dtype else value.dtype
        if value.requires_grad and self._scale is not None and torch.is_grad_enabled():
            return self._scale.scale(value, dtype)
        return value if value.dtype == dtype else value.to(dtype)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        # What is computed again in backward is inside, too.
        if self._inside or engine_runs.current_run() != -1:
            return None
        self._inside = self._begun_by_hook = True
        return self.taken_in(args, kwargs)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self._begun_by_hook:
            return None
        self._inside = self._begun_by_hook = False
        return self.given_out(output)

    def _explained(self, error: RuntimeError) -> ArgumentError:
        where = _module_in(error.__traceback__, self._module)
        name = f"in '{where}'" if where else "in it"
        short = str(self._dtype).removeprefix("torch.")
        return ArgumentError(
            "forward()", "precision", f"{short}, with which {name} tensors of several dtypes meet "
            f"({str(error).splitlines()[0]})", "modules whose tensors have one dtype where they "
            "meet",
            "mz.MixedPrecision has float32=[names or classes] for modules that stay in float32, "
            "buffers= for the dtype of buffers, and cast_inputs=False; or convert with .to() "
            "before.",
        )  # fmt: skip

    def _not_replaced(self, what: str, error: TypeError) -> ArgumentError:
        return ArgumentError(
            "forward()", "module", f"one with {what} whose tensors cannot be replaced ({error})",
            "tensors, or containers and dataclasses of them",
            "Or use precision='bf16', which needs no loss scale.",
        )  # fmt: skip


def _module_in(traceback: TracebackType | None, module: nn.Module) -> str:
    """The name of the innermost part of ``module`` that was running."""
    known = {id(part): names.plain(name) for name, part in module.named_modules()}
    found = ""
    while traceback is not None:
        running = known.get(id(traceback.tb_frame.f_locals.get("self")), "")
        found = running or found
        traceback = traceback.tb_next
    return found
