"""Who takes part: ranks, nodes, devices; starting and aborting MPI."""

from __future__ import annotations

from mpizero.world.device import Device
from mpizero.world.group import Group

__all__ = ["Device", "Group"]
