"""Data: each rank its part, the same steps everywhere, exact means, and where one stopped."""

from __future__ import annotations

from mpizero_torch.data.loader import ShardedLoader
from mpizero_torch.data.sampler import ShardedSampler
from mpizero_torch.data.shard import shard
from mpizero_torch.data.stream import ShardedStream

__all__ = ["ShardedLoader", "ShardedSampler", "ShardedStream", "shard"]
