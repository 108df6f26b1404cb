"""What ``.grad`` is where gradients are sharded: a stand-in that explains itself.

``None`` would be silently wrong: ``torch.nn.utils.clip_grad_norm_`` of the parameters would find
nothing to clip, and say that the norm is 0. Whatever torch can do to a tensor is held to its name:
what asks for the form is answered, what changes each element by itself is done to this rank's part,
and all else, which would need the values, is refused with what to write instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from mpizero import MpizeroError
from mpizero_torch import compiling

Change = Callable[[str, tuple[Any, ...], dict[str, Any]], None]

# Attributes that are of the form, not of the values.
_FORM = {
    "shape", "dtype", "device", "layout", "ndim", "nbytes", "itemsize", "names", "requires_grad",
    "is_leaf", "grad_fn", "grad", "_grad", "output_nr", "retains_grad", "name", "_version",
    "is_sparse", "is_sparse_csr", "is_quantized", "is_nested", "is_meta", "is_cpu", "is_cuda",
    "is_mps", "is_xpu", "is_hpu", "is_ipu", "is_xla", "is_mtia", "is_maia", "is_vulkan",
    "is_mkldnn", "_backward_hooks", "_post_accumulate_grad_hooks",
}  # fmt: skip
# Functions that ask for the form, or make something of the same form.
_OF_FORM = {
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "__len__",
    "is_contiguous", "is_floating_point", "is_complex", "is_inference", "get_device",
    "is_same_size", "is_coalesced", "_has_compatible_shallow_copy_type",
    "zeros_like", "ones_like", "empty_like", "full_like",
    "rand_like", "randn_like", "new_empty", "new_zeros", "new_ones", "new_full",
}  # fmt: skip
_SAME = {"detach", "detach_", "requires_grad_", "data"}
# What gives the same values in another form. A module does so with its gradients when it is moved.
_CONVERTING = {
    "to", "type", "type_as", "double", "float", "half", "bfloat16", "cpu", "cuda", "xpu",
    "contiguous", "share_memory_",
}  # fmt: skip
# What changes each element by itself.
_ELEMENTWISE = {
    "zero_", "fill_", "copy_", "add_", "sub_", "mul_", "div_", "neg_", "abs_", "sign_", "pow_",
    "square_", "sqrt_", "tanh_", "clamp_", "clamp_min_", "clamp_max_", "nan_to_num_",
    "masked_fill_", "addcmul_", "addcdiv_", "lerp_",
}  # fmt: skip
_OTHER_NAMES = {
    "clip_": "clamp_", "subtract_": "sub_", "multiply_": "mul_", "divide_": "div_",
    "true_divide_": "div_", "negative_": "neg_", "absolute_": "abs_", "__iadd__": "add_",
    "__isub__": "sub_", "__imul__": "mul_", "__itruediv__": "div_", "__idiv__": "div_",
    "__ipow__": "pow_",
}  # fmt: skip


class ShardedGradient(torch.Tensor):
    """Has the form of a parameter's gradient, and no values."""

    name: str
    change: Change | None

    @classmethod
    def for_parameter(
        cls, parameter: torch.Tensor, name: str = "", change: Change | None = None
    ) -> ShardedGradient:
        """``change(name, args, kwargs)`` does to the gradient what the method in place does."""
        one = torch.full((), _nothing(parameter.dtype), dtype=parameter.dtype)
        one = one.to(parameter.device)
        found: ShardedGradient = one.expand(parameter.shape).as_subclass(cls)
        vars(found).update(name=name, change=change)
        return found

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if compiling.is_describing():
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        return _answer(function, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<gradient of shape {tuple(self.shape)}, sharded over the ranks>"


class OwnGradient(torch.Tensor):
    """All of the gradients, as the optimizer's parameters show them to the program on one rank.

    What is written to them is counted, also by functions for which torch does not.
    """

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = torch.Tensor.__torch_function__.__func__(  # type: ignore[attr-defined]
            cls, function, types, args, kwargs or {}
        )
        if _name(function).startswith("_amp_foreach_"):
            torch.autograd.graph.increment_version(args[0])
        return result


class PartOfGradient(OwnGradient):
    """This rank's part of the gradients, as the optimizer's parameters show it to the program.

    What is done to each element gives what it would give for all ranks' parts; a sum or a norm
    would be of this part alone, another one on every rank, and is refused.
    """

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = _name(function)
        if name.removeprefix("_foreach_").removeprefix("linalg_") in _OVER_ALL:
            raise MpizeroError(
                f"{name}() on the .grad of a parameter of a sharded optimizer: that is this rank's "
                "part of the gradients, and the result would be another one on every rank. Clip "
                "with mz.clip_grad_norm_(model, max_norm), which returns the norm of all gradients "
                "(max_norm=math.inf: and changes nothing); a whole gradient is "
                "mz.full_gradient(p), of a parameter p of the model."
            )
        return super().__torch_function__(function, types, args, kwargs or {})


# What makes one number, or a few, of many.
_OVER_ALL = {
    "norm", "vector_norm", "matrix_norm", "cond", "svd", "svdvals", "dist", "renorm", "renorm_",
    "powsum", "sum", "nansum", "mean", "nanmean", "std", "std_mean", "var", "var_mean", "prod",
    "max", "min", "amax", "amin", "aminmax", "argmax", "argmin", "median", "nanmedian", "mode",
    "quantile", "nanquantile", "topk", "sort", "argsort", "kthvalue", "msort", "histc", "histogram",
    "bincount", "unique", "logsumexp", "cosine_similarity", "normalize", "softmax", "log_softmax",
    "dot", "vdot", "inner", "count_nonzero", "all", "any", "allclose", "equal", "trace", "item",
    "__bool__", "__float__", "__int__", "cumsum", "cumprod", "get_total_norm",
}  # fmt: skip


class HeldGradient(ShardedGradient):
    """Stands for a gradient that stayed on this rank, in memory of its own.

    It may be of another dtype than torch allows for ``.grad``. Whatever is done to this one is done
    to that memory: so pipeline schedules divide gradients by the number of micro-batches.
    """

    held: torch.Tensor

    @classmethod
    def of(cls, parameter: torch.Tensor, held: torch.Tensor) -> HeldGradient:
        """For a parameter whose gradient so far is ``held``."""
        found: HeldGradient = cls.for_parameter(parameter)  # type: ignore[assignment]
        vars(found)["held"] = held
        return found

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first = args[0] if args else None
        plain_args, plain_kwargs = tree_map(_held, (args, kwargs or {}))
        result = function(*plain_args, **plain_kwargs)
        return first if isinstance(first, cls) and result is vars(first)["held"] else result

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(vars(self)["held"])


def values_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """A parameter's gradient on this rank, if it is one."""
    gradient = parameter.grad
    return None if isinstance(gradient, ShardedGradient) else gradient


def _held(value: Any) -> Any:
    return vars(value)["held"] if isinstance(value, HeldGradient) else value


def _nothing(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point or dtype.is_complex else 0


def _name(function: Any) -> str:
    """What was called; of an attribute, its name."""
    name: str = getattr(function, "__name__", str(function))
    if name in ("__get__", "__set__", "__delete__"):
        attribute: str = getattr(getattr(function, "__self__", None), "__name__", "")
        return attribute if name == "__get__" else f"{name}{attribute}"
    return name


def _answer(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = _name(function)
    first = args[0] if args else None
    if name.startswith("_foreach_") and f"{name[9:]}_" in (*_ELEMENTWISE, "_"):
        raise _refusal(name)
    if name.startswith("_foreach_") and isinstance(first, (list, tuple)):
        return _each(name[9:], first, args[1:], kwargs)
    if not isinstance(first, ShardedGradient):
        raise _refusal(name)
    is_attribute = getattr(function, "__name__", "") == "__get__"
    if name in _SAME and not (name == "requires_grad_" and args[1:] and args[1]):
        return first
    if (is_attribute and name in _FORM) or (not is_attribute and name in _OF_FORM):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)
    if name in ("eq", "__eq__", "ne", "__ne__") and args[1:] == (None,):
        return name.strip("_") == "ne"
    if name == "__format__":
        return repr(first)
    if name == "type" and len(args) == 1 and not kwargs:
        return f"torch.{type(first).__name__}"
    if name in _CONVERTING:
        return _converted(function, first, args[1:], kwargs)
    if name == "__set__data" and isinstance(args[1], ShardedGradient):
        with torch._C.DisableTorchFunctionSubclass():
            return None if args[1] is first else function(*args)
    return _change(name, first, args[1:], kwargs)


def _converted(function: Any, gradient: ShardedGradient, args: Any, kwargs: dict[str, Any]) -> Any:
    """A stand-in of the dtype and on the device that the values would have."""
    with torch._C.DisableTorchFunctionSubclass():
        probe = torch.empty((), dtype=gradient.dtype, device=gradient.device)
        plain = [each.detach() if isinstance(each, torch.Tensor) else each for each in args]
        form = function(probe, *plain, **kwargs)
        if (form.dtype, form.device) == (gradient.dtype, gradient.device):
            return gradient
        like = torch.empty((), dtype=form.dtype, device=form.device).expand(gradient.shape)
    return ShardedGradient.for_parameter(like, vars(gradient)["name"])


def _change(name: str, gradient: ShardedGradient, args: Any, kwargs: dict[str, Any]) -> Any:
    method = _OTHER_NAMES.get(name, name)
    others = [each for each in (*args, *kwargs.values()) if isinstance(each, ShardedGradient)]
    change = vars(gradient)["change"]
    if others or change is None or method not in (*_ELEMENTWISE, "__setitem__"):
        raise _refusal(name, vars(gradient)["name"])
    change(method, tuple(args), kwargs)
    return gradient


def _each(method: str, tensors: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """A function of torch on a list of tensors, in place: on one after the other."""
    if method not in _ELEMENTWISE:
        raise _refusal(f"_foreach_{method}")
    for at, tensor in enumerate(tensors):
        own = [each[at] if isinstance(each, (list, tuple)) else each for each in args]
        getattr(tensor, method)(*own, **kwargs)


def _refusal(what: str, name: str = "") -> MpizeroError:
    of = f" ('{name}')" if name else ""
    return MpizeroError(
        f"{what}() on the .grad of a sharded model's parameter{of}: the gradients' mean is spread "
        "over the ranks. All of one is mz.full_gradient(p), on all ranks together; "
        "mz.set_gradient(p, g) sets it. Clip with mz.clip_grad_norm_(model, max_norm), which "
        "returns the norm of all gradients (max_norm=math.inf: and changes nothing), or with "
        "mz.clip_grad_value_; the optimizer's param_groups hold this rank's part."
    )
