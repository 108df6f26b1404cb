"""Train a small ResNet on handwritten digits, data-parallel over all ranks.

    mpirun -n 2 python examples/train_digits.py

The images are scikit-learn's bundled ones, 8 x 8 pixels each; a fifth of them is held out. With
the default options the accuracy on these ends above TARGET, in half a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import mpizero_torch as mz
from common import Reporter, load_digits, option_parser, positive

TARGET = 0.97


class Block(nn.Module):
    """Two convolutions, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


def resnet(channels: int, blocks: int) -> nn.Module:
    """Two stages of ``blocks`` blocks; between them, half the size and twice the channels."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        *(Block(channels) for _ in range(blocks)),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        *(Block(2 * channels) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 10),
    )


def parse() -> argparse.Namespace:
    parser = option_parser(__doc__, steps=200)
    parser.add_argument("--batch-size", type=positive, default=32, help="images per rank and step")
    parser.add_argument("--channels", type=positive, default=16, help="of the first stage")
    parser.add_argument("--blocks", type=positive, default=1, help="per stage")
    parser.add_argument("--lr", type=float, default=5e-3, help="highest learning rate")
    parser.add_argument(
        "--sync-batch-norm",
        action="store_true",
        help="normalise over the batches of all ranks, as one process would",
    )
    return parser.parse_args()


def datasets() -> tuple[TensorDataset, TensorDataset]:
    """Images to train on, and those held out."""

    def convert(x: Any, y: Any) -> TensorDataset:
        images = torch.from_numpy(x).float().reshape(-1, 1, 8, 8)
        return TensorDataset(images, torch.from_numpy(y))

    training, held_out = load_digits()
    return convert(*training), convert(*held_out)


def endless(loader: Any) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader


def train(
    model: nn.Module,
    data: TensorDataset,
    options: argparse.Namespace,
    world: mz.World,
    report: Reporter,
) -> None:
    """The loop that a single process would run, but for the lines with ``mz``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    batches = endless(mz.shard(data, batch_size=options.batch_size, seed=options.seed))
    for _, (images, digits) in zip(range(options.steps), batches, strict=False):
        images, digits = images.to(world.device.name), digits.to(world.device.name)
        loss = F.cross_entropy(model(images), digits)
        loss.backward()
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        report.step(mz.mean(loss), mz.sum(len(digits)))


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset, world: mz.World) -> float:
    """The share of images told right; every rank looks at its part of them."""
    model.eval()
    images, digits = data[world.rank :: world.size]
    guesses = model(images.to(world.device.name)).argmax(dim=1).cpu()
    return float(mz.sum(int((guesses == digits).sum())) / len(data))


def main() -> None:
    options = parse()
    world = mz.init()
    training, held_out = datasets()
    torch.manual_seed(options.seed)
    network = resnet(options.channels, options.blocks)
    if options.sync_batch_norm:
        network = mz.SyncBatchNorm.convert_sync_batchnorm(network)
    model = mz.DistributedDataParallel(network.to(world.device.name))
    with Reporter(options, world, unit="images") as report:
        train(model, training, options, world, report)
    right = accuracy(model, held_out, world)
    report.say(
        f"held-out accuracy {right:.2%}; the default options' target, above {TARGET:.0%}, "
        f"is {'reached' if right > TARGET else 'not reached'}"
    )
    report.finish(held_out_accuracy=right, target=TARGET, reached=right > TARGET)


if __name__ == "__main__":
    main()
