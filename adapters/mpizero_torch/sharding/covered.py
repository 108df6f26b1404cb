"""What a sharded parameter is to those who come upon it outside of the modules that need it.

It has its form at hand. Who asks for its values gets them gathered for the purpose; who writes to
it is told where writes hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cache
from typing import Any

import torch
from torch import nn

from mpizero import MpizeroError
from mpizero_torch import slices

Lend = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]

# By a parameter's id: what gathers it (a method of one that holds the parameter while it lives).
_lenders: dict[int, weakref.WeakMethod[Lend]] = {}


class CoveredParameter(nn.Parameter):
    """A parameter whose values may not be on this rank now.

    There may be no memory behind it: to read there would crash the process.
    """

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _answer(function, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<parameter of shape {tuple(self.shape)}, {self.dtype}, sharded over the ranks>"

    def __deepcopy__(self, memo: Any) -> Any:
        raise MpizeroError(
            "A sharded parameter cannot be copied. Copy inside `with mz.gathered(model):`."
        )


@cache
def covered(kind: type) -> type:
    """The class of a parameter of class ``kind`` while no module of its own is running."""
    if not slices.is_slice_type(kind):
        return CoveredParameter
    # Of the same layout: an object's class may be changed only to one of those.
    own = {
        name: CoveredParameter.__dict__[name]
        for name in ("__torch_function__", "__repr__", "__deepcopy__")
    }
    return type("CoveredSlice", (kind,), {"__slots__": (), "__doc__": kind.__doc__, **own})


def is_covered(value: Any) -> bool:
    """Is it a parameter that explains itself, now?"""
    kind: Any = vars(type(value)).get("__torch_function__")
    return kind is not None and kind is vars(CoveredParameter)["__torch_function__"]


def register(parameters: Sequence[nn.Parameter], lend: Lend) -> None:
    """Have these parameters gathered by ``lend``, a method, when somebody asks for their values."""
    owner: Any = lend
    ids = [id(parameter) for parameter in parameters]
    _lenders.update(dict.fromkeys(ids, weakref.WeakMethod(owner)))
    weakref.finalize(owner.__self__, _forget, ids)


def _forget(ids: Sequence[int]) -> None:
    for each in ids:
        found = _lenders.get(each)
        if found is not None and found() is None:
            del _lenders[each]


def _answer(function: Any, args: Any, kwargs: Any) -> Any:
    name = getattr(function, "__name__", str(function))
    if _is_of_form(function, name):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)
    asked = list({id(each): each for each in _covered_in((args, kwargs))}.values())
    written = asked if _writes(function, name) else list(_covered_in(kwargs.get("out")))
    if written:
        raise MpizeroError(
            f"{_told(function, name)} on a parameter of shape {tuple(written[0].shape)}, which is "
            "sharded over the ranks: what is written to it here would be lost. Write inside "
            "`with mz.gathered(model, modify=True):`, and read inside `with mz.gathered(model):` "
            "or by .detach()."
        )
    with ExitStack() as stack:
        for lend, parameters in _by_lender(asked):
            stack.enter_context(lend(parameters))
        return function(*args, **kwargs)


def _covered_in(value: Any) -> Iterator[nn.Parameter]:
    """The covered parameters among arguments, and in lists and dicts of them."""
    if is_covered(value):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _covered_in(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _covered_in(each)


def _by_lender(parameters: Sequence[nn.Parameter]) -> list[tuple[Lend, list[nn.Parameter]]]:
    found: dict[int, tuple[Lend, list[nn.Parameter]]] = {}
    for parameter in parameters:
        method = _lenders.get(id(parameter))
        lend: Any = None if method is None else method()
        if lend is None:
            raise MpizeroError(
                f"The sharded model of this parameter, of shape {tuple(parameter.shape)}, is gone, "
                "and the parameter's values with it. Keep what mz.zero() gave back."
            )
        found.setdefault(id(lend.__self__), (lend, []))[1].append(parameter)
    return list(found.values())


def _told(function: Any, name: str) -> str:
    owner = getattr(getattr(function, "__self__", None), "__name__", "")
    return f".{owner}" if name in ("__get__", "__set__") else f"{name}()"


def _is_of_form(function: Any, name: str) -> bool:
    """Does it ask for what is known without the values?"""
    if name in _OF_PROPERTIES:
        slot: Any = getattr(function, "__self__", None)
        # A property in Python: who knows what it does.
        is_slot = isinstance(slot, _SLOT)
        return is_slot and getattr(slot, "__name__", "") not in _OF_VALUES
    return name in _OF_FORM


def _writes(function: Any, name: str) -> bool:
    if name in _OF_PROPERTIES:
        slot = getattr(getattr(function, "__self__", None), "__name__", "")
        # What is written to ``.data``, once it is taken, nobody would hear of.
        return name != "__get__" or slot == "data"
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


_SLOT = type(torch.Tensor.data)
_OF_PROPERTIES = {"__get__", "__set__", "__delete__"}
_OF_VALUES = {"data", "T", "mT", "H", "mH", "real", "imag"}

_OF_FORM = {
    "__hash__", "__len__", "size", "dim", "ndimension", "numel", "nelement", "element_size",
    "stride", "storage_offset", "get_device", "is_inference", "is_floating_point", "is_complex",
    "is_contiguous", "is_conj", "is_neg", "is_same_size", "requires_grad_", "register_hook",
    "register_post_accumulate_grad_hook", "empty_like", "zeros_like", "ones_like", "full_like",
    "new_empty", "new_zeros", "new_ones", "new_full", "_is_view", "has_names",
}  # fmt: skip

_IN_PLACE = {
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__",
    "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
}  # fmt: skip
