"""What the examples share: command-line options, and a report of the training by rank 0."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mpizero import World

SECONDS_BETWEEN_LINES = 5.0


def option_parser(description: str | None, *, steps: int) -> argparse.ArgumentParser:
    """A parser with the options that all examples have; they add their own."""
    parser = argparse.ArgumentParser(
        description=(description or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=positive, default=steps, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="of weights and of the data's order")
    parser.add_argument("--json", type=_new_file, metavar="FILE", help="write every step's numbers")
    parser.add_argument("--plot", type=_new_file, metavar="FILE", help="draw the loss as PNG")
    return parser


def checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """The options of examples that can be interrupted."""
    parser.add_argument("--checkpoint-dir", type=Path, metavar="DIR", help="save the run here")
    parser.add_argument(
        "--checkpoint-every", type=positive, default=100, metavar="STEPS", help="save so often"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint, if there is one"
    )


def positive(text: str) -> int:
    """The type of an option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _new_file(text: str) -> Path:
    """Better to fail now than after the training."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.absolute().parent}")
    return path


def load_digits() -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Scikit-learn's handwritten digits, (images, digits) twice: four fifths, and one held out.

    Images are vectors of 64 numbers from 0 to 1; the split is always the same.
    """
    from sklearn.datasets import load_digits as load  # late: not every example needs it
    from sklearn.model_selection import train_test_split

    images, digits = load(return_X_y=True)
    x, x_held_out, y, y_held_out = train_test_split(
        images / 16, digits, test_size=0.2, random_state=0, stratify=digits
    )
    return (x, y), (x_held_out, y_held_out)


class Reporter:
    """Shows and records the training on rank 0; on other ranks every method does nothing.

    A live bar where stdout is a terminal, else a line every few seconds. What several ranks see
    says nothing about the terminal (MPICH gives them pipes, Open MPI pseudo-terminals, in batch
    jobs too), so there ``TTY_COMPATIBLE=1`` must ask for the bar.

        with Reporter(options, world) as report:
            report.begin(first_step)
            for ...:
                report.step(loss, tokens)
        report.finish(held_out_loss=...)
    """

    def __init__(self, options: argparse.Namespace, world: World, unit: str = "tokens") -> None:
        self.active = world.rank == 0
        self.records: list[dict[str, float]] = []
        self._options, self._unit = options, unit
        wished = os.environ.get("TTY_COMPATIBLE") == "1"
        terminal = wished or (world.size == 1 and sys.stdout.isatty())
        self._console = Console(force_terminal=terminal, highlight=False)
        self._bar: Progress | None = None
        self._first = 0  # a resumed run has done so many steps before
        self._start = self._step_start = self._last_line = time.perf_counter()

    def __enter__(self) -> Reporter:
        self._start = self._step_start = self._last_line = time.perf_counter()
        if self.active and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=self._console,
                refresh_per_second=4,
            )
            self._bar.add_task("", total=self._options.steps)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print on rank 0, above the bar if there is one; any text, no markup."""
        if self.active:
            self._console.print(text, markup=False, soft_wrap=True)

    def begin(self, first: int) -> None:
        """The next step is number ``first``; those before were done by an earlier run."""
        self._first = first
        self._start = self._step_start = time.perf_counter()
        if self._bar is not None:
            self._bar.reset(self._bar.task_ids[0], total=self._options.steps - first)

    def step(self, loss: float, tokens: int) -> None:
        """Record a step: its global mean loss, and what all ranks together trained on in it."""
        if not self.active:
            return
        now = time.perf_counter()
        seconds, self._step_start = now - self._step_start, now
        self.records.append(
            {
                "step": self._first + len(self.records),
                "loss": loss,
                "seconds": seconds,
                "tokens_per_s": tokens / seconds,
            }
        )
        self._show(now)

    def finish(self, **final: Any) -> None:
        """Write the files that were asked for; ``final`` is what came out in the end."""
        if not self.active:
            return
        final["seconds"] = time.perf_counter() - self._start
        if self._options.json:
            document = {"steps": self.records, "final": final}
            self._options.json.write_text(json.dumps(document, indent=1) + "\n")
        if self._options.plot:
            losses = [record["loss"] for record in self.records]
            plot_loss(losses, self._options.plot, self._first)
            self.say(f"loss curve: {self._options.plot}")

    def _show(self, now: float) -> None:
        done, steps = len(self.records), self._options.steps - self._first
        recent = self.records[-20:]
        speed = sum(r["tokens_per_s"] for r in recent) / len(recent)
        text = f"loss {recent[-1]['loss']:.4f}  {speed:,.0f} {self._unit}/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, description=text)
        elif done in (1, steps) or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._start) / done * (steps - done)
            place = f"step {self._first + done}/{self._options.steps}"
            self.say(f"{place}  {text}  {left // 60:.0f}:{left % 60:02.0f} left")
            sys.stdout.flush()


def plot_loss(losses: list[float], path: Path, first: int = 0) -> None:
    """Draw the loss of each step from the ``first`` on, and its running mean, as PNG."""
    import matplotlib  # late: it takes a second, and only rank 0 draws

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    window = max(1, len(losses) // 20)
    means = [sum(losses[i - window + 1 : i + 1]) / window for i in range(window - 1, len(losses))]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(first, first + len(losses)), losses, alpha=0.3, label="each step")
    middle = first + window // 2
    axes.plot(range(middle, middle + len(means)), means, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=150)
    plt.close(figure)
