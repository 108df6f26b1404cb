"""Models that are built without memory: what constructors do is recorded, and carried out later.

``tape`` has what was done and carries out the part that a tensor depends on; ``recording`` writes
it down; ``hollow`` is what tensors without memory are meanwhile.
"""

from __future__ import annotations

from mpizero_torch.building.filling import (
    check_filled,
    fill,
    fill_all,
    fill_or_mark,
    is_hollow,
    mark,
)
from mpizero_torch.building.recording import deferred

__all__ = ["check_filled", "deferred", "fill", "fill_all", "fill_or_mark", "is_hollow", "mark"]
