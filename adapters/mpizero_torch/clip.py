"""Clipping gradients of a distributed model, after backward and before the optimizer's step."""

from __future__ import annotations

import torch
from torch import nn


def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
    """Scale the gradients of ``model`` so that their global norm is at most ``max_norm``.

    Returns the norm before scaling (a scalar tensor, the same on every rank). Gradients are the
    same on every rank after backward, so nothing is sent; tied parameters count once.
    """
    return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, norm_type)


def clip_grad_value_(model: nn.Module, clip_value: float) -> None:
    """Limit each element of the gradients of ``model`` to [-clip_value, clip_value]."""
    torch.nn.utils.clip_grad_value_(model.parameters(), clip_value)
