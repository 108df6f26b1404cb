"""Whole training steps: ours beside torch's DistributedDataParallel with gloo, in one run.

    mpirun -n 2 python benchmarks/train_step.py [--model gpt2] [--json FILE] [--plot FILE]

The contestants take turns, step by step, on the same batches, so that what disturbs the machine
disturbs them alike; medians over steps, of the slowest rank. "alone" is forward and backward on
each rank without any communication, and AdamW on top: the bound. All train with fused AdamW in
float32. GPT-2 gets one sequence of 64 tokens a rank and step, which keeps a step on one core to a
second or two; on faster cores or with GPUs the communication is a larger share.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import mpizero_torch as mz

VOCABULARY = 50257

ALONE, TORCH = "alone", "torch DDP, gloo"


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

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.tokens(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits = F.linear(self.norm(hidden), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


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


def tokens(vocabulary: int, batch: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, vocabulary, (batch, context + 1), generator=generator)
    return drawn[:, :-1], drawn[:, 1:]


def numbers(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 64, generator=generator), torch.randn(16, 64, generator=generator)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]], int]] = {
    "gpt2": (
        lambda: GPT(12, 12, 768, VOCABULARY, 1024),
        lambda s: tokens(VOCABULARY, 1, 64, s),
        9,
    ),
    "gpt10m": (lambda: GPT(6, 6, 384, 256, 256), lambda s: tokens(256, 2, 128, s), 25),
    "mlp200": (Deep, numbers, 41),
}


class Contestant:
    """A model, its optimizer, and the seconds that its steps took."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name, self.model = name, model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.samples: list[tuple[float, float]] = []
        self.losses: list[float] = []

    def step(self, x: Tensor, y: Tensor, world: Any) -> None:
        world.barrier()
        start = time.perf_counter()
        loss = self.model(x, y)
        loss.backward()
        middle = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.perf_counter()
        self.samples.append((middle - start, end - middle))
        self.losses.append(loss.item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="gpt2")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--without-alone", action="store_true", help="where memory is short")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    world = mz.init()
    torch.set_num_threads(1)
    build, batch, steps = MODELS[options.model]

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return build()

    store = world.broadcast_object(tempfile.mktemp())
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=world.rank, world_size=world.size
    )
    contestants = [] if options.without_alone else [Contestant(ALONE, fresh())]
    contestants += [
        Contestant(TORCH, nn.parallel.DistributedDataParallel(fresh())),
        Contestant("mpizero DDP", mz.DistributedDataParallel(fresh())),
    ]
    for step in range((options.steps or steps) + 2):
        x, y = batch(step * world.size + world.rank)
        for each in contestants:
            each.step(x, y, world)
    report(world, options, contestants)
    world.barrier()
    dist.destroy_process_group()


def report(world: Any, options: argparse.Namespace, contestants: list[Contestant]) -> None:
    """Medians without the first two steps; ratios to torch's DDP."""
    rows = []
    for each in contestants:
        slowest = world.allreduce(np.array(each.samples[2:]), "max")
        both, update = np.median(slowest.sum(1)), np.median(slowest[:, 1])
        rows.append({"name": each.name, "step": both, "optimizer": update, "loss": each.losses[-1]})
    if world.rank:
        return
    step = {row["name"]: row["step"] for row in rows}
    print(f"{options.model}, {world.size} ranks")
    for row in rows:
        line = f"  {row['name']:<16} step {row['step'] * 1e3:8.1f} ms"
        line += f"  (x{step[TORCH] / row['step']:.2f})  loss {row['loss']:.6f}"
        if ALONE in step:
            line += f"  communication {(row['step'] - step[ALONE]) * 1e3:7.1f} ms"
        print(line)
    if options.json:
        found = {
            "machine": machine.describe(), "model": options.model, "ranks": world.size, "rows": rows
        }  # fmt: skip
        options.json.write_text(json.dumps(found, indent=1))
    if options.plot:
        plot(rows, f"{options.model}, {world.size} ranks", options.plot)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """A bar for each contestant: the step, and in it the optimizer's part."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 2.4))
    names = [row["name"] for row in rows]
    axes.barh(names, [row["step"] * 1e3 for row in rows], label="forward, backward, averaging")
    axes.barh(names, [row["optimizer"] * 1e3 for row in rows], label="optimizer")
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds a step", title=title)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
