"""``Readable``: what a run is restored from, on disk or in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mpizero.checkpoint.format import TensorSpec


class Readable(Protocol):
    """Tensors by part and name, and what was saved beside them; see ``Checkpoint``."""

    path: Path

    @property
    def values(self) -> dict[str, Any]:
        """What was saved that is no tensor, by part."""

    def specs(self, part: str) -> Mapping[str, TensorSpec]:
        """The tensors of a part, by name."""

    def metadata(self, part: str) -> dict[str, str]:
        """The strings that belong to a part."""

    def read(self, part: str, name: str, elements: slice | None = None) -> Any:
        """The ``elements`` of a tensor, 1-D, or all of it in its shape: memory of its own."""

    def borrow(self, part: str, name: str, elements: slice) -> Any:
        """The same, 1-D, in memory that is not the caller's: to be copied at once."""
