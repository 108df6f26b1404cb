"""What gradients travel as: as they are, or rounded to 16 bits."""

from __future__ import annotations

from typing import Any

import torch


class Compressor:
    """Makes a tensor smaller for the way, and what has come out of the reduction a tensor again.

    Derive from it for a compression of one's own. Where one sets ``wire_dtype``, all that it does
    is to convert to this dtype and back.
    """

    wire_dtype: torch.dtype | None = None

    @classmethod
    def compress(cls, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The smaller tensor, and what ``decompress`` needs to know."""
        return tensor.to(cls.travels_as(tensor.dtype)), tensor.dtype

    @classmethod
    def decompress(cls, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """The tensor in its former dtype."""
        return tensor.to(ctx)

    @classmethod
    def travels_as(cls, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which tensors of ``dtype`` travel: floating ones in a smaller one."""
        wire = cls.wire_dtype
        if wire is None or not dtype.is_floating_point or dtype.itemsize <= wire.itemsize:
            return dtype
        return wire


class NoneCompressor(Compressor):
    """As it is."""


class FP16Compressor(Compressor):
    """Floating-point tensors as float16, whose sums are formed in float32 and rounded once."""

    wire_dtype = torch.float16


class BF16Compressor(Compressor):
    """Floating-point tensors as bfloat16, whose sums are formed in float32 and rounded once."""

    wire_dtype = torch.bfloat16


class Compression:
    """The compressions that there are."""

    none = NoneCompressor
    fp16 = FP16Compressor
    bf16 = BF16Compressor
