"""Train a byte-level GPT on real text, data-parallel over all ranks.

    mpirun -n 2 python examples/train_gpt.py --plot loss.png
    mpirun -n 2 python examples/train_gpt.py --strategy zero2 --precision bf16
    mpirun -n 2 python examples/train_gpt.py --checkpoint-dir run --resume

The text is the Python standard library's own source, or what ``--text`` names; its last twentieth
is held out. With the default options and two ranks of one core each, the held-out loss ends
below TARGET nats a byte (guessing gives ln 256 = 5.55) after two to three minutes.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import Dataset

import mpizero_torch as mz
from common import Reporter, checkpoint_options, option_parser, positive

TARGET = 1.65
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
MAX_BYTES = 4_000_000


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs of coordinates by the position's angles (rotary embedding, arXiv 2104.09864)."""
    a, b = x.chunk(2, dim=-1)
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((a * cosine - b * sine, a * sine + b * cosine), dim=-1)


class Block(nn.Module):
    """Self-attention, then a feed-forward layer, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.query_key_value(self.norm(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        query, key = rotate(query, angles), rotate(key, angles)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.feed_forward(x)
        return out


class GPT(nn.Module):
    """Decoder-only transformer over bytes; the embedding is also the output layer."""

    angles: Tensor

    def __init__(self, layers: int, heads: int, width: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, 256, bias=False)
        self.output.weight = self.embed.weight
        pairs = width // heads // 2
        angles = torch.arange(context)[:, None] / 1000 ** (torch.arange(pairs) / pairs)
        self.register_buffer("angles", angles, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Each block adds to its input twice: smaller steps for more blocks.
                into_sum = name.endswith(("project.weight", "feed_forward.3.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers if into_sum else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.angles[: tokens.shape[1]])
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


def parse() -> argparse.Namespace:
    parser = option_parser(__doc__, steps=600)
    parser.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="train on these")
    for name, default, what in (
        ("--layers", 4, "blocks"),
        ("--heads", 4, "attention heads"),
        ("--width", 128, "size of a token's vector"),
        ("--context", 128, "bytes that the model sees"),
        ("--batch-size", 8, "windows per rank and step"),
    ):
        parser.add_argument(name, type=positive, default=default, help=what)
    parser.add_argument(
        "--strategy", choices=STRATEGIES, default="ddp", help="replicas, or a stage of ZeRO"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    checkpoint_options(parser)
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    options = parser.parse_args()
    if options.resume and not options.checkpoint_dir:
        parser.error("--resume needs --checkpoint-dir: from where?")
    if options.width % (2 * options.heads):
        parser.error(f"--width {options.width} is no multiple of twice --heads {options.heads}")
    return options


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


def endless(loader: Any) -> Iterator[Tensor]:
    """Epoch after epoch."""
    while True:
        yield from loader


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """How badly each byte is guessed from those before it, in nats."""
    guesses = model(windows[:, :-1])
    return F.cross_entropy(guesses.flatten(0, 1), windows[:, 1:].flatten())


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm up over the first tenth, then go down along a cosine, to a tenth."""
    warm_up = max(1, steps // 10)

    def factor(step: int) -> float:
        progress = (step - warm_up) / max(1, steps - warm_up)
        return min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * max(0.0, progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def distribute(gpt: GPT, options: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and its optimizer, spread over the ranks as the options say."""
    optimizer = torch.optim.AdamW(
        gpt.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    if options.strategy == "ddp":
        return mz.DistributedDataParallel(gpt), optimizer
    stage = int(options.strategy.removeprefix("zero"))
    return mz.zero(gpt, optimizer, stage=stage, precision=options.precision)


def checkpoints(options: argparse.Namespace, **run: Any) -> mz.CheckpointManager | None:
    """What saves the run now and then, and before the scheduler ends the job."""
    if not options.checkpoint_dir:
        return None
    return mz.CheckpointManager(
        options.checkpoint_dir,
        every_steps=options.checkpoint_every,
        asynchronous=True,
        guard=mz.PreemptionGuard(),
        **run,
    )


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Windows,
    options: argparse.Namespace,
    world: mz.World,
    report: Reporter,
) -> None:
    """The loop that a single process would run, but for the lines with ``mz``."""
    device = torch.device(world.device.name)
    rate = schedule(optimizer, options.steps)
    loader = mz.shard(data, batch_size=options.batch_size, seed=options.seed)
    manager = checkpoints(options, model=model, optimizer=optimizer, scheduler=rate, loader=loader)
    first = manager.restore_latest() if manager and options.resume else None
    if first is not None:
        report.say(f"going on from step {first} in {options.checkpoint_dir}")
    report.begin(first or 0)
    # Replicas keep float32 parameters and compute in 16 bits; under ZeRO the model itself is cast.
    autocast = options.strategy == "ddp" and options.precision == "bf16"
    for step, windows in zip(range(first or 0, options.steps), endless(loader), strict=False):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = loss_of(model, windows.to(device))
        loss.backward()
        mz.clip_grad_norm_(model, 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        report.step(mz.mean(loss), windows[:, 1:].numel() * world.size)
        if manager:
            manager.step(step + 1)
    if manager:
        manager.save(options.steps)
        manager.wait()


@torch.no_grad()
def evaluate(model: nn.Module, data: Windows, batch_size: int, world: mz.World) -> float:
    """The loss over all windows, of which every rank takes its part."""
    own = [data[index] for index in range(world.rank, len(data), world.size)]
    total = 0.0
    for start in range(0, len(own), batch_size):
        windows = torch.stack(own[start : start + batch_size]).to(world.device.name)
        total += loss_of(model, windows).item() * len(windows)
    sums = mz.sum({"loss": total, "windows": len(own)})
    return float(sums["loss"] / sums["windows"])


@torch.no_grad()
def generate(model: nn.Module, length: int, prompt: bytes, count: int, seed: int) -> str:
    """Let the model go on from ``prompt`` for ``count`` bytes; it sees the last ``length``.

    On all ranks alike: a model may need them all.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(count):
        context = torch.tensor([tokens[-length:]], device=next(model.parameters()).device)
        chances = F.softmax(model(context)[0, -1].cpu() / 0.8, dim=0)
        tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
    text = bytes(tokens).decode(errors="replace")
    # Not what would steer a terminal.
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def main() -> None:
    options = parse()
    world = mz.init()
    # Rank 0 reads: nodes may have different Pythons, and thus different texts.
    text = world.broadcast_object(read_text(options.text) if world.rank == 0 else None)
    training, held_out = split(text, options.context)
    torch.manual_seed(options.seed)
    gpt = GPT(options.layers, options.heads, options.width, options.context)
    model, optimizer = distribute(gpt.to(world.device.name), options)

    with Reporter(options, world) as report:
        count = sum(parameter.numel() for parameter in gpt.parameters())
        report.say(f"{count:,} parameters, {len(text):,} bytes of text, {world.size} ranks")
        train(model, optimizer, training, options, world, report)
    loss = evaluate(model, held_out, options.batch_size, world)
    memory = mz.memory_report(model, optimizer)
    sample = generate(model, gpt.context, b"def ", 300, options.seed)
    verdict = "reached" if loss < TARGET else "not reached"
    report.say(f"\n{sample}\n\n{memory}\n")
    report.say(
        f"held-out loss {loss:.4f} nats a byte; "
        f"the default options' target, below {TARGET}, is {verdict}"
    )
    report.finish(held_out_loss=loss, target=TARGET, reached=loss < TARGET)


if __name__ == "__main__":
    main()
