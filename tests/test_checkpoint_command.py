"""``mpizero checkpoint``: show, verify and export, by one process that knows no framework."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, load_model

import mpizero_torch as mz
from mpizero import checkpoint
from mpizero.cli import main
from support.killed_calls import dies

pytestmark = pytest.mark.once


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.out = torch.nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("count", torch.tensor([3]))


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Tied]:
    """Two checkpoints of a model whose parts are in several files."""
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    loader = mz.shard(torch.utils.data.TensorDataset(torch.arange(10)), batch_size=2)
    next(iter(loader))
    run = {"model": model, "optimizer": optimizer, "loader": loader}
    mz.save(tmp_path / "run/step-00000001", **run, largest_file=100)  # type: ignore[arg-type]
    mz.save(tmp_path / "run/step-00000002", **run, extra={"step": 2, "best": 0.25})  # type: ignore[arg-type]
    return tmp_path / "run", model


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["checkpoint", *map(str, arguments)])


def test_show_lists_what_is_there(run: tuple[Path, Tied]) -> None:
    folder, _ = run
    said = command("show", folder).output
    assert "step-00000002: complete" in said and "best = 0.25" in said
    assert "2 of 10 samples of epoch 0" in said
    assert "model-00001-of-0000" in command("show", folder / "step-00000001").output
    another = folder / "step-00000004"
    assert dies(lambda: checkpoint.save(another, {"a": 1}, mz.init()), 1, ["sync"])
    (folder / "step-00000003.partial-ab").mkdir()
    listed = command("show", folder, "--tensors").output
    assert re.search(r"left over by a save .*step-00000004\.partial-", listed)
    assert re.search(r"nothing proves .*step-00000003\.partial-ab \(it stays\)", listed)
    assert "embed.weight  float32  [11, 6]" in listed and "step-00000003.partial-ab" in listed
    found = json.loads(command("show", folder, "--json").output)
    assert found["parts"]["model"]["elements"] == 67 and found["values"]["step"] == 2


def test_verify_reads_everything(run: tuple[Path, Tied]) -> None:
    folder, _ = run
    assert command("verify", folder).exit_code == 0
    path = folder / "step-00000002" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    result = command("verify", folder)
    assert result.exit_code == 1
    assert "model.safetensors is damaged at tensor 'embed.weight'" in result.output


@pytest.mark.parametrize("step", [1, 2])
def test_the_exported_model_is_read_by_others(
    run: tuple[Path, Tied], tmp_path: Path, step: int
) -> None:
    folder, model = run
    out = tmp_path / "model.safetensors"
    result = command("export", folder / f"step-{step:08}", out)
    assert result.exit_code == 0, result.output
    other = Tied()
    load_model(other, out)
    assert (other.out.weight == model.out.weight).all() and other.count == 3
    assert "exists already" in command("export", folder, out).output
    half = tmp_path / "half.safetensors"
    assert command("export", folder, half, "--dtype", "bfloat16").exit_code == 0
    found = load_file(half)
    assert found["embed.weight"].dtype == torch.bfloat16 and found["count"].dtype == torch.int64
    np.testing.assert_allclose(
        found["embed.weight"].float(), model.embed.weight.detach(), rtol=2**-8
    )


def test_an_export_that_fails_leaves_nothing(run: tuple[Path, Tied], tmp_path: Path) -> None:
    folder, _ = run
    path = folder / "step-00000002" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-20] ^= 4
    path.write_bytes(data)
    result = command("export", folder, tmp_path / "out.safetensors")
    assert result.exit_code == 1 and "model.safetensors is damaged" in result.output
    assert not list(tmp_path.glob("out*"))
    assert (
        "has no part 'other'" in command("export", folder, tmp_path / "o", "--part", "other").output
    )


def test_what_is_no_checkpoint(tmp_path: Path, run: tuple[Path, Tied]) -> None:
    assert "There is no checkpoint" in command("show", tmp_path / "nothing").output
    folder, _ = run
    (folder / "step-00000001" / "manifest.json").unlink()
    shutil.rmtree(folder / "step-00000002")
    result = command("show", folder)
    assert result.exit_code == 1 and "There is no checkpoint" in result.output
