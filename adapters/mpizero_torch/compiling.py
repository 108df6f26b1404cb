"""torch.compile around and within what is distributed: who is asking, and what is compiled."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])


def as_it_is(function: _F, recursive: bool = True) -> _F:
    """A function that torch.compile leaves alone, and without ``recursive`` not what it calls.

    (torch.compiler.disable would import all of dynamo with this module.)
    """
    disabled: _F = vars(torch)["_disable_dynamo"](function, recursive=recursive)
    return disabled


_DESCRIBING = ("torch._dynamo", "torch._subclasses", "torch._functorch", "torch._guards",
               "torch.fx.experimental")  # fmt: skip
_BETWEEN = ("torch.overrides", "torch._tensor", "torch.utils")


def is_describing() -> bool:
    """Is it torch.compile that asks, to describe a tensor that it may meet in a program?

    To be called by a ``__torch_function__``.
    """
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(_BETWEEN):
            return bool(name.startswith(_DESCRIBING))
        frame = frame.f_back  # type: ignore[assignment]
    return False


@functools.partial(as_it_is, recursive=False)
def is_under_way() -> bool:
    """Is what runs now being compiled, or part of something that is?"""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None
