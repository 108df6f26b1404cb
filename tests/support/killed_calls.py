"""Let a process die before the n-th call to the file system that a checkpoint is made of."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mpizero.checkpoint import files

# The file layer, and what it writes a note with: there a death leaves a file without a word.
CALLS = (
    "create", "open_to_write", "write_at", "sync", "close", "write_whole", "write_note",
    "make_folder", "remove", "remove_folder", "sync_folder", "rename", "write",
)  # fmt: skip


def deaths(action: Callable[[], Any]) -> Iterator[int]:
    """Do ``action`` in a process that dies before its 1st, 2nd... call, until one comes to its end.

    Yields the number of the call after each death, for the caller to see what is left, and to put
    everything back as it was.
    """
    at = 1
    while dies(action, at):
        yield at
        at += 1


def dies(action: Callable[[], Any], at: int, calls: Sequence[str] = CALLS) -> bool:
    """Do ``action`` in a process that dies before its n-th of these calls; did it have so many?"""
    child = os.fork()
    if child == 0:
        try:
            _die_at(at, calls)
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
            status = 1
        os._exit(status)
    _, ended = os.waitpid(child, 0)
    if os.WIFSIGNALED(ended):
        assert os.WTERMSIG(ended) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(ended) == 0, f"before call {at}: failed by itself"
    return False


def _die_at(at: int, calls: Sequence[str]) -> None:
    left = at

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in calls:
        module = os if name == "write" else files
        setattr(module, name, counted(getattr(module, name)))
