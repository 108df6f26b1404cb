"""A reader of the documentation: takes the steps that its pages ask for, on each rank.

    python -m support.reader PLAN FOLDER        (or under mpirun)

The plan is JSON: the steps of each page, by name, as ``support.documents`` finds them. All pages
share one launch per number of ranks, since starting torch on every rank takes seconds: on one
process, all Python blocks and the commands for one process; on several, all Python blocks and the
commands that start several, whatever their number. What has been done is noted in FOLDER.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mpizero
import mpizero_torch as mz
from mpizero.cli import main as command
from support.launch import ROOT

SAMPLES = 1000  # enough for 500 steps of two ranks in ten epochs


class Net(nn.Module):
    """A network that a reader may have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return y


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 8, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


def build() -> tuple[nn.Module, torch.optim.Optimizer, Callable[..., torch.Tensor]]:
    """For ``mz.verify``."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    return net, optimizer, lambda model, x, y: nn.functional.mse_loss(model(x), y)


def what_a_reader_has() -> dict[str, Any]:
    """All that a page may say its reader has, made anew. Collective."""
    torch.manual_seed(0)
    model, data = Net(), dataset()
    w, b = np.ones((4, 3), np.float32), np.zeros(3, np.float32)
    world = mz.init()
    return {
        "torch": torch, "nn": nn, "np": np, "mpizero": mpizero, "mz": mz, "world": world,
        "Net": Net, "model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=3e-4),
        "old": {f"module.{name}": each for name, each in model.state_dict().items()},
        "dataset": data, "loader": DataLoader(data, batch_size=8, shuffle=True),
        "loss_fn": nn.functional.mse_loss, "build": build,
        "batches": [DataLoader(data, batch_size=8).collate_fn([data[i] for i in range(8)])],
        "w": w, "b": b, "grad_w": np.ones_like(w), "grad_b": np.ones_like(b),
        "state": mpizero.ShardedState.scatter({"w": w, "b": b}, world),
    }  # fmt: skip


class Reader:
    """Takes the steps of one page in one folder."""

    def __init__(self, page: str, folder: Path) -> None:
        self.page, self.folder, self.world = page, folder, mz.init()
        self.printed: dict[int, str] = {}  # by the line of the block
        self._namespace: dict[str, Any] = {"__name__": "__main__"}
        self._files: dict[str, str] = {}

    def take(self, step: dict[str, Any]) -> None:
        if step["do"] == "have":
            have = what_a_reader_has()
            self._namespace |= {name: have[name] for name in step["names"]}
        elif step["do"] == "exec":
            # The page's own line numbers, in tracebacks.
            code = compile("\n" * (step["line"] - 1) + step["text"], self.page, "exec")
            with redirect_stdout(io.StringIO()):
                exec(code, self._namespace)
        elif step["do"] == "write":
            if self.world.rank == 0:
                (self.folder / step["file"]).write_text(step["text"])
            self._files[step["file"]] = step["text"]
        elif (step["ranks"] == 1) == (self.world.size == 1):
            self._run(step)
        self.world.barrier()

    def _run(self, step: dict[str, Any]) -> None:
        out = io.StringIO()
        with redirect_stdout(out), _environment(step["env"]):
            if step["program"] == "mpizero":
                command.main(step["arguments"], standalone_mode=False)
            else:
                self._run_script(*step["arguments"])
        said = self.world.gather_objects(out.getvalue())
        self.printed[step["line"]] = self.printed.get(step["line"], "") + "".join(said)

    def _run_script(self, script: str, *arguments: str) -> None:
        text = self._files.get(script)
        path = ROOT / script if text is None else self.folder / script
        # Of a file that does not begin on the page, the reader has the beginning.
        given = {} if text is None or text.startswith("# ") else dict(self._namespace)
        before = sys.argv, sys.path
        sys.argv, sys.path = [str(path), *arguments], [str(path.parent), *sys.path]
        try:
            runpy.run_path(str(path), init_globals=given, run_name="__main__")
        finally:
            sys.argv, sys.path = before


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """A page's PreemptionGuard ends with the page."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextmanager
def _process_groups_ended() -> Iterator[None]:
    """A page's process group of torch ends with the page."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main(arguments: Sequence[str]) -> None:
    plan, base = json.loads(Path(arguments[0]).read_text()), Path(arguments[1])
    world = mz.init()
    for page, steps in plan.items():
        # What several ranks have saved, one process may go on from, where the page has programs.
        together = any(step["do"] == "write" for step in steps)
        folder = base / page.replace("/", "-") / ("" if together else str(world.size))
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        reader = Reader(page, folder)
        try:
            with _signals_kept(), _process_groups_ended():
                for step in steps:
                    reader.take(step)
        except BaseException:
            name = f"failed-{world.size}-{world.rank}.json"
            said = {"page": page, "line": step["line"], "why": traceback.format_exc()}
            (base / name).write_text(json.dumps(said))
            raise
        if world.rank == 0:
            with (base / f"read-{world.size}.jsonl").open("a") as notes:
                notes.write(json.dumps({"page": page, "printed": reader.printed}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
