"""``Handle``: an operation under way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol


class Order(Protocol):
    """Of an operation on device memory: what is queued, and who comes after it."""

    def wait(self, blocking: bool = False) -> None: ...

    def is_done(self) -> bool: ...


class Handle:
    """The result-to-be of an asynchronous operation.

    Every rank must wait for its handles; the array must not be touched before. Any thread may wait
    for it or ask whether it is done, several at a time.
    """

    def __init__(
        self,
        work: Callable[[], Any],
        advance: Callable[[Handle], None],
        block: Callable[[Handle], None] = lambda handle: None,
        what: str = "",
        order: Order | None = None,
    ) -> None:
        self.what = what
        self._order = order
        self._work: Callable[[], Any] | None = work
        self._block = block
        self._advance = advance
        self._finished = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        """True once the operation has finished (or failed: ``wait`` tells).

        Without a progress thread the operation is carried out here, so that polling gets there.
        """
        self._advance(self)
        return self._finished.is_set() and (self._order is None or self._order.is_done())

    def wait(self, blocking: bool = False) -> Any:
        """Wait until the operation has finished; return its array, or raise what it raised.

        Device memory is waited for by the stream on which this thread uses it (torch's or CuPy's
        current one): what is queued there from now on sees the result, and the host goes on.
        ``blocking``: the host waits until the result is there. Each thread that uses it waits.
        """
        if not self._finished.is_set():
            self._advance(self)
            self._block(self)
        if self._order is not None:
            self._order.wait(blocking)
        if self._error is not None:
            raise self._error
        return self._result

    def run(self) -> None:
        """Carry the operation out (the worker's part)."""
        if self._work is None:
            return
        work, self._work = self._work, None
        try:
            self._result = work()
        except BaseException as error:  # handed to the waiting thread, whatever it is
            self._error = error
        finally:
            self._finished.set()

    def fail(self, error: BaseException) -> None:
        """Never carry the operation out: who waits for it gets ``error``."""
        self._work, self._error = None, error
        self._finished.set()


def finished(result: Any, order: Order | None = None) -> Handle:
    """A handle of something that has been carried out already."""
    handle = Handle(lambda: result, lambda _: None, order=order)
    handle.run()
    return handle
