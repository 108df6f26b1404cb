"""Clipping gradients of a distributed model, after backward and before the optimizer's step."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn

from mpizero import MpizeroError, World
from mpizero_torch import slices
from mpizero_torch.names import uncompiled
from mpizero_torch.sharding.module import ShardedModule
from mpizero_torch.wrapper import DistributedModule


class NonFiniteNormError(MpizeroError, RuntimeError):
    """Gradients are not finite, and were to be."""


def clip_grad_norm_(
    model: nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Scale the gradients of ``model`` so that their global norm is at most ``max_norm``.

    As torch's of this name, which takes ``foreach``, too; here it changes nothing. With
    ``error_if_nonfinite``, a norm that is infinite or no number raises an MpizeroError, which is a
    RuntimeError as torch's, on all ranks, and no gradient is changed.

    Returns the norm before scaling (a scalar tensor, the same on every rank); tied parameters count
    once. Replicas have the same gradients after backward, so nothing is sent for them; under
    sharding, and where a mesh cuts the model up, it is collective, and the norm is that of the
    whole model's gradients: slices of a parameter are put together, what several ranks hold counts
    once.
    """
    model = uncompiled(model)
    if not isinstance(model, DistributedModule) or not _is_cut(model):
        return torch.nn.utils.clip_grad_norm_(
            model.parameters(), max_norm, norm_type, error_if_nonfinite, foreach
        )
    cuts = _cuts(model)
    with cuts[0].telling() if cuts else nullcontext():
        max_norm, norm_type = float(max_norm), float(norm_type)
        gradients = own_gradients(model)
    norm = _global_norm(model, cuts, gradients, norm_type)
    if error_if_nonfinite and not math.isfinite(norm):
        raise NonFiniteNormError(
            f"clip_grad_norm_(): the norm of order {norm_type:g} of the gradients is {norm}, and "
            "error_if_nonfinite=True was given. Leave this step out, or look for what is not "
            "finite with mz.detect_nonfinite(model)."
        )
    scale = min(1.0, max_norm / (norm + 1e-6)) if math.isfinite(norm) else max_norm / norm
    if gradients and scale != 1.0:
        torch._foreach_mul_(gradients, scale)
        _saw(model)
    return torch.tensor(norm, dtype=_dtype(model), device=model.world.device.name)


def clip_grad_value_(model: nn.Module, clip_value: float) -> None:
    """Limit each element of the gradients of ``model`` to [-clip_value, clip_value]."""
    model = uncompiled(model)
    if not isinstance(model, DistributedModule):
        torch.nn.utils.clip_grad_value_(model.parameters(), clip_value)
        return
    for gradient in own_gradients(model):
        gradient.clamp_(-clip_value, clip_value)
    _saw(model)


def _dtype(model: DistributedModule) -> torch.dtype:
    """The gradients' widest, as torch has it; at least float32, in which 16 bits are summed."""
    wide = [p.dtype.to_real() for _, p in model.named if p.is_floating_point() or p.is_complex()]
    return functools.reduce(torch.promote_types, wide, torch.float32)


def _saw(model: DistributedModule) -> None:
    if isinstance(model, ShardedModule):
        model.gradients.saw()


def own_gradients(model: DistributedModule) -> list[torch.Tensor]:
    """The memory of gradients on this rank: its shards, or its parts of the parameters'."""
    if isinstance(model, ShardedModule):
        return model.own_gradients()
    found = (slices.local_gradient(parameter) for parameter in model.parameters())
    return [gradient for gradient in found if gradient is not None]


def _is_cut(model: DistributedModule) -> bool:
    """Has this rank, or torch, less than all of each gradient?"""
    return (
        isinstance(model, ShardedModule)
        or model.world.mesh is not None
        or any(slices.is_slice(parameter) for parameter in model.parameters())
    )


def _cuts(model: DistributedModule) -> list[World]:
    """The ranks over which parts are put together, one group after the other."""
    parts = model.world if isinstance(model, ShardedModule) else None  # cut by data parallelism
    mesh = model.world.mesh
    return [world for world in (parts, mesh.model if mesh else None) if world is not None]


def _global_norm(
    model: DistributedModule, cuts: Sequence[World], gradients: list[torch.Tensor], norm_type: float
) -> float:
    """Of all ranks' parts; copies of a part on other ranks count once."""
    if norm_type == math.inf:
        most = max((float(each.abs().max()) for each in gradients if each.numel()), default=0.0)
        for world in cuts:
            most = float(world.allreduce(most, "max"))
        return most
    total = np.float64(_own_power(model, norm_type))
    for world in cuts:
        total = world.allreduce(total)
    return math.pow(total, 1 / norm_type)


def _own_power(model: DistributedModule, norm_type: float) -> float:
    """The sum of this rank's gradients' powers, of those for which it speaks."""
    counts = model.counts
    if isinstance(model, ShardedModule):
        if not model.state.group.is_holder:
            return 0.0
        if norm_type == 2.0 and all(counts):
            return model.own_squares()
    return sum(
        float(each.double().abs().pow(norm_type).sum()) for each in _spoken_for(model, counts)
    )


def _spoken_for(model: DistributedModule, counts: list[bool]) -> Iterator[torch.Tensor]:
    """This rank's gradients, without what another rank along the model's axes speaks for."""
    if isinstance(model, ShardedModule):
        for run in model.runs:
            for piece in run.pieces if run.has_gradient else ():
                if counts[piece.index]:
                    yield run.gradient.reshape(-1)[piece.place]
        return
    for (_, parameter), counted in zip(model.named, counts, strict=True):
        gradient = slices.local_gradient(parameter)
        if counted and gradient is not None:
            yield gradient
