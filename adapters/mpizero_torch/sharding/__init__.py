"""ZeRO for torch: ``zero``, and what it makes of a model and its optimizer.

From above to below: ``zero`` checks and puts together; ``module`` and ``optimizer`` are what the
user's loop meets; ``state`` owns the memory, which ``runs`` shows to torch optimizers and ``hooks``
fill with gradients; ``units`` gathers parameters for modules (stage 3).
"""

from __future__ import annotations

from mpizero_torch.sharding.model_state import gathered
from mpizero_torch.sharding.module import ShardedModule
from mpizero_torch.sharding.optimizer import ShardedOptimizer
from mpizero_torch.sharding.zero import zero

__all__ = ["ShardedModule", "ShardedOptimizer", "gathered", "zero"]
