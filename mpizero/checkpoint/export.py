"""One file of a checkpoint's tensors, for people without this library."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from mpizero import outputs
from mpizero.checkpoint import files
from mpizero.checkpoint.checksums import LONGEST
from mpizero.checkpoint.format import TensorSpec, lay_out
from mpizero.checkpoint.read import Checkpoint

_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def export_safetensors(
    checkpoint: Checkpoint,
    part: str,
    out: Path,
    dtype: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a part as the single safetensors file ``out``, a few MiB at a time. One process.

    ``dtype``: of floating-point tensors; as saved, by default. Tied tensors are in it once, and
    under their other names in the header, as in the checkpoint. ``out`` appears when it is whole.
    Raises FileExistsError if it is there already, and what reading raises.
    """
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists already")
    specs = checkpoint.specs(part)
    converted = [
        TensorSpec(name, _converted(spec.dtype, dtype), spec.shape) for name, spec in specs.items()
    ]
    metadata = {k: v for k, v in checkpoint.metadata(part).items() if k != "format"}
    (layout,) = lay_out(part, converted, sum(spec.nbytes for spec in converted) + 1, metadata)
    partial = out.with_name(f"{out.name}.partial-{secrets.token_hex(8)}")
    files.create(partial, layout.nbytes)
    try:
        handle = files.open_to_write(partial)
        try:
            files.write_at(handle, layout.header, 0)
            for spec in converted:
                width = LONGEST // specs[spec.name].dtype.itemsize
                for start in range(0, spec.count, width):
                    elements = slice(start, min(start + width, spec.count))
                    values = checkpoint.read(part, spec.name, elements).astype(spec.dtype)
                    place = layout.starts[spec.name] + start * spec.dtype.itemsize
                    files.write_at(handle, values.view(np.uint8), place)
                    if progress is not None:
                        progress((elements.stop - start) * specs[spec.name].dtype.itemsize)
            files.sync(handle)
        finally:
            files.close(handle)
        outputs.put(partial, out)
        files.sync_folder(out.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _converted(own: np.dtype[np.generic], wanted: str | None) -> np.dtype[np.generic]:
    floating = own.kind == "f" or own == _DTYPES["bfloat16"]
    return _DTYPES[wanted] if wanted is not None and floating else own
