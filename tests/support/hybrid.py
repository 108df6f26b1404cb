"""A small transformer that can be cut along its layers' width, and into stages of layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

import mpizero_torch as mz

VOCABULARY, CONTEXT, WIDTH, HEADS = 17, 8, 16, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)  # of each head in turn
        self.project = nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = self.query_key_value(self.norm(x)).view(batch, length, -1, 3, WIDTH // HEADS)
        query, key, value = heads.permute(3, 0, 2, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).flatten(2))
        return x + self.feed_forward(x)


class Net(nn.Module):
    """Tied, as language models are."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleDict({str(at): Block() for at in range(layers)})
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            x = self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        return x if self.head is None else self.head(self.norm(x))


def build(dtype: torch.dtype = torch.float64, layers: int = 2) -> Net:
    torch.manual_seed(7)
    return Net(layers).to(dtype)


def cut(model: Net, mesh: mz.Mesh) -> Net:
    """Megatron's way (Shoeybi et al. 2019, arXiv 1909.08053): columns, then rows."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    for block in model.blocks.values():
        plan: dict[str, Any] = {
            "query_key_value": ColwiseParallel(),
            "project": RowwiseParallel(),
            "feed_forward.0": ColwiseParallel(),
            "feed_forward.2": RowwiseParallel(),
        }
        parallelize_module(block, mesh.device_mesh["tp"], plan)
    return model


def stage_of(model: Net, stage: int, stages: int) -> Net:
    """Of the model the layers of one stage, under their names."""
    layers = list(model.blocks)
    for at, name in enumerate(layers):
        if at * stages // len(layers) != stage:
            del model.blocks[name]
    is_last = stage == stages - 1
    if stage > 0 and not is_last:
        model.embed = None
    if not is_last:
        model.norm = model.head = None
    return model


def batch(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (count, CONTEXT + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


@contextmanager
def process_group() -> Iterator[None]:
    """torch.distributed over all ranks, through MPI, and its end."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    import mpizero_torch.distributed  # noqa: F401  registers the backend

    dist.init_process_group("mpizero")
    _clear_sharding_prop_cache()  # it remembers groups of earlier meshes, which are no more
    try:
        yield
    finally:
        mz.init().barrier()
        dist.destroy_process_group()
