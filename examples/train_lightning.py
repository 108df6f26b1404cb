"""Train a small network on handwritten digits with PyTorch Lightning, over all ranks.

    mpirun -n 2 python examples/train_lightning.py

The images are scikit-learn's bundled ones, 8 x 8 pixels each; a fifth of them is held out. Of
mpizero there is one line: the strategy. Needs Lightning (the package lightning, or
pytorch-lightning).
"""

from __future__ import annotations

import argparse
import logging
import warnings
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from common import Reporter, load_digits, option_parser, positive

if find_spec("lightning"):
    import lightning.pytorch as pl
else:
    import pytorch_lightning as pl

from mpizero_torch.lightning import MpiStrategy

TARGET = 0.95


class Digits(pl.LightningModule):
    """Two convolutions and a linear layer."""

    def __init__(self, channels: int, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * channels * 16, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        guesses: Tensor = self.layers(images)
        return guesses

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, digits = batch
        return F.cross_entropy(self(images), digits)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        images, digits = batch
        right = (self(images).argmax(dim=1) == digits).float().mean()
        self.log("accuracy", right, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Report(pl.Callback):
    """Tells the reporter of each step: the mean loss of all ranks."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        loss = trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")
        self.reporter.step(loss.item(), len(batch[0]) * trainer.world_size)


def parse() -> argparse.Namespace:
    parser = option_parser(__doc__, steps=200)
    parser.add_argument("--batch-size", type=positive, default=32, help="images per rank and step")
    parser.add_argument("--channels", type=positive, default=16, help="of the first layer")
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate")
    return parser.parse_args()


def loader(x: Any, y: Any, batch_size: int, **options: Any) -> DataLoader[tuple[Tensor, ...]]:
    images = torch.from_numpy(x).float().reshape(-1, 1, 8, 8)
    return DataLoader(TensorDataset(images, torch.from_numpy(y)), batch_size, **options)


def quiet() -> None:
    """Hints are for who writes a program, not for who runs it."""
    logging.getLogger(pl.__name__).setLevel(logging.WARNING)
    warnings.simplefilter("ignore", pl.utilities.warnings.PossibleUserWarning)
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)


def main() -> None:
    options = parse()
    quiet()
    strategy = MpiStrategy()
    training, held_out = load_digits()
    torch.manual_seed(options.seed)
    model = Digits(options.channels, options.lr)
    with Reporter(options, strategy.world, unit="images") as report:
        trainer = pl.Trainer(
            strategy=strategy,
            max_steps=options.steps,
            callbacks=[Report(report)],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        shuffled = loader(*training, options.batch_size, shuffle=True, drop_last=True)
        trainer.fit(model, shuffled)
    (found,) = trainer.test(model, loader(*held_out, 60), verbose=False)
    right = found["accuracy"]
    report.say(
        f"held-out accuracy {right:.2%}; the default options' target, above {TARGET:.0%}, "
        f"is {'reached' if right > TARGET else 'not reached'}"
    )
    report.finish(held_out_accuracy=right, target=TARGET, reached=right > TARGET)


if __name__ == "__main__":
    main()
