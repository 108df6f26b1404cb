"""Train a byte-level GPT on real text, over all ranks.

    mpirun -n 2 python examples/train_gpt.py --plot loss.png
    mpirun -n 2 python examples/train_gpt.py --strategy zero2 --precision bf16
    mpirun -n 2 python examples/train_gpt.py --checkpoint-dir run --resume
    mpirun -n 4 python examples/train_gpt.py --tp 2 --strategy zero2
    mpirun -n 4 python examples/train_gpt.py --pp 2 --strategy zero1
    mpirun -n 2 python examples/train_gpt.py --sp 2 --context 512

The text is the Python standard library's own source, or what ``--text`` names; its last twentieth
is held out. With the default options and two ranks of one core each, the held-out loss ends
below TARGET nats a byte (guessing gives ln 256 = 5.55) after two to three minutes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import hybrid
import mpizero_torch as mz
from common import Reporter, checkpoint_options, option_parser, positive
from gpt import GPT, Windows, read_text, split

TARGET = 1.65
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")


def parse() -> argparse.Namespace:
    parser = option_parser(__doc__, steps=600)
    parser.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="train on these")
    for name, default, what in (
        ("--layers", 4, "blocks"),
        ("--heads", 4, "attention heads"),
        ("--width", 128, "size of a token's vector"),
        ("--context", 128, "bytes that the model sees"),
        ("--batch-size", 8, "windows per replica and step"),
        ("--sample", 300, "bytes to write in the end, after 'def '"),
        ("--tp", 1, "ranks that hold slices of each layer"),
        ("--pp", 1, "stages of layers"),
        ("--sp", 1, "ranks that share out each window"),
        ("--micro-batches", 2, "parts of a batch that follow one another through the stages"),
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
    if options.heads % (options.tp * options.sp):
        parser.error(f"--heads {options.heads} cannot be dealt out over --tp and --sp")
    if options.layers < options.pp:
        parser.error(f"--layers {options.layers} are fewer than the stages, --pp {options.pp}")
    if options.pp > 1 and options.batch_size % options.micro_batches:
        parser.error("--batch-size is no multiple of --micro-batches")
    return options


def endless(loader: Any) -> Iterator[Tensor]:
    """Epoch after epoch."""
    while True:
        yield from loader


def loss_of(model: nn.Module, gpt: GPT, windows: Tensor, mesh: mz.Mesh) -> Tensor:
    """How badly each byte of this rank's stretch is guessed from those before it, in nats."""
    inputs, targets = own_stretch(windows, mesh)
    if mesh.pp.size > 1:
        return hybrid.loss_of(hybrid.forward(model, gpt, inputs, mesh.pp), targets)
    return hybrid.loss_of(model(inputs), targets)


def own_stretch(windows: Tensor, mesh: mz.Mesh) -> tuple[Tensor, Tensor]:
    """Bytes, and those that follow each."""
    part = mz.stretch(windows.shape[1] - 1, mesh.sp)
    return windows[:, :-1][:, part], windows[:, 1:][:, part]


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm up over the first tenth, then go down along a cosine, to a tenth."""
    warm_up = max(1, steps // 10)

    def factor(step: int) -> float:
        progress = (step - warm_up) / max(1, steps - warm_up)
        return min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * max(0.0, progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def distribute(
    gpt: GPT, options: argparse.Namespace, mesh: mz.Mesh
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and its optimizer, spread over the ranks as the options say."""
    hybrid.spread(gpt, mesh)
    optimizer = torch.optim.AdamW(
        gpt.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    if options.strategy == "ddp":
        return mz.DistributedDataParallel(gpt, world=mesh.replicas), optimizer
    stage = int(options.strategy.removeprefix("zero"))
    return mz.zero(gpt, optimizer, stage=stage, world=mesh.replicas, precision=options.precision)


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
    gpt: GPT,
    optimizer: torch.optim.Optimizer,
    data: Windows,
    options: argparse.Namespace,
    mesh: mz.Mesh,
    report: Reporter,
) -> None:
    """The loop that a single process would run, but for the lines with ``mz`` or the mesh."""
    device = torch.device(mesh.world.device.name)
    rate = schedule(optimizer, options.steps)
    pipeline = hybrid.Pipeline(model, mesh, options.micro_batches) if mesh.pp.size > 1 else None
    loader = mz.shard(data, batch_size=options.batch_size, seed=options.seed, world=mesh.dp)
    manager = checkpoints(options, model=model, optimizer=optimizer, scheduler=rate, loader=loader)
    first = manager.restore_latest() if manager and options.resume else None
    if first is not None:
        report.say(f"going on from step {first} in {options.checkpoint_dir}")
    report.begin(first or 0)
    # Replicas keep float32 parameters and compute in 16 bits; under ZeRO the model itself is cast.
    autocast = options.strategy == "ddp" and options.precision == "bf16"
    for step, windows in zip(range(first or 0, options.steps), endless(loader), strict=False):
        windows = windows.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            if pipeline:
                loss = pipeline.step(*own_stretch(windows, mesh))
            else:
                loss = loss_of(model, gpt, windows, mesh)
        if not pipeline:
            loss.backward()
        mz.clip_grad_norm_(model, 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        report.step(mz.mean(loss), windows[:, 1:].numel() * mesh.dp.size)
        if manager:
            manager.step(step + 1)
    if manager:
        manager.save(options.steps)
        manager.wait()


@torch.no_grad()
def evaluate(model: nn.Module, gpt: GPT, data: Windows, batch_size: int, mesh: mz.Mesh) -> float:
    """The loss over all windows, of which every replica takes its part."""
    own = [data[index] for index in range(mesh.dp.rank, len(data), mesh.dp.size)]
    total = 0.0
    for start in range(0, len(own), batch_size):
        windows = torch.stack(own[start : start + batch_size]).to(mesh.world.device.name)
        total += loss_of(model, gpt, windows, mesh).item() * len(windows)
    sums = mz.sum({"loss": total, "windows": len(own)}, world=mesh.replicas)
    return float(sums["loss"] / sums["windows"])


@torch.no_grad()
def generate(
    model: nn.Module, gpt: GPT, prompt: bytes, count: int, seed: int, mesh: mz.Mesh
) -> str:
    """Let the model go on from ``prompt`` for ``count`` bytes; it sees the last of its context.

    On all ranks alike: a model may need them all.
    """
    if mesh.sp.size > 1:
        hybrid.share_nothing(gpt)  # such short texts each rank has as a whole
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(count):
        context = torch.tensor([tokens[-gpt.context :]], device=mesh.world.device.name)
        guesses = hybrid.forward(model, gpt, context, mesh.pp)
        chances = F.softmax(guesses[0, -1].cpu() / 0.8, dim=0)
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
    count = sum(parameter.numel() for parameter in gpt.parameters())
    mesh = mz.mesh(tp=options.tp, pp=options.pp, sp=options.sp)
    model, optimizer = distribute(gpt.to(world.device.name), options, mesh)

    with Reporter(options, world) as report:
        report.say(f"{count:,} parameters, {len(text):,} bytes of text, {world.size} ranks")
        if mesh.dp.size < world.size:
            report.say(repr(mesh))
        train(model, gpt, optimizer, training, options, mesh, report)
    loss = evaluate(model, gpt, held_out, options.batch_size, mesh)
    memory = mz.memory_report(model, optimizer)
    sample = generate(model, gpt, b"def ", options.sample, options.seed, mesh)
    verdict = "reached" if loss < TARGET else "not reached"
    report.say(f"\n{sample}\n\n{memory}\n")
    report.say(
        f"held-out loss {loss:.4f} nats a byte; "
        f"the default options' target, below {TARGET}, is {verdict}"
    )
    report.finish(held_out_loss=loss, target=TARGET, reached=loss < TARGET)


if __name__ == "__main__":
    main()
