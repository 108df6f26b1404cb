"""ZeRO for torch: ``zero``, and what it makes of a model and its optimizer.

From above to below: ``zero`` checks and puts together; ``module`` and ``optimizer`` are what the
user's loop meets; ``state`` owns the memory, which ``runs`` shows to torch optimizers and ``hooks``
fill with gradients; ``units`` gathers parameters for modules (stage 3).
"""

from __future__ import annotations

from mpizero_torch.sharding.access import (
    full_gradient,
    full_parameter,
    optimizer_state,
    set_gradient,
    set_parameter,
)
from mpizero_torch.sharding.gathering import gathered
from mpizero_torch.sharding.module import ShardedModule
from mpizero_torch.sharding.optimizer import ShardedOptimizer
from mpizero_torch.sharding.precision import MixedPrecision
from mpizero_torch.sharding.zero import zero

__all__ = [
    "MixedPrecision",
    "ShardedModule",
    "ShardedOptimizer",
    "full_gradient",
    "full_parameter",
    "gathered",
    "optimizer_state",
    "set_gradient",
    "set_parameter",
    "zero",
]
