"""Small models of the kinds that users train, and batches for them.

Each kind has ``build()``, which gives the same model on every call, and ``batch(n, seed)``,
inputs and targets for n samples. ``loss(model, x, y)`` is a mean over samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

VOCABULARY, CONTEXT, CLASSES = 17, 8, 5


class Transformer(nn.Module):
    """Two encoder layers over tokens, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.position = nn.Parameter(torch.randn(CONTEXT, 16) * 0.1)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Tied(nn.Module):
    """An output layer that is the embedding's transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens))))


class Recurrent(nn.Module):
    """An LSTM that reads tokens and classifies the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.lstm = nn.LSTM(8, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.embed(tokens))
        return self.head(states)


class Branched(nn.Module):
    """A branch that only samples with a positive first feature take, and one that none takes."""

    def __init__(self) -> None:
        super().__init__()
        self.common = nn.Linear(6, 12)
        self.branch = nn.Linear(12, 12)
        self.never = nn.Linear(12, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.common(x))
        takes = x[:, 0] > 0
        if takes.any():
            hidden = hidden + torch.zeros_like(hidden).index_put(
                (takes.nonzero()[:, 0],), self.branch(hidden[takes])
            )
        return self.head(hidden)


def convnet() -> nn.Module:
    """Convolutions with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4 * 4, CLASSES),
    )


def _tokens(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (count, CONTEXT + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def _images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 2, 6, 6, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, CLASSES, (count,), generator=generator)


def _features(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    # The first half takes the branch: with two ranks or more, the last one does not.
    x[:, 0] = x[:, 0].abs() * torch.where(torch.arange(count) < count / 2, 1.0, -1.0)
    return x, torch.randint(0, CLASSES, (count,), generator=generator)


@dataclass(frozen=True)
class Kind:
    """A kind of model: see the module's docstring."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(7)
        return self.make().to(dtype)

    def __str__(self) -> str:
        return self.name


KINDS = (
    Kind("transformer", Transformer, _tokens),
    Kind("convnet", convnet, _images),
    Kind("lstm", Recurrent, _tokens),
    Kind("tied", Tied, _tokens),
    Kind("branched", Branched, _features),
)


def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over samples (and tokens)."""
    dtype = next(model.parameters()).dtype
    output: Any = model(x.to(dtype) if x.is_floating_point() else x)
    return functional.cross_entropy(output.flatten(0, -2), y.flatten())
