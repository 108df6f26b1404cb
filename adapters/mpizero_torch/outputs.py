"""The tensors in what a module returns, whatever holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Each tensor in containers, mappings, dataclasses and other objects, however nested.

    Of objects that are no containers, their attributes are looked at, those in slots too.
    """
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)) and all(isinstance(x, torch.Tensor) for x in value):
        yield from value
    elif not isinstance(value, _PLAIN):
        yield from _inside(value, set())


def _inside(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
        return
    if isinstance(value, (*_PLAIN, nn.Module, type)) or callable(value) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        for each in value.values():
            yield from _inside(each, seen)
    elif isinstance(value, (tuple, list, set, frozenset)):
        for each in value:
            yield from _inside(each, seen)
    for each in list(getattr(value, "__dict__", {}).values()):
        yield from _inside(each, seen)
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            yield from _inside(getattr(value, name, None), seen)
