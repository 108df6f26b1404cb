"""Giving tensors that were built without memory their values."""

from __future__ import annotations

import torch
from torch import nn

from mpizero import ArgumentError
from mpizero_torch.building.hollow import Hollow, show
from mpizero_torch.building.recording import SOURCE
from mpizero_torch.building.tape import FILLER, UndefinedError


def is_hollow(tensor: torch.Tensor) -> bool:
    """Was it made in ``mz.deferred()``, and has no values yet?"""
    return issubclass(type(tensor), Hollow)


def fill(tensor: torch.Tensor, name: str, function: str = "zero()", for_good: bool = False) -> None:
    """Give a tensor the values that it would have by now, in memory of its own.

    ``for_good``: in torch's memory, not in some that is meant to be given back soon.

    Raises ArgumentError, with its ``name``, if somebody has yet to write them.
    """
    tape, form = vars(tensor)[SOURCE]
    try:
        _set(tensor, tape.tensors([form])[0], for_good)
    except UndefinedError:
        raise _unwritten(function, name) from None


def fill_or_mark(tensor: torch.Tensor) -> None:
    """The same, for one that may have values that are still to be written: see ``undefined``."""
    tape, form = vars(tensor)[SOURCE]
    try:
        _set(tensor, tape.tensors([form])[0])
    except UndefinedError:
        _set(tensor, tape.filled(form, FILLER))


def fill_all(module: nn.Module, function: str) -> None:
    """Give all of a module its values."""
    for name, each in [*module.named_parameters(), *module.named_buffers()]:
        if is_hollow(each):
            fill(each, name, function, for_good=True)


def undefined(tensor: torch.Tensor) -> bool:
    """Has ``fill_or_mark`` left values in it that nobody has written since?"""
    if tensor.numel() == 0:
        return False
    octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
    marked = (octets == FILLER).view(-1, tensor.element_size()).all(1)
    # Of numbers that are no floats the filler is one like others.
    found = marked.any() if tensor.is_floating_point() or tensor.is_complex() else marked.all()
    return bool(found)


def check_filled(tensor: torch.Tensor, name: str, function: str = "zero()") -> None:
    """Raise ArgumentError for what ``fill_or_mark`` has marked, and nobody has written."""
    if undefined(tensor):
        raise _unwritten(function, name)


def mark(tensor: torch.Tensor) -> None:
    """Fill it with what ``undefined`` knows."""
    octets = torch.full((tensor.numel() * tensor.element_size(),), FILLER, dtype=torch.uint8)
    tensor.copy_(octets.view(tensor.dtype).view(tensor.shape))


def _set(tensor: torch.Tensor, values: torch.Tensor, for_good: bool = False) -> None:
    """Let a tensor have values, and be what it was before."""
    del vars(tensor)[SOURCE]
    show(tensor)
    whole = values.untyped_storage().nbytes() == values.numel() * values.element_size()
    tensor.data = values.clone() if for_good or not whole else values


def _unwritten(function: str, name: str) -> ArgumentError:
    return ArgumentError(
        function, "model", f"'{name}' made in mz.deferred(), to which nobody has written values",
        "parameters and buffers that their constructors write",
        "Write them there, inside `with mz.deferred():`, or by mz.zero(..., initialise=...), which "
        "is called with each such module.",
    )  # fmt: skip
