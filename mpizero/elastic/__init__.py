"""Surviving the death of ranks: the others form a new World and go on from the last commit.

From above to below: ``run`` calls the user's function again after a death; ``keeper`` knows what
has been committed in this World and the one before; ``store`` holds it in memory of the node, where
it outlives the rank that put it there; ``snapshot`` reads it, on any number of ranks, as a
checkpoint is read.
"""

from __future__ import annotations

from mpizero.elastic.keeper import Keeper
from mpizero.elastic.run import Beginning, elastic
from mpizero.elastic.snapshot import Snapshot

__all__ = ["Beginning", "Keeper", "Snapshot", "elastic"]
