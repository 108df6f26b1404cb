"""Train a tiny GPT-2 on real text with Hugging Face's ``Trainer``, over all ranks.

    mpirun -n 2 python examples/train_trainer.py

The text is the Python standard library's own source, byte by byte, or what ``--text`` names; its
last twentieth is held out. The weights are random at first: nothing is downloaded. Of mpizero
there is one line, ``init()``. Needs accelerate and transformers.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import mpizero_torch.huggingface
from common import Reporter, option_parser, positive
from train_gpt import Windows, read_text, split

TARGET = 2.5
HELD_OUT = 100  # windows that are looked at in the end


class Samples(Dataset[dict[str, Tensor]]):
    """Windows of bytes, named as ``Trainer`` wants them."""

    def __init__(self, windows: Windows, most: int | None = None) -> None:
        self.windows = windows
        self.count = min(len(windows), most or len(windows))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.windows[index]
        return {"input_ids": window, "labels": window}


class Report(TrainerCallback):  # type: ignore[misc]
    """Tells the reporter of each step: the mean loss of all ranks."""

    def __init__(self, reporter: Reporter, tokens: int) -> None:
        self.reporter, self.tokens = reporter, tokens

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.reporter.step(logs["loss"], self.tokens)


def parse() -> argparse.Namespace:
    parser = option_parser(__doc__, steps=300)
    parser.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="train on these")
    for name, default, what in (
        ("--layers", 2, "blocks"),
        ("--heads", 4, "attention heads"),
        ("--width", 64, "size of a token's vector"),
        ("--context", 64, "bytes that the model sees"),
        ("--batch-size", 8, "windows per rank and step"),
    ):
        parser.add_argument(name, type=positive, default=default, help=what)
    parser.add_argument("--lr", type=float, default=5e-3, help="highest learning rate")
    return parser.parse_args()


def gpt2(options: argparse.Namespace) -> GPT2LMHeadModel:
    """Over bytes, with random weights."""
    config = GPT2Config(
        vocab_size=256,
        n_positions=options.context + 1,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    return GPT2LMHeadModel(config)


def arguments(options: argparse.Namespace, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, options.steps // 10),
        seed=options.seed,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    options = parse()
    world = mpizero_torch.huggingface.init()
    text = world.broadcast_object(read_text(options.text) if world.rank == 0 else None)
    training, held_out = split(text, options.context)
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as folder, Reporter(options, world) as report:
        trainer = Trainer(
            gpt2(options),
            arguments(options, folder),
            train_dataset=Samples(training),
            eval_dataset=Samples(held_out, HELD_OUT),
            callbacks=[Report(report, options.batch_size * options.context * world.size)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    report.say(
        f"held-out loss {loss:.4f} nats a byte; "
        f"the default options' target, below {TARGET}, is "
        f"{'reached' if loss < TARGET else 'not reached'}"
    )
    report.finish(held_out_loss=loss, target=TARGET, reached=loss < TARGET)


if __name__ == "__main__":
    main()
