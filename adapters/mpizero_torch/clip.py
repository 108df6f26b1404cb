"""Clipping gradients of a distributed model, after backward and before the optimizer's step."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from mpizero_torch.sharding.module import ShardedModule


def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
    """Scale the gradients of ``model`` so that their global norm is at most ``max_norm``.

    Returns the norm before scaling (a scalar tensor, the same on every rank); tied parameters count
    once. Replicas have the same gradients after backward, so nothing is sent for them; under
    sharding it is collective, and the norm is that of the whole gradients.
    """
    if not isinstance(model, ShardedModule):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, norm_type)
    gradients = model.own_gradients()
    norm = _global_norm(model, gradients, float(norm_type))
    scale = min(1.0, max_norm / (norm + 1e-6)) if math.isfinite(norm) else max_norm / norm
    if gradients and scale != 1.0:
        torch._foreach_mul_(gradients, scale)
    return torch.tensor(norm, dtype=torch.float32, device=model.state.device)


def clip_grad_value_(model: nn.Module, clip_value: float) -> None:
    """Limit each element of the gradients of ``model`` to [-clip_value, clip_value]."""
    if not isinstance(model, ShardedModule):
        torch.nn.utils.clip_grad_value_(model.parameters(), clip_value)
        return
    for gradient in model.own_gradients():
        gradient.clamp_(-clip_value, clip_value)


def _global_norm(model: ShardedModule, gradients: list[torch.Tensor], norm_type: float) -> float:
    """Of all ranks' shards; copies of a shard on other ranks count once."""
    speaks = model.state.group.is_holder
    if norm_type == math.inf:
        own = max((float(each.abs().max()) for each in gradients), default=0.0)
        return float(model.world.allreduce(own, "max"))
    if norm_type == 2.0:
        own = model.own_squares()
    else:
        own = sum(float(each.double().abs().pow(norm_type).sum()) for each in gradients)
    total = model.world.allreduce(np.float64(own if speaks else 0.0))
    return math.pow(total, 1 / norm_type)
