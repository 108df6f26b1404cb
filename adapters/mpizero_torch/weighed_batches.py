"""Marked tensors in batches of any make: found, put in and taken out, whatever holds them."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from mpizero import World
from mpizero_torch.weighed_tensor import Mark, WeighedTensor, bare, mark_of, wrapped

Change = Callable[[torch.Tensor], torch.Tensor]

# What a batch may refer to without holding it: nobody looks for tensors in there.
_APART = (
    nn.Module, Dataset, DataLoader, Sampler, World, torch.Generator, torch.dtype, torch.device,
    type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, ReferenceType,
)  # fmt: skip
_CONTAINERS = (tuple, list, deque, set, frozenset, dict)
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
# How deep batches are: containers within containers, of which some are objects.
_DEPTH, _OBJECTS = 16, 4


def marked(batch: Any, mark: Mark) -> Any:
    """The batch with its tensors marked, in new containers; what cannot be marked has escaped."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) is torch.Tensor or isinstance(tensor, WeighedTensor):
            return wrapped(tensor, mark)
        mark.escape(_what(tensor), for_good=True)
        return tensor

    rebuilding = _Rebuilding(batch, change)
    for each in rebuilding.others:
        if each is not None:
            number = isinstance(each, int | float | complex)
            mark.escape(_what(each), not number, holder=each)
    for each in rebuilding.unchanged:
        mark.escape(_what(each), for_good=True)
    return rebuilding.result


def handed_on(output: Any, mark: Mark) -> Any:
    """What a module has made of a marked input, marked likewise where that can be done."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        return wrapped(tensor, mark) if type(tensor) is torch.Tensor else tensor

    return _Rebuilding(output, change).result


def stripped(values: Any) -> Any:
    """The values with plain tensors in the place of marked ones, in new containers."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        return bare(tensor) if isinstance(tensor, WeighedTensor) else tensor

    return _Rebuilding(values, change).result


def marks_in(values: Any) -> list[Mark]:
    """The marks of all tensors in there, each once."""
    found: dict[int, Mark] = {}

    def look(tensor: torch.Tensor) -> torch.Tensor:
        mark = mark_of(tensor)
        if mark is not None:
            found[id(mark)] = mark
        return tensor

    _Rebuilding(values, look)
    return [*found.values()]


def _what(value: Any) -> str:
    return f"{type(value).__name__} in the batch"


@dataclass(frozen=True)
class _Attribute:
    """Where a child is: in an attribute, rather than under a key."""

    name: str


class _Rebuilding:
    """``root`` with ``change`` made to its tensors: what holds one is copied, the rest shared."""

    def __init__(self, root: Any, change: Change) -> None:
        self.others: list[Any] = []  # neither tensors nor what holds something
        self.unchanged: list[Any] = []  # holds tensors that should have been changed
        self._change = change
        self._known: dict[int, Any] = {}  # by id, and so kept while ids are used
        self._children: dict[int, list[tuple[Any, Any]]] = {}
        self._parents: dict[int, list[int]] = {}
        self._new: dict[int, Any] = {}
        self._explore(root, 0, 0)
        self._affected = self._above([*self._new])
        self.result = self._renewed(root)

    def _explore(self, value: Any, depth: int, objects: int) -> None:
        if isinstance(value, _PLAIN):
            self.others.append(value)
            return
        if id(value) in self._known or isinstance(value, _APART):
            return
        self._known[id(value)] = value
        if isinstance(value, torch.Tensor):
            now = self._change(value)
            if now is not value:
                self._new[id(value)] = now
            return
        children = _children(value) if depth < _DEPTH and objects <= _OBJECTS else None
        if children is None:
            self.others.append(value)
            return
        objects += not isinstance(value, _CONTAINERS)
        self._children[id(value)] = children
        for _, child in children:
            self._parents.setdefault(id(child), []).append(id(value))
            self._explore(child, depth + 1, objects)

    def _above(self, places: list[int]) -> set[int]:
        """All that hold one of these, directly or not."""
        found: set[int] = set()
        while places:
            for parent in self._parents.get(places.pop(), ()):
                if parent not in found:
                    found.add(parent)
                    places.append(parent)
        return found

    def _renewed(self, value: Any) -> Any:
        at = id(value)
        if at in self._new:
            return self._new[at]
        if at not in self._affected or isinstance(value, _PLAIN):
            return value
        if isinstance(value, tuple):
            made = self._new[at] = self._renewed_tuple(value)
        elif isinstance(value, set | frozenset):
            made = self._new[at] = type(value)(self._renewed(each) for each in value)
        else:
            made = self._renewed_object(value)
        return made

    def _renewed_tuple(self, value: Any) -> Any:
        kind = type(value)
        children = self._children[id(value)]
        parts = [self._renewed(each) for _, each in children[: len(value)]]
        if hasattr(kind, "n_sequence_fields"):  # one of torch.return_types
            return kind(parts)
        made = tuple.__new__(kind, parts)
        for where, each in children[len(value) :]:
            object.__setattr__(made, where.name, self._renewed(each))
        return made

    def _renewed_object(self, value: Any) -> Any:
        try:
            made = self._new[id(value)] = copy.copy(value)
            if getattr(value, "__dict__", None) is value:  # a dict whose keys are attributes
                made.__dict__ = made
            self._complete(made, value)
        except Exception:  # of a class that does not allow it: it stays as it is
            self._new[id(value)] = made = value
            self.unchanged.append(value)
        return made

    def _complete(self, made: Any, old: Any) -> None:
        """Put into the copy ``made`` of ``old`` what is new in it."""
        for where, child in self._children[id(old)]:
            if not isinstance(where, _Attribute):
                if (new := self._renewed(child)) is not child:
                    made[where] = new
                continue
            copied = getattr(made, where.name, None)
            if copied is child or id(child) in self._new:
                if (new := self._renewed(child)) is not child:
                    object.__setattr__(made, where.name, new)
            elif id(child) in self._affected:
                # Its class has copied it along, and knows its own copy.
                self._new[id(child)] = copied
                self._complete(copied, child)


def _children(value: Any) -> list[tuple[Any, Any]] | None:
    """What it holds, and where; None for what nobody can look into."""
    attributes = [*_attributes(value)]
    if isinstance(value, _CONTAINERS) and not isinstance(value, dict):
        return [*enumerate(value), *attributes]
    if isinstance(value, dict) or (isinstance(value, Mapping) and not attributes):
        return [*value.items(), *attributes]
    if isinstance(value, GeneratorType) or not attributes:
        return None
    return attributes


def _attributes(value: Any) -> Iterator[tuple[_Attribute, Any]]:
    for name, each in dict(getattr(value, "__dict__", None) or {}).items():
        yield _Attribute(name), each
    for kind in type(value).__mro__:
        names = kind.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{kind.__name__.lstrip('_')}{name}"
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield _Attribute(name), getattr(value, name)
