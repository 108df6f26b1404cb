"""Sixteen bits: what is computed in them, and what around a module keeps to the loop's float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError
from mpizero_torch import names
from mpizero_torch.sharding.loss_scale import LossScale

_DTYPES = {
    None: None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16,
    torch.bfloat16: torch.bfloat16, torch.float16: torch.float16, torch.float32: None,
}  # fmt: skip
_OF_BUFFERS = {**_DTYPES, "fp32": torch.float32, torch.float32: torch.float32}


@dataclass(frozen=True)
class MixedPrecision:
    """How a model computes in 16 bits: for ``mz.zero(..., precision=MixedPrecision("fp16"))``.

    ``precision="fp16"`` and ``"bf16"`` are short for one with these defaults.

    Parameters
    ----------
    dtype : "bf16" or "fp16", of parameters, gradients and what is computed.
    cast_inputs : convert the floating point inputs of the model. False: they come as they are, and
        torch's own layers convert what they are given: for models that compute with a time, or a
        position, before that. (bfloat16 makes 996 of 997.)
    float32 : names and classes of modules that stay in float32, with all that is in them, and are
        given float32. Norms with running statistics (BatchNorm) do without being named.
    buffers : "bf16", "fp16" or "fp32": what floating point buffers of the other modules are
        converted to; by default they stay what they are.
    loss_scale : a constant loss scale for "fp16", instead of one that adapts itself.
    initial_scale, growth_factor, growth_interval : how it does that: it starts with the first,
        halves when gradients overflow, and is multiplied after so many steps without overflow.
    smallest_scale : if gradients overflow even with this one, training ends with an error.
    """

    dtype: str | torch.dtype
    cast_inputs: bool = True
    float32: Sequence[str | type[nn.Module]] = ()
    buffers: str | torch.dtype | None = None
    loss_scale: float | None = None
    initial_scale: float = 2.0**16
    growth_factor: float = 2.0
    growth_interval: int = 2000
    smallest_scale: float = 1.0

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None: float32, and no mixed precision at all."""
        return _DTYPES[self.dtype]

    @property
    def of_buffers(self) -> torch.dtype | None:
        return _OF_BUFFERS[self.buffers]


def as_policy(precision: Any) -> MixedPrecision | None:
    """What the argument ``precision`` of ``mz.zero`` stands for; None: float32 throughout.

    Raises ArgumentError for what there is not.
    """
    if isinstance(precision, MixedPrecision):
        _check(precision)
        return None if precision.torch_dtype is None else precision
    if precision not in _DTYPES:
        raise ArgumentError(
            "zero()", "precision", repr(precision), "'fp32', 'bf16', 'fp16', an mz.MixedPrecision"
        )
    return None if _DTYPES[precision] is None else MixedPrecision(precision)


def loss_scale(policy: MixedPrecision | None) -> LossScale | None:
    """What scales the gradients, for float16."""
    if policy is None or policy.torch_dtype != torch.float16:
        return None
    constant = policy.loss_scale is not None
    return LossScale(
        policy.initial_scale if policy.loss_scale is None else policy.loss_scale,
        policy.growth_interval,
        policy.growth_factor,
        policy.smallest_scale,
        constant=constant,
    )


def _check(policy: MixedPrecision) -> None:
    for name, value, allowed in (
        ("dtype", policy.dtype, _DTYPES),
        ("buffers", policy.buffers, _OF_BUFFERS),
    ):
        if value not in allowed:
            raise ArgumentError("MixedPrecision()", name, repr(value), "'bf16', 'fp16', 'fp32'")
    for name, smallest in (
        ("loss_scale", 0.0), ("initial_scale", 0.0), ("smallest_scale", 0.0),
        ("growth_factor", 1.0), ("growth_interval", 0),
    ):  # fmt: skip
        value = getattr(policy, name)
        if value is not None and not smallest < value < float("inf"):
            raise ArgumentError(
                "MixedPrecision()", name, repr(value), f"a finite number above {smallest:g}"
            )
    if policy.smallest_scale > policy.initial_scale:
        raise ArgumentError(
            "MixedPrecision()", "smallest_scale", f"{policy.smallest_scale:g}",
            f"at most initial_scale, {policy.initial_scale:g}",
        )  # fmt: skip
    if isinstance(policy.float32, (str, type)):
        raise ArgumentError(
            "MixedPrecision()", "float32", repr(policy.float32), "a list of names and classes"
        )


class Layers:
    """The modules of a model by the dtype that they compute in.

    ``kept``: the ids of the parameters that stay in float32.
    """

    def __init__(self, module: nn.Module, policy: MixedPrecision) -> None:
        self._policy, self._dtype = policy, policy.torch_dtype
        self._module = module
        self._roots = _roots_in_float32(module, policy.float32)
        self._in_float32 = {id(part) for root in self._roots for part in root.modules()}
        self.kept = frozenset(
            id(parameter) for root in self._roots for parameter in root.parameters()
        )

    def convert_buffers(self) -> None:
        """Give buffers the dtype that the policy asks for."""
        dtype = self._policy.of_buffers
        for part in self._module.modules() if dtype is not None else ():
            if id(part) in self._in_float32:
                continue
            for name, buffer in part.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    part._buffers[name] = buffer.to(dtype)

    def hook(self) -> None:
        """Let torch's layers, and what stays in float32, be given what they compute with."""
        for root in self._roots:
            root.register_forward_pre_hook(_Cast(torch.float32), with_kwargs=True)
        roots = {id(root) for root in self._roots}
        for part in self._module.modules():
            own = [p for p in part.parameters(recurse=False) if p.is_floating_point()]
            if not own or id(part) in roots or not _is_of_torch(part):
                continue
            dtype = torch.float32 if id(own[0]) in self.kept else self._dtype
            part.register_forward_pre_hook(_Cast(dtype), with_kwargs=True)


class _Cast:
    """A forward hook that converts floating point inputs."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = dtype

    def __call__(self, part: nn.Module, args: Any, kwargs: Any) -> Any:
        every = (*args, *kwargs.values())
        if all(not isinstance(each, (torch.Tensor, tuple, list)) for each in every):
            return None
        return self._cast(args), {key: self._cast(each) for key, each in kwargs.items()}

    def _cast(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() and value.dtype != self._dtype:
                return value.to(self._dtype)
        elif type(value) in (tuple, list):
            return type(value)(self._cast(each) for each in value)
        return value


def _roots_in_float32(module: nn.Module, asked: Sequence[Any]) -> list[nn.Module]:
    """The outermost modules that stay in float32."""
    classes = tuple(each for each in asked if isinstance(each, type))
    wanted = {each for each in asked if not isinstance(each, type)}
    known = {names.plain(name): part for name, part in module.named_modules()}
    unknown = sorted(map(repr, wanted - known.keys()))
    if unknown:
        raise ArgumentError(
            "MixedPrecision()", "float32", ", ".join(unknown), "names of the model's modules, and "
            "classes", f"Its modules are {', '.join(known)}.",
        )  # fmt: skip

    def found(name: str, part: nn.Module) -> Iterator[nn.Module]:
        if name in wanted or isinstance(part, classes) or _has_running_statistics(part):
            yield part
            return
        for own, child in part.named_children():
            yield from found(names.plain(f"{name}.{own}" if name else own), child)

    return list(found("", module))


def _has_running_statistics(part: nn.Module) -> bool:
    """They are averages over many steps, for which 8 bits, or 11, are too few."""
    return isinstance(part, nn.modules.batchnorm._NormBase) and part.running_mean is not None


def _is_of_torch(part: nn.Module) -> bool:
    """Is it a layer of torch's, or derived from one, which uses its parameters as torch does?"""
    return any(
        kind.__module__.startswith("torch.nn.modules.")
        and not kind.__module__.endswith((".module", ".container"))
        for kind in type(part).__mro__
    )
