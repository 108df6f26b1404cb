"""A moving average in a checkpoint: under the parameters' names, written and read in parts."""

from __future__ import annotations

from typing import Any

import torch

from mpizero import ArgumentError
from mpizero.checkpoint import Part, Piece, Readable, TensorSpec
from mpizero_torch import tensors
from mpizero_torch.ema import EMA

PART = "ema"


def average_part(ema: EMA) -> tuple[Part, dict[str, Any]]:
    """What this rank writes of an average, and what of it is no tensor."""
    if not isinstance(ema, EMA):
        raise ArgumentError("save()", "ema", f"a {type(ema).__name__}", "an mz.EMA")
    specs = [
        TensorSpec(name, tensors.numpy_dtype(ema.dtype(name)), shape)
        for name, shape in ema.shapes.items()
    ]
    pieces = [
        Piece(each.name, each.start, tensors.as_array(each.average))
        for each in ema.kept()
        if each.average.numel() and (ema.world.rank == 0 or ema.is_shared)
    ]
    return Part(PART, specs, pieces), {"decay": ema.decay, "updates": ema.updates}


def load_average(ema: EMA, checkpoint: Readable) -> None:
    """Let each rank read its part. Talks to nobody."""
    specs = checkpoint.specs(PART)

    def read(name: str, elements: slice) -> torch.Tensor:
        return tensors.as_tensor(checkpoint.borrow(PART, name, elements))

    ema.take({name: spec.shape for name, spec in specs.items()}, read)
    found = checkpoint.values[PART]
    ema.decay, ema.updates = float(found["decay"]), int(found["updates"])
