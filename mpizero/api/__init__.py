"""What users hold: ``init``, the ``World`` with its collectives, and meshes of ranks."""

from __future__ import annotations

from mpizero.api.init import init
from mpizero.api.mesh import Mesh, mesh
from mpizero.api.world import World

__all__ = ["Mesh", "World", "init", "mesh"]
