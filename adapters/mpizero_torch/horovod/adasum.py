"""Adasum: a sum of gradients that is one where they are orthogonal, and a mean where they agree.

Maleki et al. 2020, "Scaling Distributed Training with Adaptive Summation" (arXiv 2006.02924). Two
gradients become

    Adasum(a, b) = (1 - a.b / (2 |a|^2)) a  +  (1 - a.b / (2 |b|^2)) b

and 2^k of them by pairs of pairs: ranks 0 and 1, 2 and 3; then (0 1) and (2 3). It is done as in
the paper's algorithm 1, by recursive vector halving and distance doubling: at each distance a rank
exchanges half of what it has with its partner, keeps the other half, and the products, of which
each rank has a part, are summed over the ranks that share a pair; at the end the halves come back
the same way. The ranks beyond a power of two are each added to one of the first beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from mpizero import ArgumentError, World

Span = tuple[int, int]


@torch.no_grad()
def adasum_(world: World, tensors: Sequence[torch.Tensor]) -> None:
    """Replace each tensor by the Adasum over the ranks of what stands in its place. Collective.

    Floating-point tensors; each is one gradient (of one layer) by itself. 16-bit ones are added in
    float32 and rounded once. Products are formed in float64.
    """
    for tensor in tensors:
        if not tensor.dtype.is_floating_point:
            raise ArgumentError(
                "hvd.allreduce()", "op", f"Adasum for a tensor of {tensor.dtype}",
                "Adasum of floating-point tensors",
            )  # fmt: skip
    if world.size == 1:
        return
    for wide in (torch.float32, torch.float64):
        own = [each for each in tensors if (each.dtype == torch.float64) == (wide is torch.float64)]
        if own:
            flat = torch.cat([each.detach().reshape(-1).to(wide) for each in own])
            ends = [0, *accumulate(each.numel() for each in own)]
            _reduce(world, flat, list(pairwise(ends)))
            for each, (first, last) in zip(own, pairwise(ends), strict=True):
                each.detach().copy_(flat[first:last].view_as(each))


def _reduce(world: World, flat: torch.Tensor, layers: Sequence[Span]) -> None:
    """The Adasum of ``flat``, in place; ``layers`` are the gradients in it."""
    power = 1 << (world.size.bit_length() - 1)
    extra = world.size - power
    rank = world.rank
    whole = (0, flat.numel())
    if rank >= power:
        world.send(flat, rank - power, _EXTRA)
    elif rank < extra:
        other = torch.empty_like(flat)
        world.recv(other, rank + power, _EXTRA)
        _combine(flat, other, whole, layers, _products(flat, other, whole, layers))
    _halve(world, flat, layers, power)
    if rank >= power:
        world.recv(flat, rank - power, _EXTRA)
    elif rank < extra:
        world.send(flat, rank + power, _EXTRA)


def _halve(world: World, flat: torch.Tensor, layers: Sequence[Span], power: int) -> None:
    span, path, distance, rank = (0, flat.numel()), [], 1, world.rank
    while distance < power:
        # Everybody takes part in the sum of products, the ranks beyond the power of two as well.
        products = flat.new_zeros((len(layers), 3), dtype=torch.float64)
        if rank < power:
            path.append((rank ^ distance, span))
            keep, give = _halves(span, upper=bool(rank & distance))
            other = flat.new_empty(keep[1] - keep[0])
            _exchange(world, flat[give[0] : give[1]], other, rank ^ distance)
            mine = flat[keep[0] : keep[1]]
            # The lower rank's comes first, for all ranks of the group whose products are summed.
            pair = (other, mine) if rank & distance else (mine, other)
            products = _products(*pair, keep, layers)
            span = keep
        every = torch.as_tensor(world.allgather(products)).view(world.size, len(layers), 3)
        if rank < power:
            group = rank // (2 * distance) * 2 * distance
            products = every[group : group + 2 * distance].sum(0)
            if rank & distance:  # as this rank sees it, its own comes first
                products = products[:, [0, 2, 1]]
            _combine(flat[span[0] : span[1]], other, span, layers, products)
        distance *= 2
    for partner, before in reversed(path):
        kept, given = _halves(before, upper=partner < rank)
        _exchange(world, flat[kept[0] : kept[1]], flat[given[0] : given[1]], partner)


def _halves(span: Span, upper: bool) -> tuple[Span, Span]:
    """What a rank keeps of a span, and what its partner does; the ``upper`` rank the upper half."""
    middle = (span[0] + span[1]) // 2
    low, high = (span[0], middle), (middle, span[1])
    return (high, low) if upper else (low, high)


def _exchange(world: World, give: torch.Tensor, take: torch.Tensor, partner: int) -> None:
    coming = world.recv(take, partner, _HALVES, asynchronous=True)
    world.send(give, partner, _HALVES)
    coming.wait()


def _products(a: torch.Tensor, b: torch.Tensor, span: Span, layers: Sequence[Span]) -> torch.Tensor:
    """a.b, |a|^2 and |b|^2 of each layer, as far as it lies in the span that a and b are of."""
    products = a.new_zeros((len(layers), 3), dtype=torch.float64)
    for at, part in _parts(span, layers):
        left, right = a[part].double(), b[part].double()
        products[at] = torch.stack([left @ right, left @ left, right @ right])
    return products


def _combine(
    mine: torch.Tensor,
    other: torch.Tensor,
    span: Span,
    layers: Sequence[Span],
    products: torch.Tensor,
) -> None:
    """The formula, in place; a gradient of zeros adds nothing."""
    for at, part in _parts(span, layers):
        dot, own, others = products[at].tolist()
        of_mine = 1 - dot / (2 * own) if own else 1.0
        of_other = 1 - dot / (2 * others) if others else 1.0
        mine[part].mul_(of_mine).add_(other[part], alpha=of_other)


def _parts(span: Span, layers: Sequence[Span]) -> list[tuple[int, slice]]:
    """Which layers lie in a span, and where in it."""
    found = []
    for at, (first, last) in enumerate(layers):
        low, high = max(first, span[0]), min(last, span[1])
        if low < high:
            found.append((at, slice(low - span[0], high - span[0])))
    return found


_HALVES, _EXTRA = 0, 1  # tags
