"""The board: ranks, played by threads here, exchange notes and payloads at their own pace."""

from __future__ import annotations

import random
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpizero.memory.board import PAGES, Board
from mpizero.memory.node_shared import PAGE
from mpizero.world import shared_cores

pytestmark = pytest.mark.once

PAYLOAD_BYTES = 256


class Memory:
    """What ``Board`` needs of a window, in one process."""

    def __init__(self, parts: list[np.ndarray], rank: int) -> None:
        self.parts, self.own = tuple(parts), parts[rank]

    def sync(self) -> None:
        time.sleep(0)  # MPI's lets other threads run, too


def on_boards(ranks: int, crowded: bool, program: Any) -> None:
    """Run ``program(board, rng)`` for every rank, each in a thread of its own."""
    parts = [np.zeros(PAGES * (PAGE + PAYLOAD_BYTES), np.uint8) for _ in range(ranks)]
    errors: list[BaseException] = []

    def play(rank: int) -> None:
        try:
            program(Board(Memory(parts, rank), rank, crowded), random.Random(rank))  # type: ignore[arg-type]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=play, args=(r,), daemon=True) for r in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not errors:  # one that failed leaves the others waiting
            thread.join(0.05)
    assert not errors, errors


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_everyone_sees_what_was_posted_in_the_same_exchange(ranks: int, crowded: bool) -> None:
    def program(board: Board, rng: random.Random) -> None:
        for step in range(150):
            payload = board.next.payloads[board.rank].view(np.int64)
            payload[...] = 1000 * step + board.rank
            if rng.random() < 0.1:
                time.sleep(0.001)
            page = board.exchange(step, board.rank * 10)
            if rng.random() < 0.1:  # a slow reader, while others post again
                time.sleep(0.001)
            for rank, note in enumerate(page.notes):
                assert (note[1], note[2]) == (step, rank * 10)
                assert (page.payloads[rank].view(np.int64) == 1000 * step + rank).all()

    on_boards(ranks, crowded, program)


def test_a_payload_may_be_read_until_the_next_exchange_but_one() -> None:
    """Two-step collectives show results in the page of the exchange before."""

    def program(board: Board, rng: random.Random) -> None:
        for step in range(150):
            board.next.payloads[board.rank][...] = step % 251
            page = board.exchange()
            page.payloads[board.rank][0] = (step + 7) % 251  # a result, put in place
            board.exchange()
            if rng.random() < 0.2:
                time.sleep(0.001)
            for payload in page.payloads:
                assert payload[0] == (step + 7) % 251 and (payload[1:] == step % 251).all()

    on_boards(3, True, program)


def test_two_pages_would_be_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: with a page less, a quick rank overwrites what a slow one reads."""
    monkeypatch.setattr("mpizero.memory.board.PAGES", 2)

    def program(board: Board, rng: random.Random) -> None:
        for step in range(20):
            board.next.payloads[board.rank][...] = step
            page = board.exchange()
            board.exchange()
            if board.rank == 0:
                time.sleep(0.005)
            assert all((payload == step).all() for payload in page.payloads)

    with pytest.raises(AssertionError):
        on_boards(2, True, program)


@pytest.mark.parametrize("shares", [False, True])
def test_who_shares_its_core_with_compute_sleeps_while_it_waits(shares: bool) -> None:
    """One rank is late; the other looks all the time, or leaves its core to the compute."""
    naps: list[float] = []

    def program(board: Board, rng: random.Random) -> None:
        if board.rank == 0:
            time.sleep(0.2)
        else:
            threading.current_thread().name = "waiter"
            if shares:
                shared_cores.share()
        board.exchange()
        shared_cores.leave()

    def nap(seconds: float) -> None:
        if threading.current_thread().name == "waiter":  # others may still wait on other boards
            naps.append(seconds)
        time.sleep(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpizero.memory.board.time", SimpleNamespace(sleep=nap))
        patch.setattr("mpizero.memory.board._YIELDING_LOOKS", 10**9)  # after which everyone naps
        on_boards(2, False, program)
    assert bool(naps) == shares
