"""The models that the training benchmarks train, and what they are fed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

GPT2_VOCABULARY, GPT2_CONTEXT = 50257, 1024


class Block(nn.Module):
    """A GPT-2 block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.attend(self.norm_1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).reshape(b, t, c))
        out: Tensor = x + self.narrow(F.gelu(self.widen(self.norm_2(x))))
        return out


class GPT(nn.Module):
    """GPT-2 with tied embeddings; returns the loss."""

    def __init__(self, layers: int, heads: int, width: int, vocabulary: int, context: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.apply(_as_gpt2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.tokens(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits = F.linear(self.norm(hidden), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def _as_gpt2(module: nn.Module) -> None:
    """GPT-2's initial weights. With torch's the loss begins at 500, and some steps later gradients
    are denormal numbers, which cores multiply slowly."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class Deep(nn.Module):
    """200 narrow layers: about 500 small tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(200))
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(50))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for at, layer in enumerate(self.layers):
            x = x + torch.tanh(layer(x)) * 0.1
            if at % 4 == 3:
                x = self.norms[at // 4](x)
        return F.mse_loss(x, y)


def blocks(model: nn.Module) -> list[list[nn.Module]]:
    """What a user would shard as one: a block of GPT-2, or four layers and their norm of Deep."""
    if isinstance(model, Deep):
        return [[*model.layers[4 * at : 4 * at + 4], norm] for at, norm in enumerate(model.norms)]
    assert isinstance(model, GPT)
    return [[block] for block in model.blocks]


@dataclass(frozen=True)
class Task:
    """A model, the batch that a seed stands for, and how many steps make a steady median."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    steps: int

    def model(self) -> nn.Module:
        """A new model, each time with the same weights."""
        torch.manual_seed(0)
        return self.build()


def gpt2(context: int) -> Task:
    """GPT-2 124M on one sequence of ``context`` tokens."""
    return Task(
        lambda: GPT(12, 12, 768, GPT2_VOCABULARY, GPT2_CONTEXT),
        lambda seed: tokens(GPT2_VOCABULARY, 1, context, seed),
        9,
    )


def tokens(vocabulary: int, batch: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, vocabulary, (batch, context + 1), generator=generator)
    return drawn[:, :-1], drawn[:, 1:]


def numbers(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 64, generator=generator), torch.randn(16, 64, generator=generator)


# By name; each takes the tokens a sequence, which the small ones have fixed.
TASKS: dict[str, Callable[[int], Task]] = {
    "gpt2": gpt2,
    "gpt10m": lambda _: Task(
        lambda: GPT(6, 6, 384, 256, 256), lambda seed: tokens(256, 2, 128, seed), 25
    ),
    "mlp200": lambda _: Task(Deep, numbers, 41),
}
