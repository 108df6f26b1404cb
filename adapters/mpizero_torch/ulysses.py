"""Sequence parallelism: each rank holds a stretch of every sequence, and attends with some heads.

All that a transformer does but attention looks at one position at a time, so ranks can share out
the positions. For attention an all-to-all exchanges stretches of all heads for some heads of the
whole sequence, and back. (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv 2309.14509: the traffic of a
rank is 4 activations' size over the number of ranks, and shrinks with them.) Nothing on a rank
but attention's own inputs grows with the length of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mpizero import ArgumentError, World

_NAME = "SequenceParallelAttention()"


class SequenceParallelAttention(nn.Module):
    """Attention over sequences of which each rank of ``world`` holds an equal stretch, in order.

    ``attention(query, key, value, **options)``: any that treats each head by itself, on tensors of
    shape (batch, heads, length, size of a head); torch's by default. The module is called like it,
    with this rank's stretches, and returns this rank's: what one process would compute of the whole
    sequences, gradients included. ``is_causal`` and a mask speak of the whole sequence (a mask
    with one entry for each head is cut by the caller). Collective, forward and backward.

    Raises ArgumentError if the heads (of query, or of fewer keys and values) cannot be dealt out
    evenly, MismatchError if the ranks' stretches differ in shape.
    """

    def __init__(self, world: World, attention: Callable[..., torch.Tensor] | None = None) -> None:
        super().__init__()
        self.world = world
        self.attention = attention or functional.scaled_dot_product_attention

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """This rank's stretch of the result."""
        if self.world.size == 1:
            return self.attention(query, key, value, **options)
        with self.world.telling():
            for name, tensor in (("query", query), ("key", key), ("value", value)):
                self._check(name, tensor)
        exchange: Any = _Exchange.apply
        whole = exchange(self.world, True, query, key, value)
        seen = self.attention(*whole, **options)
        own: torch.Tensor = exchange(self.world, False, seen)[0]
        return own

    def extra_repr(self) -> str:
        return f"over {self.world.size} ranks"

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.dim() != 4:
            raise ArgumentError(
                _NAME, name, f"of shape {tuple(tensor.shape)}", "(batch, heads, length, size)"
            )
        if tensor.shape[1] % self.world.size:
            raise ArgumentError(
                _NAME, name, f"of {tensor.shape[1]} heads",
                f"a multiple of the {self.world.size} ranks that share out the sequence",
                "Repeat heads of key and value that several queries share, or use fewer ranks.",
            )  # fmt: skip


def stretch(length: int, world: World) -> slice:
    """The positions of a sequence that are this rank's: ``tokens[:, mz.stretch(n, mesh.sp)]``.

    Raises ArgumentError for a length that is no multiple of the ranks.
    """
    if length % world.size:
        raise ArgumentError(
            "stretch()", "length", str(length), f"a multiple of the {world.size} ranks",
            "Pad the sequences.",
        )  # fmt: skip
    own = length // world.size
    return slice(world.rank * own, (world.rank + 1) * own)


class _Exchange(torch.autograd.Function):
    """From stretches of all heads to all of some heads (``to_heads``), or back; one message."""

    @staticmethod
    def forward(
        ctx: Any, world: World, to_heads: bool, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.world, ctx.to_heads = world, to_heads
        return _exchange(world, to_heads, tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        return None, None, *_exchange(ctx.world, not ctx.to_heads, gradients)


def _exchange(
    world: World, to_heads: bool, tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    ranks = world.size
    cut = [_cut(each, ranks, 1 if to_heads else 2) for each in tensors]
    message = torch.cat([each.reshape(ranks, -1) for each in cut], dim=1)
    arrived = torch.empty_like(message)
    world.all_to_all(message, out=arrived)
    parts = arrived.split([each[0].numel() for each in cut], dim=1)
    return tuple(
        _join(part.view(each.shape), 2 if to_heads else 1)
        for part, each in zip(parts, cut, strict=True)
    )


def _cut(tensor: torch.Tensor, ranks: int, dim: int) -> torch.Tensor:
    """For each rank its part along ``dim``; shape (ranks, ...)."""
    parts: torch.Tensor = tensor.unflatten(dim, (ranks, -1))
    return parts.movedim(dim, 0)


def _join(parts: torch.Tensor, dim: int) -> torch.Tensor:
    """Each rank's part behind the other along ``dim``."""
    return parts.movedim(0, dim).flatten(dim, dim + 1)
