"""Which samples a loop over an evaluation loader has been given, to put results in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Place = tuple[Any, ...]


class HandedOut:
    """The samples of each batch of the last loop, in the order in which it was given them."""

    def __init__(self) -> None:
        self._batches: list[tuple[int, Sequence[Any]]] = []

    def clear(self) -> None:
        """A loop begins."""
        self._batches = []

    def add(self, step: int, samples: Sequence[Any]) -> None:
        """A batch is handed out; ``samples``: their indices. ``step`` grows, on all ranks alike."""
        self._batches.append((step, samples))

    @property
    def sizes(self) -> list[int]:
        """Samples of each batch."""
        return [len(samples) for _, samples in self._batches]

    def places(self, rank: int) -> list[tuple[Any, Place]]:
        """For each sample its index, and its place in the order of drawing, over all ranks."""
        return [
            (index, (step, rank, at))
            for step, samples in self._batches
            for at, index in enumerate(samples)
        ]
