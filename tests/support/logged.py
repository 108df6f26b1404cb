"""What was logged: a fixture in the place of pytest's own plugin, which is switched off.

That adds two handlers to each of torch's loggers before every test and takes them away again, twice
more for what is set up and torn down: a tenth of the time of most tests.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class Logged(logging.Handler):
    """The messages of a logger while ``at_level`` is entered, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record."""
        self.messages.append(record.getMessage())

    @contextmanager
    def at_level(self, level: str | int, name: str) -> Iterator[None]:
        """Take what the logger of that name, and those below it, say at that level or above."""
        logger = logging.getLogger(name)
        before = logger.level
        logger.setLevel(level)
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.setLevel(before)


@pytest.fixture
def logged() -> Logged:
    """What is logged in this test."""
    return Logged()
