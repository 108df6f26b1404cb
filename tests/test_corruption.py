"""Damage is noticed, and named: which file, and which tensor. Wrong numbers are never loaded."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import mpizero_torch as mz
from mpizero.checkpoint import Checkpoint

pytestmark = pytest.mark.once

FLIPS = 100  # in each file; there are eight


class Run:
    """A small training, saved as a whole, and what loads it again."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.BatchNorm1d(30))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.model(torch.rand(4, 20)).square().sum().backward()
        self.optimizer.step()

    def save(self, path: Path) -> None:
        values = {"epoch": 3, "table": torch.arange(50.0)}
        mz.save(path, model=self.model, optimizer=self.optimizer, extra=values, largest_file=3000)

    def load(self, path: Path) -> None:
        mz.load(path, model=self.model, optimizer=self.optimizer)


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(0)


@pytest.fixture
def saved(run: Run, tmp_path: Path) -> Path:
    run.save(tmp_path / "c")
    return tmp_path / "c"


def tensor_at(data: bytes, place: int) -> str | None:
    """The tensor that a byte of a safetensors file belongs to; None for the header."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        if start <= place < stop:
            return str(name)
    return None


def test_any_byte_of_any_file_that_changes_is_named(run: Run, saved: Path) -> None:
    rng = np.random.default_rng(0)
    paths = [path for path in sorted(saved.iterdir()) if not path.name.endswith("index.json")]
    flips = 0
    for path in paths:
        original = path.read_bytes()
        for place in rng.integers(0, len(original), FLIPS):
            flipped = bytearray(original)
            flipped[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            with pytest.raises(mz.CheckpointError) as raised:
                run.load(saved)
            said = str(raised.value)
            assert path.name in said, said
            if path.suffix == ".safetensors" and (name := tensor_at(original, int(place))):
                assert repr(name) in said, said
                with Checkpoint(saved) as found:
                    assert [path.name in each and repr(name) in each for each in found.verify()]
            flips += 1
        path.write_bytes(original)
    assert flips >= 500
    run.load(saved)


def shorten(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path: Path, _: Path) -> None:
    path.unlink()


def take_another_runs(path: Path, other: Path) -> None:
    shutil.copy(other / path.name, path)


def empty(path: Path, _: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("how", [shorten, lengthen, remove, take_another_runs, empty])
def test_whole_files_that_are_not_what_they_were(
    run: Run, saved: Path, tmp_path: Path, how: Callable[[Path, Path], None]
) -> None:
    Run(1).save(tmp_path / "other")  # other numbers, the same shapes
    tried = 0
    for name in sorted(each.name for each in saved.iterdir()):
        if name.endswith("index.json"):  # for others; not read here
            continue
        shutil.copytree(saved, tmp_path / "broken")
        how(tmp_path / "broken" / name, tmp_path / "other")
        path = tmp_path / "broken" / name
        same = path.exists() and filecmp.cmp(path, saved / name, shallow=False)
        if not same:  # some files are the same in both runs
            with pytest.raises(
                mz.CheckpointError, match=r"safetensors|checksums|manifest|no check"
            ):
                run.load(tmp_path / "broken")
            tried += 1
        shutil.rmtree(tmp_path / "broken")
    assert tried >= 5


def test_swapped_files_and_more_files(run: Run, saved: Path) -> None:
    first, second = sorted(saved.glob("model-*.safetensors"))[:2]
    (saved / "more.safetensors").write_bytes(b"who knows")  # nobody's business
    run.load(saved)
    first.rename(saved / "x"), second.rename(first), (saved / "x").rename(second)
    with pytest.raises(mz.CheckpointError, match=r"model-0000\d-of"):
        run.load(saved)
