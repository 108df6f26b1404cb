"""Attention over sequences that the ranks share out is that of one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import mpizero_torch as mz

ranks = pytest.mark.parallel([1, 2, 4])
BATCH, HEADS, LENGTH, SIZE = 2, 4, 24, 6


def inputs(seed: int, heads: int = HEADS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, heads, LENGTH, SIZE, generator=generator).to(dtype)


@ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"masked": True}], ids=str)
def test_results_and_gradients_are_those_of_one_process(
    options: dict[str, bool], dtype: torch.dtype
) -> None:
    world = mz.init()
    own = mz.stretch(LENGTH, world)
    given: dict[str, object] = dict(options)
    if given.pop("masked", False):
        given["attn_mask"] = inputs(9)[0, 0, :, :1].to(dtype) * torch.ones(LENGTH, dtype=dtype)
    whole = [inputs(seed, dtype=dtype).requires_grad_() for seed in range(3)]
    parts = [each.detach()[:, :, own].clone().requires_grad_() for each in whole]
    expected = functional.scaled_dot_product_attention(*whole, **given)
    found = mz.SequenceParallelAttention(world)(*parts, **given)
    # bfloat16 kernels may work through heads in other blocks.
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(found, expected[:, :, own], **close)
    toward = inputs(5, dtype=dtype)
    expected.backward(toward)
    found.backward(toward[:, :, own])
    for part, all_ in zip(parts, whole, strict=True):
        assert part.grad is not None and all_.grad is not None
        torch.testing.assert_close(part.grad, all_.grad[:, :, own], **close)


@ranks
def test_no_rank_attends_with_more_than_its_heads() -> None:
    world = mz.init()
    seen = []

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        seen.extend([query.shape, key.shape])
        return functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    own = mz.stretch(LENGTH, world)
    layer = mz.SequenceParallelAttention(world, attention)
    query, key, value = inputs(1, 8), inputs(2, 4), inputs(3, 4)  # grouped queries
    found = layer(query[:, :, own], key[:, :, own], value[:, :, own])
    assert seen == [
        (BATCH, 8 // world.size, LENGTH, SIZE),
        (BATCH, 4 // world.size, LENGTH, SIZE),
    ]
    whole = functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(found, whole[:, :, own], rtol=1e-5, atol=1e-6)
    assert repr(layer) == f"SequenceParallelAttention(over {world.size} ranks)"


class Layer(nn.Module):
    """Self-attention over ``world``'s sequences."""

    def __init__(self, world: mz.World) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.query_key_value, self.project = nn.Linear(12, 36), nn.Linear(12, 12)
        self.attention = mz.SequenceParallelAttention(world)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.query_key_value(x).unflatten(-1, (4, 3, 3)).permute(3, 0, 2, 1, 4)
        seen = self.attention(*heads, is_causal=True)
        return self.project(seen.transpose(1, 2).flatten(2))


@pytest.mark.parallel([1, 2, 4])
@pytest.mark.parametrize("stage", [0, 2])
def test_a_model_trains_as_in_one_process(stage: int) -> None:
    """Gradients are averaged over all who see other tokens: the data and the sequence axis."""
    world = mz.init()
    mesh = mz.mesh(sp=min(2, world.size))
    alone = world.split(world.rank)
    assert alone is not None
    reference, model = Layer(alone), Layer(mesh.sp)
    its = torch.optim.SGD(reference.parameters(), lr=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer = mz.zero(model, optimizer, stage, world=mesh.replicas)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(2 * mesh.dp.size, LENGTH, 12, generator=generator)
        y = torch.randn(2 * mesh.dp.size, LENGTH, 12, generator=generator)
        mine = slice(2 * mesh.dp.rank, 2 * mesh.dp.rank + 2), mz.stretch(LENGTH, mesh.sp)
        expected = functional.mse_loss(reference(x), y)
        found = functional.mse_loss(model(x[mine]), y[mine])
        assert mz.mean(found, world=mesh.replicas) == pytest.approx(expected.item(), rel=1e-5)
        for optim, each in ((its, expected), (optimizer, found)):
            optim.zero_grad()
            each.backward()
            optim.step()
    if mesh.sp.size > 1 and mesh.dp.size > 1:
        with pytest.raises(mz.ArgumentError, match=r"mesh\.replicas"):
            mz.DistributedDataParallel(Layer(mesh.sp), world=mesh.dp)
    mesh.close()
    alone.close()


@pytest.mark.parallel([2])
def test_what_cannot_be_shared_out() -> None:
    world = mz.init()
    layer = mz.SequenceParallelAttention(world)
    with pytest.raises(mz.ArgumentError, match="'key' is of 3 heads; allowed: a multiple of the 2"):
        layer(inputs(0), inputs(0, 3), inputs(0, 3))
    with pytest.raises(mz.ArgumentError, match="'query' is of shape"):
        layer(inputs(0)[0], inputs(0), inputs(0))
    with pytest.raises(mz.ArgumentError, match="'length' is 7"):
        mz.stretch(7, world)
    uneven = inputs(0)[:, :, : 3 + world.rank]
    with pytest.raises(mz.MismatchError, match="all_to_all"):
        layer(uneven, uneven, uneven)
