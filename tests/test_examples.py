"""The examples run as users start them, and n ranks train what one process would."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from support.launch import ROOT, mpirun

pytestmark = pytest.mark.once

TINY_GPT = ["--layers", "2", "--heads", "2", "--width", "32", "--context", "32"]
TINY_GPT += ["--sample", "20", "--text", str(ROOT / "mpizero/api/world.py")]

# (program, options, the option for the batch size of a rank, one process's batch size)
EXAMPLES = {
    "gpt": ("train_gpt.py", TINY_GPT, 8),
    "gpt, ZeRO 3": ("train_gpt.py", [*TINY_GPT, "--strategy", "zero3"], 8),
    "digits": ("train_digits.py", ["--sync-batch-norm"], 24),
    "numpy": ("numpy_only.py", [], 32),
    "numpy, sharded": ("numpy_only.py", ["--zero"], 32),
}
STEPS = 8


def run(name: str, ranks: int, folder: Path) -> tuple[dict[str, Any], str]:
    program, options, batch = EXAMPLES[name]
    file, plot = folder / f"{ranks}.json", folder / f"{ranks}.png"
    common = ["--steps", str(STEPS), "--seed", "3", "--json", str(file), "--plot", str(plot)]
    size = ["--batch-size", str(batch // ranks)]
    command = [str(ROOT / "examples" / program), *options, *size, *common]
    result = mpirun(ranks, command, timeout=100)
    assert result.returncode == 0, result.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    return json.loads(file.read_text()), result.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_two_ranks_train_what_one_process_does(name: str, tmp_path: Path) -> None:
    alone, _ = run(name, 1, tmp_path)
    together, said = run(name, 2, tmp_path)
    assert [step["step"] for step in together["steps"]] == list(range(STEPS))
    for ours, theirs in zip(together["steps"], alone["steps"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["seconds"] > 0 and ours["tokens_per_s"] > 0
    assert together["final"] and set(together) == {"steps", "final"}
    # Rank 0 alone speaks.
    lines = [line for line in said.splitlines() if line.strip()]
    assert len(lines) == len(dict.fromkeys(lines)), said
    assert sys.executable not in said


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    """The steps that it runs again, and those that follow, have the very same losses."""
    program, options, _ = EXAMPLES["gpt, ZeRO 3"]
    folder = tmp_path / "run"
    kept = ["--checkpoint-dir", str(folder), "--checkpoint-every", "3", "--steps", str(STEPS)]

    def losses(name: str, *more: str) -> dict[int, float]:
        command = [str(ROOT / "examples" / program), *options, *kept, *more]
        result = mpirun(2, [*command, "--json", str(tmp_path / name)], timeout=100)
        assert result.returncode == 0, result.stderr
        steps = json.loads((tmp_path / name).read_text())["steps"]
        return {step["step"]: step["loss"] for step in steps}

    whole = losses("afresh.json", "--resume")  # there is nothing to go on from
    assert sorted(whole) == list(range(STEPS))
    shutil.rmtree(folder / f"step-{STEPS:08}")
    assert losses("resumed.json", "--resume") == {step: whole[step] for step in range(6, STEPS)}


# (options, ranks, replicas): one run begins under the first, and is gone on with under the others.
MESHES = [
    (["--tp", "2", "--strategy", "zero2"], 4, 2),
    (["--pp", "2", "--strategy", "zero1"], 2, 1),
    (["--sp", "2"], 2, 1),
]


@pytest.mark.timeout(300)
def test_meshes_train_what_one_process_does_and_take_over_from_each_other(tmp_path: Path) -> None:
    alone = {step["step"]: step["loss"] for step in run("gpt", 1, tmp_path)[0]["steps"]}
    folder, file = tmp_path / "run", tmp_path / "mesh.json"
    kept = ["--checkpoint-dir", str(folder), "--checkpoint-every", "4", "--resume"]
    common = ["--steps", str(STEPS), "--seed", "3", "--json", str(file)]
    first = 0
    for options, ranks, replicas in MESHES:
        size = ["--batch-size", str(8 // replicas)]
        program = [str(ROOT / "examples/train_gpt.py"), *TINY_GPT, *options, *size]
        result = mpirun(ranks, [*program, *common, *kept], timeout=110)
        assert result.returncode == 0, result.stderr
        found = json.loads(file.read_text())["steps"]
        assert [step["step"] for step in found] == list(range(first, STEPS))
        for step in found:
            assert step["loss"] == pytest.approx(alone[step["step"]], rel=1e-5), options
        shutil.rmtree(folder / f"step-{STEPS:08}")
        first = 4
