"""How far a long save or load is: told by rank 0 alone, to people who wait for it."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

_SECONDS_BEFORE_FIRST = 3.0
_SECONDS_BETWEEN = 10.0

_log = logging.getLogger("mpizero")


class Progress:
    """A bar on a terminal, else a line now and then, on stderr; nothing if it takes no 3 s.

    ``total``: the bytes that this rank is to move, as far as known. Shown only if ``shown``, and
    while ``quiet`` (nobody waits) only the logger hears of it.
    """

    def __init__(self, what: str, total: int | None, shown: bool) -> None:
        self._what, self._total, self._shown = what, total, shown
        self._done, self.quiet = 0, False
        self._start = time.monotonic()
        self._next = self._start + _SECONDS_BEFORE_FIRST
        self._bar: Any = None

    def add(self, nbytes: int) -> None:
        """So many more bytes have been moved."""
        self._done += nbytes
        if self.quiet or not self._shown:
            return
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
        elif now >= self._next:
            self._next = now + _SECONDS_BETWEEN
            if sys.stderr.isatty():
                self._begin_bar()
            else:
                self._print_line(now)

    def close(self, done: str, nbytes: int | None = None) -> None:
        """It is over: say to the logger how fast it was (``nbytes``: over all ranks)."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        moved = (self._done if nbytes is None else nbytes) / 1e9
        seconds = time.monotonic() - self._start
        if self._shown and moved:
            _log.info("%s: %.3f GB in %.2f s, %.2f GB/s", done, moved, seconds, moved / seconds)
        self._done = 0

    def _begin_bar(self) -> None:
        from rich.console import Console  # late: most saves are over before
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        self._bar = Bar(*columns, TransferSpeedColumn(), console=Console(stderr=True))
        self._bar.add_task(self._what, total=self._total, completed=self._done)
        self._bar.start()

    def _print_line(self, now: float) -> None:
        share = f" {self._done / self._total:.0%}," if self._total else ""
        speed = self._done / (now - self._start)
        moved = f"{self._done / 1e9:.1f} GB by this rank, {speed / 1e9:.2f} GB/s"
        print(f"[mpizero] {self._what}:{share} {moved}", file=sys.stderr, flush=True)
