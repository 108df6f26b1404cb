"""What rank 0 draws, followed by all ranks: read a step at a time, and dealt out by messages."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np

from mpizero import MismatchError, MpizeroError, World
from mpizero_torch.data.generators import Apart, advance

# A message has so many bytes; what does not fit follows in a second one.
_ROOM = 2048
_PART, _END, _FAILED = range(3)

_numbers: weakref.WeakKeyDictionary[World, count[int]] = weakref.WeakKeyDictionary()


class Followed:
    """Lets all ranks of ``everyone`` read what only rank 0 draws. Collective to make.

    Messages from rank 0, in a world of their own, rather than collectives: loaders read ahead, in
    threads too, and that must not depend on what the training sends meanwhile. ``what``: to
    compare over the ranks.
    """

    def __init__(self, everyone: World, what: str) -> None:
        self._everyone = everyone
        self._is_leader = everyone.rank == 0
        self._reading = 0  # how often it has been read from its beginning
        if everyone.size > 1:
            self._messages = messages = everyone.part("samplers", 0)
            number = next(_numbers.setdefault(messages, count(1)))
            everyone.agree([f"{what}, as number {number}"], "what is followed as rank 0 draws it")
            self._tag = number % (messages.largest_tag + 1)

    def read(
        self, deal: Callable[[], Iterator[Sequence[Any]]], goes_on: bool = False
    ) -> Iterator[Any]:
        """This rank's part of each thing that ``deal()`` yields on rank 0: one part for each rank.

        All ranks must read equally often, and as far. An exception there is raised on all ranks.
        What it draws from the global generators of random numbers it draws apart from the program:
        these move on by one number, the same on all ranks, unless it ``goes_on`` with what has been
        begun before.
        """
        self._reading += 1
        apart = Apart()
        if not goes_on:
            advance()
        if self._is_leader:
            return self._lead(deal, self._reading, apart)
        return self._follow(self._reading)

    def _lead(
        self, deal: Callable[[], Iterator[Sequence[Any]]], reading: int, apart: Apart
    ) -> Iterator[Any]:
        try:
            dealing = deal()
            while True:
                with apart.drawing():
                    parts = next(dealing, None)
                if parts is None:
                    break
                for rank in range(1, self._everyone.size):
                    self._send(rank, reading, _PART, parts[rank])
                yield parts[0]
        except Exception as error:
            for rank in range(1, self._everyone.size):
                self._send(rank, reading, _FAILED, _sent(error))
            raise
        for rank in range(1, self._everyone.size):
            self._send(rank, reading, _END, None)

    def _follow(self, reading: int) -> Iterator[Any]:
        while True:
            theirs, kind, value = self._receive()
            if theirs < reading:
                continue  # of a loop that this rank left before its end
            if theirs > reading:
                raise MismatchError(
                    f"A sampler that is followed as rank 0 draws it: rank 0 reads it for the "
                    f"{theirs}. time, rank {self._everyone.rank} for the {reading}. All ranks must "
                    "begin the same loops and take the same steps."
                )
            if kind == _END:
                return
            if kind == _FAILED:
                raise _remade(value)
            yield value

    def _send(self, rank: int, reading: int, kind: int, value: Any) -> None:
        content = np.frombuffer(pickle.dumps((reading, kind, value)), np.uint8)
        first = np.zeros(_ROOM, np.uint8)
        first[:8] = np.array([content.size], np.int64).view(np.uint8)
        first[8 : 8 + content.size] = content[: _ROOM - 8]
        self._messages.send(first, rank, self._tag, asynchronous=True)
        if content.size > _ROOM - 8:
            self._messages.send(content[_ROOM - 8 :], rank, self._tag, asynchronous=True)

    def _receive(self) -> tuple[int, int, Any]:
        first = np.empty(_ROOM, np.uint8)
        self._messages.recv(first, 0, self._tag)
        size = int(first[:8].view(np.int64)[0])
        content = first[8 : 8 + size]
        if size > _ROOM - 8:
            rest = np.empty(size - (_ROOM - 8), np.uint8)
            self._messages.recv(rest, 0, self._tag)
            content = np.concatenate([content, rest])
        found: tuple[int, int, Any] = pickle.loads(content.tobytes())
        return found


def _sent(error: Exception) -> Any:
    """What another rank can make the same error of; its text, where that cannot be sent."""
    parts = (type(error), error.args, vars(error))
    try:
        _remade(pickle.loads(pickle.dumps(parts)))
    except Exception:
        text = f"A sampler has failed on rank 0: {type(error).__name__}: {error}"
        parts = (MpizeroError, (text,), {})
    return parts


def _remade(parts: Any) -> Exception:
    kind, args, attributes = parts
    error: Exception = kind.__new__(kind, *args)  # its own __init__ may want other arguments
    error.args = args
    vars(error).update(attributes, reported_elsewhere=True)
    return error
