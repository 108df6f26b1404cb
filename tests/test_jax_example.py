"""The example with JAX: n ranks train what one process would, with sharded state as well."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from support.launch import ROOT, mpirun

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(importlib.util.find_spec("optax") is None, reason="needs jax and optax"),
]
SMALL = ["--layers", "2", "--heads", "2", "--width", "32", "--context", "32", "--steps", "5"]


def _losses(ranks: int, folder: Path, *more: str) -> list[float]:
    file = folder / f"{ranks}.json"
    program = [str(ROOT / "examples/train_gpt_jax.py"), *SMALL, "--json", str(file)]
    text = ["--text", str(ROOT / "mpizero/layout.py"), "--batch-size", str(8 // ranks)]
    result = mpirun(ranks, [*program, *text, *more], timeout=300)
    assert result.returncode == 0, result.stderr
    return [step["loss"] for step in json.loads(file.read_text())["steps"]]


def test_two_ranks_train_what_one_process_does(tmp_path: Path) -> None:
    alone = _losses(1, tmp_path)
    assert alone[-1] < alone[0]
    assert _losses(2, tmp_path, "--zero") == pytest.approx(alone, rel=1e-5)
