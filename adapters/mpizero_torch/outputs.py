"""The tensors in what a module returns, whatever holds them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

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
    for _, each in _attributes(value):
        yield from _inside(each, seen)


def replaced(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with ``change(tensor)`` for each of the tensors in it.

    What holds a tensor that changes is copied, and so is what holds that; the rest is as it was. Of
    objects that are neither containers nor dataclasses only tensors that require a gradient are
    changed: a cache, for instance, goes on as the one that it is. Raises TypeError for what cannot
    be copied.
    """
    leaves, form = tree_flatten(value)
    changed = [_replaced_inside(leaf, change) for leaf in leaves]
    if all(new is old for new, old in zip(changed, leaves, strict=True)):
        return value
    return tree_unflatten(changed, form)


def _replaced_inside(leaf: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Of what is no container that torch knows."""
    if isinstance(leaf, torch.Tensor):
        return change(leaf)
    news: dict[int, torch.Tensor] = {}
    every = dataclasses.is_dataclass(leaf)
    for tensor in tensors_in(leaf):
        wanted = id(tensor) not in news and (every or tensor.requires_grad)
        if wanted and (new := change(tensor)) is not tensor:
            news[id(tensor)] = new
    return _with(leaf, news, {}) if news else leaf


def _with(value: Any, news: Mapping[int, torch.Tensor], made: dict[int, Any]) -> Any:
    """``value`` with these tensors for those of the given ids; ``made``: copies made before."""
    if isinstance(value, torch.Tensor):
        return news.get(id(value), value)
    if id(value) in made:
        return made[id(value)]
    if not any(id(tensor) in news for tensor in tensors_in(value)):
        return value
    if isinstance(value, (tuple, set, frozenset)):
        parts = [_with(each, news, made) for each in value]
        kind: Any = type(value)
        new = made[id(value)] = kind(*parts) if hasattr(value, "_fields") else kind(parts)
        return new
    try:
        new = made[id(value)] = copy.copy(value)
    except copy.Error as error:
        raise TypeError(str(error)) from error
    if isinstance(value, Mapping):
        for key, each in value.items():
            new[key] = _with(each, news, made)
    elif isinstance(value, list):
        new[:] = [_with(each, news, made) for each in value]
    for name, each in _attributes(value):
        part = _with(each, news, made)
        if part is not each:
            object.__setattr__(new, name, part)  # of a frozen dataclass, too
    return new


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from list(getattr(value, "__dict__", {}).items())
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield name, getattr(value, name)
