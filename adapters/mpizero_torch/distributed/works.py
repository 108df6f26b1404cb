"""``Work``: what torch holds of a call that may still be under way."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch.futures import Future

from mpizero.diagnostics import serve
from mpizero_torch.distributed.c10d import WorkBase

_lock = threading.Lock()

_POLL_SECONDS = 100e-6


class DoneWork(WorkBase):  # type: ignore[misc]
    """A call that has been carried out."""

    def __init__(self, result: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._result = result

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def exception(self) -> BaseException | None:
        return None

    def result(self) -> list[torch.Tensor]:
        return list(self._result)

    def synchronize(self) -> None:
        pass

    def block_current_stream(self) -> None:
        pass

    def get_future(self) -> Any:
        future: Any = Future()
        future.set_result(list(self._result))
        return future


class PendingWork(WorkBase):  # type: ignore[misc]
    """Calls under way. ``finish`` puts what they have given where it belongs, once all are done.

    ``handles``: the core's, with ``done()`` and ``wait()``.
    """

    def __init__(
        self,
        handles: Sequence[Any],
        result: Sequence[torch.Tensor],
        finish: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self._handles, self._result, self._finish = handles, result, finish
        self._once = threading.Lock()
        self._finished = False
        self._error: BaseException | None = None
        self._future: Any = None
        self._then: Callable[[], None] | None = None
        self._sender = -1
        # Results on a GPU are put in their places on the stream of whoever waits first.
        self._device = next((each.device for each in result if each.is_cuda), None)
        self._event: Any = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait for them; raise what they raise, and RuntimeError when the time is up."""
        if timeout is not None and timeout > timedelta(0) and not self._finished:
            self._wait_until(time.monotonic() + timeout.total_seconds(), timeout)
        self._complete()
        if self._error is not None:
            raise self._error
        if self._event is not None:  # who waits second, perhaps on another stream, comes after, too
            self._event.wait(torch.cuda.current_stream(self._device))
        return True

    def is_completed(self) -> bool:
        if not self._finished and all(handle.done() for handle in self._handles):
            self._complete()
        return self._finished and (self._event is None or self._event.query())

    def is_success(self) -> bool:
        return self.is_completed() and self._error is None

    def exception(self) -> BaseException | None:
        return self._error

    def result(self) -> list[torch.Tensor]:
        return list(self._result)

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()

    def source_rank(self) -> int:
        """Who sent what was received."""
        return self._sender

    _source_rank = source_rank

    def get_future(self) -> Any:
        """Completes by itself; its value are the tensors."""
        with _lock:
            if self._future is None:
                self._future = Future()
                if self._finished:
                    self._set_future()
                else:
                    _fulfillers.submit(self._fulfil)
            return self._future

    def when_done(self, then: Callable[[], None]) -> None:
        """Call ``then`` when all is done, before anyone who waits goes on."""
        with self._once:
            if not self._finished:
                self._then = then
                return
        then()

    def _complete(self) -> None:
        with self._once:
            if self._finished:
                return
            try:
                for handle in self._handles:
                    given = handle.wait()
                    if isinstance(given, int):
                        self._sender = given
                if self._finish is not None:
                    self._finish()
                if self._device is not None:
                    self._event = torch.cuda.current_stream(self._device).record_event()
            except Exception as error:
                self._error = error
            self._handles, self._finish = (), None
            if self._then is not None:
                self._then()
                self._then = None
            self._finished = True

    def _fulfil(self) -> None:
        self._complete()
        if self._event is not None:  # nobody knows on which stream the future's value is used
            self._event.synchronize()
        self._set_future()

    def _set_future(self) -> None:
        if self._error is not None:
            self._future.set_exception(self._error)
        else:
            self._future.set_result(list(self._result))

    def _wait_until(self, deadline: float, timeout: timedelta) -> None:
        while not all(handle.done() for handle in self._handles):
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"Timed out waiting {timeout.total_seconds() * 1000:.0f} ms for a collective "
                    "or a message to complete."
                )
            time.sleep(_POLL_SECONDS)


class _Fulfillers:
    """Threads that complete works for their futures: as many as there are works waited for.

    Not the thread that carries calls out: what a future sets off may itself wait for a call. They
    are daemons, as a rank that fails must not wait for what never comes.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._idle = 0

    def submit(self, task: Callable[[], None]) -> None:
        """Run ``task`` soon. The caller holds the lock."""
        if self._idle == 0:
            threading.Thread(target=self._serve, name="mpizero-future", daemon=True).start()
        else:
            self._idle -= 1
        self._tasks.put(task)

    def _serve(self) -> None:
        serve()
        while True:
            self._tasks.get()()
            with _lock:
                self._idle += 1


_fulfillers = _Fulfillers()


def on_helper_thread(task: Callable[[], None]) -> None:
    """Run ``task`` soon, on a thread that is not this one."""
    with _lock:
        _fulfillers.submit(task)
