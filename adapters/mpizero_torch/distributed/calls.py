"""What the calls of a process group have in common: now or later, and what torch gets to hold."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.distributed import Work

from mpizero import World
from mpizero_torch.distributed.c10d import ProcessGroup
from mpizero_torch.distributed.works import DoneWork, PendingWork

_Call = TypeVar("_Call", bound=Callable[..., Any])


def collective(call: _Call) -> _Call:
    """A method of a group that all ranks call: where one cannot, the others are told."""

    @functools.wraps(call)
    def told(self: GroupCalls, *arguments: Any, **named: Any) -> Any:
        with self.world.telling():
            return call(self, *arguments, **named)

    return told  # type: ignore[return-value]


class GroupCalls(ProcessGroup):  # type: ignore[misc]
    """A process group whose ranks are those of ``world``."""

    world: World

    def _is_async(self, opts: Any) -> bool:
        """Is a call to be carried out beside the compute? Without a thread all are at once."""
        return bool(getattr(opts, "asyncOp", True)) and self.world.overlaps

    def _start(self, opts: Any, call: Callable[..., Any]) -> Any:
        """Make a call of the core's: a handle if it goes on, None if it is done."""
        if self._is_async(opts):
            return call(asynchronous=True)
        call()
        return None

    def _work(
        self,
        handle: Any,
        result: Sequence[torch.Tensor],
        finish: Callable[[], None] | None = None,
    ) -> Work:
        if handle is not None:
            return PendingWork([handle], result, finish)
        if finish is not None:
            try:
                finish()
            except Exception as error:  # what this rank does with what has come is its own affair
                self.world.settle(error)
                raise
        return DoneWork(result)

    def _together(self, works: Sequence[Work], result: Sequence[torch.Tensor]) -> Work:
        """Several works as one."""
        pending = [work for work in works if isinstance(work, PendingWork)]
        if not pending:
            return DoneWork(result)
        return PendingWork([_Part(work) for work in pending], result)


class _Part:
    """A work as a handle of another."""

    def __init__(self, work: PendingWork) -> None:
        self._work = work

    def done(self) -> bool:
        return self._work.is_completed()

    def wait(self) -> None:
        self._work.wait()
