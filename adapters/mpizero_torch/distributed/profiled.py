"""Calls in torch's profiler: shown as those of its own backends are, as "mpizero:all_reduce"."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from mpizero_torch.distributed.works import PendingWork, on_helper_thread

_Call = TypeVar("_Call", bound=Callable[..., Any])

_bindings: Any = torch._C._autograd
_is_profiling: Callable[[], bool] = _bindings._profiler_enabled
_inside = threading.local()  # a call that another consists of is not shown


def shown_as(name: str, inputs: int | None = 0) -> Callable[[_Call], _Call]:
    """Show a method of a group as ``name``; ``inputs``: which argument is what it takes."""
    title = f"mpizero:{name}"

    def decorate(call: _Call) -> _Call:
        @functools.wraps(call)
        def shown(self: Any, *arguments: Any, **named: Any) -> Any:
            if not _is_profiling() or getattr(_inside, "a_call", False):
                return call(self, *arguments, **named)
            taken = arguments[inputs] if inputs is not None and inputs < len(arguments) else ()
            record = _bindings._record_function_with_args_enter(title, *_shapes(taken))
            _inside.a_call = True
            work = None
            try:
                work = call(self, *arguments, **named)
            finally:
                _inside.a_call = False
                if isinstance(work, PendingWork):
                    work.when_done(functools.partial(_end, record))
                else:
                    _end(record)
            return work

        return shown  # type: ignore[return-value]

    return decorate


def _end(record: Any) -> None:
    """On another thread: by that the profiler knows what is asynchronous."""
    ended = threading.Event()

    def end() -> None:
        _bindings._record_function_with_args_exit(record)
        ended.set()

    on_helper_thread(end)
    ended.wait()


def _shapes(taken: Any) -> Iterator[torch.Tensor]:
    """All tensors in lists of lists; complex ones as pairs of numbers, as torch shows them."""
    if isinstance(taken, torch.Tensor):
        yield torch.view_as_real(taken.detach().resolve_conj()) if taken.is_complex() else taken
    elif isinstance(taken, Sequence):
        for each in taken:
            yield from _shapes(each)
