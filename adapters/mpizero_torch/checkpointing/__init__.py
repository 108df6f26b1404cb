"""Checkpoints of training: model, optimizer, scheduler, data, random numbers.

Over ``mpizero.checkpoint``, which writes and reads; here is what there is to write of torch's.
"""

from __future__ import annotations

from mpizero_torch.checkpointing.manager import CheckpointManager
from mpizero_torch.checkpointing.pretrained import load_pretrained
from mpizero_torch.checkpointing.save import load, save

__all__ = ["CheckpointManager", "load", "load_pretrained", "save"]
