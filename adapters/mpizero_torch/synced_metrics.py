"""``sync_metric``: metrics of torchmetrics over the ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mpizero import ArgumentError, World
from mpizero_torch.runtime import init
from mpizero_torch.weighed_batches import stripped


def sync_metric(metric: Any, *, world: World | None = None) -> Any:
    """Let a metric of torchmetrics be one over all ranks; returns it.

    By itself torchmetrics asks ``torch.distributed``, and where there is no process group its
    metrics are each rank's own. This makes ``metric.compute()`` a collective call, which gives all
    ranks the metric of all samples (and ``forward`` too, of a metric with dist_sync_on_step=True).
    ``metric``: a Metric, a MetricCollection, or a module that has some in it; before the first
    ``update``. Raises ArgumentError for what has none.
    """
    world = world if world is not None else init()

    def gathered(state: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
        return _gathered(state, world)

    modules = metric.modules() if isinstance(metric, torch.nn.Module) else ()
    found: list[Any] = [each for each in modules if hasattr(each, "dist_sync_fn")]
    if not found:
        raise ArgumentError(
            "sync_metric()", "metric", f"a {type(metric).__name__}", "a metric of torchmetrics"
        )
    for each in found:
        each.dist_sync_fn = gathered
        each.distributed_available_fn = lambda: world.size > 1
    return metric


def _gathered(state: torch.Tensor, world: World) -> list[torch.Tensor]:
    """Each rank's tensor, of any shape, on every rank."""
    with world.telling():
        own = stripped(state).detach().contiguous()
        data = own.cpu().reshape(-1).view(torch.uint8).numpy() if own.numel() else None
    forms = world.gather_objects((own.dtype, tuple(own.shape)))
    every = world.allgather_uneven(np.empty(0, np.uint8) if data is None else data)
    found, start = [], 0
    for dtype, shape in forms:
        end = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        part = torch.from_numpy(every[start:end].copy())
        each = part.view(dtype).reshape(shape) if end > start else torch.empty(shape, dtype=dtype)
        found.append(each.to(own.device))
        start = end
    return found
