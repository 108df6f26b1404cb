"""What users hold: ``init`` and the ``World`` with its collectives."""

from __future__ import annotations

from mpizero.api.init import init
from mpizero.api.world import World

__all__ = ["World", "init"]
