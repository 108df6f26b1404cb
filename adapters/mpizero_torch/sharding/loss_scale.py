"""Dynamic loss scaling for float16: gradients too small for it are multiplied on their way.

Micikevicius et al. 2018 (arXiv 1710.03740), section 3.2. Gradients are multiplied where they enter
the model, at every output whatever its dtype; divided again where they leave it through an input;
and for parameters divided out where they are summed in float32. So the loop never sees the scale,
and a gradient that has come to a parameter on another way than through an output lacks it:
``check_pass`` looks for such ways.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch

from mpizero import MpizeroError
from mpizero_torch import engine_runs

WARN_AFTER = 5  # steps in a row that were left out
_PATIENCE = 16  # how many in a row a constant scale may leave out: from 2**16 down to 1


class LossScale:
    """A factor that halves when gradients overflow, and grows after many steps without that.

    ``constant``: it does neither. ``smallest``: if gradients overflow even with this one, training
    ends with an error.
    """

    def __init__(
        self,
        initial: float = 2.0**16,
        growth_interval: int = 2000,
        growth_factor: float = 2.0,
        smallest: float = 1.0,
        constant: bool = False,
    ) -> None:
        self.value = initial
        self.skipped = 0  # steps that were left out
        self._growth_interval, self._growth_factor = growth_interval, growth_factor
        self._smallest, self._constant = smallest, constant
        self._good_steps = 0
        self._in_a_row = 0  # left out, up to now
        self._verdict: bool | None = None  # on the gradients that there are

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"value": self.value, "skipped": self.skipped, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if not self._constant:
            self.value = float(state["value"])
        self.skipped, self._good_steps = int(state["skipped"]), int(state["good_steps"])

    def scale(self, output: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``output`` in ``dtype``, whose gradient will be multiplied by the scale."""
        found: torch.Tensor = _Scale.apply(output, self, dtype)  # type: ignore[no-untyped-call]
        return found

    def unscale(self, given: torch.Tensor) -> torch.Tensor:
        """An input, whose gradient will be divided by the scale."""
        found: torch.Tensor = _Unscale.apply(given, self)  # type: ignore[no-untyped-call]
        return found

    def gradients_changed(self) -> None:
        """There are other gradients than those of the last step."""
        self._verdict = None

    def should_step(self, overflowed: bool, rank: int) -> bool:
        """Should the step be made? Asked once for each optimizer; learns once from the gradients.

        Raises MpizeroError, on all ranks, if they overflow whatever the scale.
        """
        if self._verdict is None:
            if overflowed:
                self._overflow(rank)
            else:
                self._good_step()
            self._verdict = not overflowed
        return self._verdict

    def check_pass(self, parameters: Collection[int]) -> None:
        """Raise MpizeroError if a gradient of the pass under way will come to a parameter unscaled.

        ``parameters``: the ids of the model's.
        """
        for run in engine_runs.outermost():
            asked = () if run.accumulates else run.inputs
            if any(id(each) in parameters for each in asked):
                raise MpizeroError(
                    "autograd.grad() for parameters of a model with precision='fp16': their "
                    "gradients are multiplied by the loss scale. Use loss.backward(), or "
                    "precision='bf16', which needs no scale."
                )
            if any(_needs_scale(node, parameters) for node in self._unscaled(run.roots)):
                raise MpizeroError(
                    "backward(): with precision='fp16' the loss depends on the model's parameters "
                    "otherwise than through what its forward returned (parameters in the loss, a "
                    "tensor that the module keeps, a gradient that is differentiated): the loss "
                    "scale would be missing there. Let forward return all that the loss is "
                    "computed from, in containers or dataclasses, or use precision='bf16', which "
                    "needs no scale."
                )

    def _unscaled(self, roots: Iterable[Any]) -> Iterator[Any]:
        """The nodes of the graph that a gradient reaches before it is scaled."""
        ahead = list(roots)
        seen = set(ahead)
        while ahead:
            node = ahead.pop()
            if getattr(node, "loss_scale", None) is self and isinstance(node, _scaling()):
                continue
            yield node
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    ahead.append(following)

    def _good_step(self) -> None:
        self._in_a_row = 0
        self._good_steps += 1
        if self._good_steps == self._growth_interval and not self._constant:
            self.value *= self._growth_factor
            self._good_steps = 0

    def _overflow(self, rank: int) -> None:
        self._good_steps = 0
        self.skipped += 1
        self._in_a_row += 1
        at_end = self._in_a_row > _PATIENCE if self._constant else self.value <= self._smallest
        if at_end:
            raise MpizeroError(
                f"optimizer.step(): the gradients are not finite, with a loss scale of "
                f"{self.value:g}, the smallest there may be; {self._in_a_row} steps in a row were "
                "left out. Most likely the loss itself, or something in the model, is NaN or too "
                "large for float16: look at the loss, lower the learning rate, clip, or use "
                "precision='bf16'. (mz.MixedPrecision has smallest_scale=.)"
            )
        if not self._constant:
            self.value = max(self.value / 2, self._smallest)
        if self._in_a_row == WARN_AFTER and rank == 0:
            warnings.warn(
                f"{WARN_AFTER} steps in a row were left out, because gradients were not finite in "
                f"float16; the loss scale is {self.value:g} now, and training ends with an error "
                "if that does not help. Is the loss finite?",
                stacklevel=2,
            )


def _needs_scale(node: Any, parameters: Collection[int]) -> bool:
    """Will the run under way bring a gradient to a parameter, or out of an input, in this node?"""
    if isinstance(node, _unscaling()):
        return True
    variable = getattr(node, "variable", None)
    if variable is None or id(variable) not in parameters:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # what autograd.grad() was asked for
        return True


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, scale: LossScale, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.loss_scale, ctx.dtype = scale, output.dtype
        # Not a view of it, as torch counts views: what a module returns may be changed in place.
        return output.detach() if output.dtype == dtype else output.to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return (gradient * ctx.loss_scale.value).to(ctx.dtype), None, None


class _Unscale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, scale: LossScale) -> torch.Tensor:
        ctx.loss_scale = scale
        return given.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient / ctx.loss_scale.value, None


def _scaling() -> Any:
    """The class of the nodes in autograd's graph that scale."""
    return vars(_Scale)["_backward_cls"]


def _unscaling() -> Any:
    return vars(_Unscale)["_backward_cls"]
