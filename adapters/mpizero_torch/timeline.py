"""``trace``: the core's timeline, with the steps of torch's own optimizers on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from mpizero import World, diagnostics
from mpizero_torch.runtime import init
from mpizero_torch.sharding import ShardedOptimizer


@contextmanager
def trace(folder: str | Path, *, world: World | None = None) -> Iterator[None]:
    """Write a timeline of each rank into ``folder`` meanwhile, for Perfetto or chrome://tracing.

    Forward, backward, the optimizer's step, checkpoints, and every call of mpizero's with its size,
    its line, and the part of it that waited for other ranks; the clocks of nodes are aligned.
    ``mpizero trace summary FOLDER`` says what is in it; ``MPIZERO_TRACE=folder`` traces a job.
    Collective. Raises ArgumentError for a folder that cannot be written, or inside another trace.
    """
    with diagnostics.trace(world if world is not None else init(), folder), _optimizers_steps():
        yield


@contextmanager
def _optimizers_steps() -> Iterator[None]:
    """Spans for steps of plain optimizers; sharded ones, which have one inside, make their own."""
    open_spans: dict[int, Any] = {}

    def begin(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        is_inside = diagnostics.recorder().record.phase == "optimizer"
        if not is_inside and not isinstance(optimizer, ShardedOptimizer):
            open_spans[id(optimizer)] = diagnostics.recorder().begin_span("optimizer")

    def end(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        opened = open_spans.pop(id(optimizer), None)
        if opened is not None:
            diagnostics.recorder().end_span(opened)

    handles = [register_optimizer_step_pre_hook(begin), register_optimizer_step_post_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_whole_job = ExitStack()
if os.environ.get("MPIZERO_TRACE"):
    _whole_job.enter_context(_optimizers_steps())
