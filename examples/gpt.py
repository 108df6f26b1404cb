"""A byte-level GPT, and text for it."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import Dataset

VOCABULARY = 256
MAX_BYTES = 4_000_000


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs of coordinates by the position's angles (rotary embedding, arXiv 2104.09864)."""
    a, b = x.chunk(2, dim=-1)
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((a * cosine - b * sine, a * sine + b * cosine), dim=-1)


class Block(nn.Module):
    """Self-attention, then a feed-forward layer, each added to its input."""

    attention: Callable[..., Tensor]

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.norm = nn.LayerNorm(width)
        # Each head's query, key and value lie together, so that heads can be dealt out to ranks.
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention = F.scaled_dot_product_attention
        self.project = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.query_key_value(self.norm(x)).view(batch, length, -1, 3, self.head_width)
        query, key, value = parts.permute(3, 0, 2, 1, 4)
        query, key = rotate(query, angles), rotate(key, angles)
        seen = self.attention(query, key, value, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).reshape(batch, length, -1))
        out: Tensor = x + self.feed_forward(x)
        return out


class GPT(nn.Module):
    """Decoder-only transformer over bytes; the embedding is also the output layer.

    A stage of a pipeline lacks some of the layers: see ``hybrid.keep_stage``.
    """

    angles: Tensor

    def __init__(self, layers: int, heads: int, width: int, context: int) -> None:
        super().__init__()
        self.context, self.width = context, width
        self.embed: nn.Embedding | None = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleDict({str(at): Block(width, heads) for at in range(layers)})
        self.norm: nn.LayerNorm | None = nn.LayerNorm(width)
        self.output: nn.Linear | None = nn.Linear(width, VOCABULARY, bias=False)
        self.output.weight = self.embed.weight
        self.first_position = 0
        pairs = width // heads // 2
        angles = torch.arange(context)[:, None] / 1000 ** (torch.arange(pairs) / pairs)
        self.register_buffer("angles", angles, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Each block adds to its input twice: smaller steps for more blocks.
                into_sum = name.endswith(("project.weight", "feed_forward.3.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers if into_sum else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """From bytes to guesses; a stage of a pipeline takes and gives what is between layers."""
        x = tokens
        if self.embed is not None and not tokens.is_floating_point():
            x = self.embed(tokens)
        angles = self.angles[self.first_position :][: tokens.shape[1]]
        for block in self.blocks.values():
            x = block(x, angles)
        if self.norm is None or self.output is None:
            return x
        guesses: Tensor = self.output(self.norm(x))
        return guesses


class Windows(Dataset[Tensor]):
    """Stretches of ``context + 1`` bytes, each beginning where the one before ends."""

    def __init__(self, text: bytes, context: int) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.context = context

    def __len__(self) -> int:
        return max(0, (len(self.text) - 1) // self.context)

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.context
        return self.text[start : start + self.context + 1].long()


def read_text(files: list[Path] | None) -> bytes:
    """The files' bytes; by default, the standard library's top-level modules up to MAX_BYTES."""
    if files:
        return b"".join(file.read_bytes() for file in files)
    library = Path(sysconfig.get_path("stdlib"))
    text = b"".join(file.read_bytes() for file in sorted(library.glob("*.py")))
    if not text:
        raise SystemExit(f"There are no sources in {library}: name a file with --text.")
    return text[:MAX_BYTES]


def split(text: bytes, context: int) -> tuple[Windows, Windows]:
    """The text for training, and its last twentieth."""
    cut = len(text) - len(text) // 20
    training, held_out = Windows(text[:cut], context), Windows(text[cut:], context)
    if not len(training) or not len(held_out):
        raise SystemExit(f"{len(text)} bytes are too little text for windows of {context} bytes.")
    return training, held_out
