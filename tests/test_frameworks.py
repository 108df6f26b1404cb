"""PyTorch Lightning, Accelerate and ``Trainer`` on MPI's ranks: what docs/frameworks.md promises.

One launch on two ranks and one process read the page, run the examples as it says, and then do what
it says is an error. Needs the extra ``frameworks``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.documents import read_page
from support.launch import ROOT, Finished, launch_environment, mpirun

FRAMEWORKS = ("accelerate", "pytorch_lightning", "transformers")
MISSING = [name for name in FRAMEWORKS if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.once,
    pytest.mark.timeout(300),  # two launches
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

PAGE = ROOT / "docs" / "frameworks.md"
STEPS = 6  # of the examples: see support.documents.TINY

# What fails on two ranks. The last one ends the job.
MISTAKES = """
import os
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState

import mpizero
import mpizero_torch.huggingface
from mpizero_torch.lightning import MpiStrategy

world = mpizero.init()

# One process group for all, also where torch's variables name a place where nobody is.
os.environ |= {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "9"}
if dist.is_initialized():
    dist.destroy_process_group()
strategy = MpiStrategy()
assert dist.get_backend() == "mpizero"
assert (strategy.global_rank, strategy.world_size) == (world.rank, world.size)
assert (strategy.node_rank, strategy.num_nodes, strategy.num_processes) == (0, 1, 2)
counts = strategy.reduce(torch.tensor([1 + 2 * world.rank]), reduce_op="mean")
assert counts.tolist() == [2] and counts.dtype == torch.int64

for given in ({"devices": 3}, {"num_nodes": 3}):
    (name,) = given
    with pytest.raises(mpizero.ArgumentError, match=f"'{name}' is 3; allowed: ."):
        pl.Trainer(strategy="mpizero", accelerator="cpu", logger=False, **given)
pl.Trainer(strategy="mpizero", accelerator="cpu", devices=2, num_nodes=1, logger=False)

AcceleratorState._reset_state(reset_partial_state=True)
variables = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
assert variables == {"RANK": str(world.rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(world.rank)}
PartialState()  # finds none of them
with pytest.raises(mpizero.LaunchError, match="has started already, as rank 0 of 1"):
    mpizero_torch.huggingface.init()

dist.destroy_process_group()
store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
for start in (mpizero_torch.huggingface.init, MpiStrategy):
    with pytest.raises(mpizero.LaunchError, match="already, with the backend 'gloo'"):
        start()
dist.destroy_process_group()


class Fails(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, index):
        if index == 1 and self.global_rank == 1:
            raise ZeroDivisionError("of rank 1 alone")
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


print("before the fit", flush=True)
trainer = pl.Trainer(strategy=MpiStrategy(), logger=False, enable_checkpointing=False,
                     enable_progress_bar=False)
trainer.fit(Fails(), torch.ones(8, 1, 1))
"""


class Readings:
    """What two ranks and one process have made of the page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        page = str(PAGE.relative_to(ROOT))
        steps = {page: read_page(PAGE).steps}
        mistakes = {"mistakes": [{"do": "exec", "line": 1, "text": MISTAKES}]}
        self.together = mpirun(2, self._reader(2, steps | mistakes), timeout=145, env=self._env())
        command = [sys.executable, *self._reader(1, steps)]
        env = launch_environment(self._env())
        self.alone = subprocess.run(command, env=env, timeout=145, capture_output=True, text=True)

    def failures(self, ranks: int) -> dict[str, dict[str, Any]]:
        """What went wrong, by page."""
        found = [json.loads(path.read_text()) for path in self.folder.glob(f"failed-{ranks}-*")]
        return {each["page"]: each for each in found}

    def report(self, ranks: int, name: str) -> dict[str, Any]:
        """What an example has written."""
        path = self.folder / "docs-frameworks.md" / str(ranks) / f"{name}.json"
        report: dict[str, Any] = json.loads(path.read_text())
        return report

    def _reader(self, ranks: int, steps: dict[str, Any]) -> list[str]:
        plan = self.folder / f"plan-{ranks}.json"
        plan.write_text(json.dumps(steps))
        return ["-m", "support.reader", str(plan), str(self.folder)]

    def _env(self) -> dict[str, str]:
        search = [ROOT, ROOT / "adapters", ROOT / "tests", os.environ.get("PYTHONPATH", "")]
        return {
            "PYTHONPATH": os.pathsep.join(map(str, search)),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.folder),
        }


@pytest.fixture(scope="module")
def readings(tmp_path_factory: pytest.TempPathFactory) -> Readings:
    return Readings(tmp_path_factory.mktemp("frameworks"))


def test_the_page_can_be_followed(readings: Readings) -> None:
    assert readings.alone.returncode == 0, readings.alone.stderr[-4000:]
    wrong = readings.failures(2)
    page = wrong.get("docs/frameworks.md", {"line": "", "why": ""})
    assert not page["why"], f"line {page['line']}: {page['why']}"
    assert (readings.folder / "read-2.jsonl").exists(), readings.together.stderr[-4000:]


@pytest.mark.parametrize("name", ["lightning", "accelerate", "trainer"])
def test_two_ranks_train_what_one_process_does(readings: Readings, name: str) -> None:
    together, alone = readings.report(2, name), readings.report(1, name)
    losses = [[step["loss"] for step in report["steps"]] for report in (together, alone)]
    assert len(losses[0]) == STEPS
    assert len(set(losses[0])) == STEPS
    # The sum over the samples of a batch is taken in another order: some roundings of float32.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    held_out = [
        report["final"][key]
        for report in (together, alone)
        for key in report["final"]
        if key.startswith("held_out")
    ]
    assert len(held_out) == 2 and held_out[0] == pytest.approx(held_out[1], rel=1e-5)


def test_mistakes_are_told_and_an_error_on_one_rank_ends_the_job(readings: Readings) -> None:
    result: Finished = readings.together
    assert result.returncode != 0
    failed = readings.failures(2)["mistakes"]["why"]
    assert "ZeroDivisionError: of rank 1 alone" in failed, failed
    assert "rank 1" in result.stderr
    assert result.stderr.count("ZeroDivisionError: of rank 1 alone") == 1, result.stderr
