"""Train a tiny vision transformer on handwritten digits with Hugging Face Accelerate.

    mpirun -n 2 python examples/train_accelerate.py

The images are scikit-learn's bundled ones, 8 x 8 pixels each; a fifth of them is held out. The
weights are random at first: nothing is downloaded. Of mpizero there is one line, ``init()``; the
rest is Accelerate's usual loop. Needs accelerate and transformers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

import mpizero_torch.huggingface
from common import Reporter, load_digits, option_parser, positive

TARGET = 0.9


def parse() -> argparse.Namespace:
    parser = option_parser(__doc__, steps=600)
    parser.add_argument("--batch-size", type=positive, default=32, help="images per rank and step")
    parser.add_argument("--layers", type=positive, default=2, help="blocks of the transformer")
    parser.add_argument("--width", type=positive, default=32, help="size of a patch's vector")
    parser.add_argument("--lr", type=float, default=6e-3, help="learning rate")
    return parser.parse_args()


def vision_transformer(layers: int, width: int) -> Any:
    """For 8 x 8 grey images, in patches of 2 x 2; with random weights."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def loader(x: Any, y: Any, batch_size: int, **options: Any) -> DataLoader[tuple[Tensor, ...]]:
    images = torch.from_numpy(x).float().reshape(-1, 1, 8, 8)
    return DataLoader(TensorDataset(images, torch.from_numpy(y)), batch_size, **options)


def endless(batches: Any) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from batches


@torch.no_grad()
def accuracy(accelerator: Accelerator, model: Any, batches: Any) -> float:
    """The share of images told right, each counted once."""
    model.eval()
    right = [
        accelerator.gather_for_metrics(model(images).logits.argmax(dim=1) == digits)
        for images, digits in batches
    ]
    return torch.cat(right).float().mean().item()


def main() -> None:
    options = parse()
    world = mpizero_torch.huggingface.init()
    # The data's order then does not depend on the number of ranks.
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=options.seed)
    accelerator = Accelerator(dataloader_config=order)
    training, held_out = load_digits()
    torch.manual_seed(options.seed)
    network = vision_transformer(options.layers, options.width)
    model, optimizer, batches, others = accelerator.prepare(
        network,
        torch.optim.AdamW(network.parameters(), lr=options.lr),
        loader(*training, options.batch_size, shuffle=True, drop_last=True),
        loader(*held_out, 50),
    )
    with Reporter(options, world, unit="images") as report:
        for _, (images, digits) in zip(range(options.steps), endless(batches), strict=False):
            loss = model(images, labels=digits).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            mean = accelerator.reduce(loss.detach(), "mean").item()
            report.step(mean, len(images) * accelerator.num_processes)
    right = accuracy(accelerator, model, others)
    report.say(
        f"held-out accuracy {right:.2%}; the default options' target, above {TARGET:.0%}, "
        f"is {'reached' if right > TARGET else 'not reached'}"
    )
    report.finish(held_out_accuracy=right, target=TARGET, reached=right > TARGET)
    accelerator.end_training()


if __name__ == "__main__":
    main()
