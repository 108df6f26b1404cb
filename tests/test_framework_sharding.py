"""Accelerate, ``Trainer`` and Lightning sharding as their configuration says.

n ranks learn what one process does. The programs are in ``support.framework_runs``, and use nothing
of mpizero but ``init()`` and the strategies. One launch for each number of ranks; the larger ones
also go on from what one process has saved.
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

from support.framework_runs import FEW, GROUPS
from support.launch import ROOT, launch_environment, mpirun

FRAMEWORKS = ("accelerate", "pytorch_lightning", "transformers")
MISSING = [name for name in FRAMEWORKS if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.once,
    pytest.mark.timeout(900),  # three launches, by the first test
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

RANKS = (2, 3)
NAMES = [f"{group} {name}" for group, runs in GROUPS.items() for name in runs]
# Sums in another order round differently: a few bits of float32 in each of six steps. With too
# large a rate ("best") every step multiplies that by some ten.
EXACT = {"rel": 2e-5, "abs": 2e-6}
BEST = {"rel": 1e-3, "abs": 1e-3}
# Each rank rounds activations to 8 or 11 bits, and gradients too: of 36 samples.
HALF = {"rel": 2e-2, "abs": 1e-2}


class Runs:
    """What has been learnt on one process and on several ranks."""

    def __init__(self, folder: Path) -> None:
        program = ["-m", "support.framework_runs", str(folder), *GROUPS]
        search = [ROOT, ROOT / "adapters", ROOT / "tests", os.environ.get("PYTHONPATH", "")]
        changes = {"PYTHONPATH": os.pathsep.join(map(str, search)), "HF_HUB_OFFLINE": "1"}
        self.said = {}
        alone = subprocess.run(
            [sys.executable, *program], env=launch_environment(changes), timeout=280,
            capture_output=True, text=True,
        )  # fmt: skip
        self.said[1] = alone.stderr
        for ranks in RANKS:
            self.said[ranks] = mpirun(ranks, program, timeout=280, env=changes).stderr
        self.found = {
            n: json.loads((folder / f"{n}.json").read_text())
            if (folder / f"{n}.json").exists()
            else {}
            for n in (1, *RANKS)
        }

    def result(self, ranks: int, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.found[ranks].get(name, {"error": "it never came to that"})
        assert "error" not in found, f"{found['error']}\n{self.said[ranks][-6000:]}"
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("sharding"))


@pytest.mark.parametrize(
    ("name", "ranks"), [(name, 2) for name in NAMES] + [(name, 3) for name in FEW]
)
def test_ranks_learn_what_one_process_learns(runs: Runs, name: str, ranks: int) -> None:
    ours, alone = runs.result(ranks, name), runs.result(1, name)
    bound = BEST if name == "trainer best" else HALF if "16" in name else EXACT
    assert ours.keys() == alone.keys()
    for key, value in alone.items():
        if key in ("weights", "again"):
            assert ours[key].keys() == value.keys()
            for parameter, numbers in value.items():
                assert ours[key][parameter] == pytest.approx(numbers, **bound), (key, parameter)
        else:
            assert ours[key] == (value if key == "best" else pytest.approx(value, **bound)), key


@pytest.mark.parametrize("name", [n for n in NAMES if n.split()[1] in ("stage", "private", "fsdp")])
def test_stages_learn_what_replicas_learn(runs: Runs, name: str) -> None:
    plain, ours = runs.result(2, f"{name.split()[0]} plain"), runs.result(2, name)
    assert ours["losses"] == pytest.approx(plain["losses"], **EXACT)
    assert len(set(ours["losses"])) == len(plain["losses"]) > 0  # it has been trained at all


def test_sections_of_the_configuration_are_the_optimizer_and_the_schedule(runs: Runs) -> None:
    """Adam is AdamW; the first two steps have the lowest rate; then Trainer's rate, and down."""
    rates = runs.result(1, "trainer sections")["losses"][2::3]
    # Steps 0 to 5 of a warm-up that takes two: DeepSpeed's WarmupDecayLR at -1, 0, 1, ... of 6.
    assert rates == pytest.approx([0, 0, 0.01, 0.01, 0.01 * 3 / 4, 0.01 * 2 / 4], abs=1e-9)
