"""Messages between two ranks of a ``World``."""

from __future__ import annotations

from typing import Any

from mpizero.api.calls import Calls
from mpizero.api.describe import describe
from mpizero.progress import Message, Messages


class MessageCalls(Calls):
    """``send`` and ``recv``: no collectives, only the two ranks take part."""

    _messages: Messages

    @property
    def largest_tag(self) -> int:
        """The largest tag of a message that this MPI has."""
        return self._messages.largest_tag

    def send(self, x: Any, to: int, tag: int = 0, *, asynchronous: bool = False) -> Message | None:
        """Send ``x`` (any shape and dtype) to rank ``to``, which calls ``recv`` with this ``tag``.

        Returns when ``x`` may be changed again, or, ``asynchronous``, at once, a handle with
        ``wait()`` and ``done()``. Many may be under way, in any order; those between two ranks with
        one tag arrive in the order in which they were sent. Raises ArgumentError.
        """
        self._caller.open_for("send()")
        self._check_rank("send()", "to", to)
        self._messages.check_tag("send()", tag)
        source = self._open(x, "send()", "x", writable=False)
        what = describe("send", source, f"to {to}", tag)
        message = self._messages.send(source, to, tag, what, self._caller.hold)
        if asynchronous:
            return message
        message.wait()
        return None

    def recv(
        self,
        x: Any,
        source: int | None = None,
        tag: int | None = 0,
        *,
        asynchronous: bool = False,
    ) -> Any:
        """Receive what rank ``source`` sends with this ``tag`` into ``x``; returns who sent it.

        ``source`` None: from any rank; ``tag`` None: with any tag. ``asynchronous``: returns a
        handle at once, whose ``wait()`` says who sent it. Raises ArgumentError, and MismatchError
        where what comes has not as many bytes as ``x``.
        """
        self._caller.open_for("recv()")
        if source is not None:
            self._check_rank("recv()", "source", source)
        self._messages.check_tag("recv()", tag)
        target = self._open(x, "recv()", "x", writable=True)
        sender = "from any rank" if source is None else f"from {source}"
        what = describe("recv", target, sender, "any tag" if tag is None else tag)
        message = self._messages.receive(target, source, tag, what, self._caller.hold)
        return message if asynchronous else message.wait()
