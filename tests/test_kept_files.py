"""What is the user's stays as it is, whatever it is called: in folders of checkpoints."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mpizero
import mpizero_torch as mz
from mpizero import CheckpointError, World, checkpoint
from support.killed_calls import dies
from support.logged import Logged

ranks = pytest.mark.parallel([1, 2, 3])
once = pytest.mark.once


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The same on all ranks: rank 0's."""
    return Path(mpizero.init().broadcast_object(str(tmp_path)))


def save(path: Path, value: int, **options: Any) -> None:
    checkpoint.save(path, {"a": np.full(300, value), "value": value}, mpizero.init(), **options)


def loaded(path: Path) -> int:
    found = checkpoint.load(path, mpizero.init())
    assert (found["a"] == found["value"]).all()
    return int(found["value"])


def on_rank_0(world: World, action: Any) -> None:
    world.barrier()
    if world.rank == 0:
        action()
    world.barrier()


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder: files' bytes, where links lead; None for folders."""
    return {
        str(each.relative_to(folder)): os.readlink(each)
        if each.is_symlink()
        else (each.read_bytes() if each.is_file() else None)
        for each in sorted(folder.rglob("*"))
    }


# Names that a save could give, and names that only look like it.
ASIDES = (
    "c.old-good", "c.old-2025", "c.partial-x", "c.old-1f3a9c0d", "c.partial-1f3a9c0d",
    "c.old-0123456789abcdef", "c.partial-0123456789abcdef", "notes.old-2025", "c.old-",
)  # fmt: skip


@ranks
@pytest.mark.parametrize("what", ["copies", "other folders", "empty folders", "files", "links"])
def test_what_is_called_like_a_left_over_stays(place: Path, what: str) -> None:
    world = mpizero.init()
    save(place / "c", 1)

    def make() -> None:
        (place / "elsewhere").mkdir()
        (place / "elsewhere" / "thesis.tex").write_text("years")
        for name in ASIDES:
            if what == "copies":
                shutil.copytree(place / "c", place / name)
            elif what == "files":
                (place / name).write_text("mine")
            elif what == "links":
                (place / name).symlink_to("elsewhere")
            else:
                (place / name).mkdir()
                if what == "other folders":
                    (place / name / "manifest.json").write_text("{}")
                    (place / name / "unfinished.json").write_text(f'{{"name": "{name}"}}')

    on_rank_0(world, make)
    before = {name: each for name, each in contents(place).items() if name.split("/")[0] != "c"}
    world.barrier()
    save(place / "c", 2)
    assert checkpoint.exists(place / "c")
    mz.CheckpointManager(place)
    assert loaded(place / "c") == 2
    on_rank_0(world, lambda: shutil.rmtree(place / "c"))
    assert not checkpoint.exists(place / "c")
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        checkpoint.load(place / "c", world)
    save(place / "c", 3)
    after = {name: each for name, each in contents(place).items() if name.split("/")[0] != "c"}
    assert after == before


@once
def test_a_left_over_that_somebody_has_renamed_or_copied_is_his(tmp_path: Path) -> None:
    save(tmp_path / "c", 1)
    assert dies(lambda: save(tmp_path / "c", 2), 2, ["rename"])
    assert len(list(tmp_path.iterdir())) == 2  # the old one, put aside, and the new one
    mine = []
    for number, each in enumerate(sorted(tmp_path.iterdir())):
        for name in (f"c.kept-{number}", f"c.old-{number:016}", f"c.partial-{number:016}"):
            mine.append(tmp_path / name)
            shutil.copytree(each, tmp_path / name, symlinks=True)
    before = [contents(each) for each in mine]
    assert loaded(tmp_path / "c") == 1
    mz.CheckpointManager(tmp_path)
    save(tmp_path / "c", 3)
    assert [contents(each) for each in mine] == before
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "c", *mine])


@once
def test_what_somebody_puts_into_a_left_over_stays(tmp_path: Path) -> None:
    assert dies(lambda: save(tmp_path / "c", 1), 2, ["sync"])
    (left,) = tmp_path.iterdir()
    (left / "notes.txt").write_text("how it failed")
    (left / "more").mkdir()
    save(tmp_path / "c", 2)
    assert contents(left) == {"notes.txt": b"how it failed", "more": None}
    save(tmp_path / "c", 3)
    assert contents(left) == {"notes.txt": b"how it failed", "more": None}


def add(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def change(folder: Path) -> None:
    path = folder / "state.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def replace_by_link(folder: Path) -> None:
    (folder / "state.safetensors").rename(folder.parent / "archive")
    (folder / "state.safetensors").symlink_to(folder.parent / "archive")


def other_manifest(folder: Path) -> None:
    for each in folder.iterdir():
        each.unlink()
    (folder / "manifest.json").write_text('{"format": "of another tool"}')


REFUSED = {
    "a file more": (add, "not the checkpoint's .tokenizer.json"),
    "a folder more": (lambda f: (f / "logs").mkdir(), "not the checkpoint's .logs"),
    "a pipe more": (lambda f: os.mkfifo(f / "unfinished.json"), "checkpoint's .unfinished.json"),
    "a changed file": (change, "changed since .state.safetensors"),
    "a link for a file": (replace_by_link, "changed since .state.safetensors"),
    "another tool's manifest": (other_manifest, "is no checkpoint"),
}


@ranks
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("how", REFUSED)
def test_a_folder_with_more_than_a_checkpoint_is_not_replaced(
    place: Path, how: str, asynchronous: bool
) -> None:
    """Whether it was so when the save began, or has become so meanwhile."""
    world, (alter, said) = mpizero.init(), REFUSED[how]
    save(place / "c", 1)
    if not asynchronous:
        on_rank_0(world, lambda: alter(place / "c"))
        before = contents_without_reading_pipes(place)
        with pytest.raises(CheckpointError, match=said):
            save(place / "c", 2)
    else:
        part = checkpoint.shared_part("state", {"a": np.ones(9)}, world)
        job = checkpoint.Save(place / "c", world, [part], {})
        job.prepare()
        on_rank_0(world, lambda: alter(place / "c"))
        with pytest.raises(CheckpointError, match=said):
            job.write()
        before = contents_without_reading_pipes(place)
    assert contents_without_reading_pipes(place) == before
    world.barrier()
    assert sorted(each.name for each in place.iterdir() if each.name != "archive") == ["c"]


def contents_without_reading_pipes(folder: Path) -> Any:
    return {
        str(each.relative_to(folder)): each.read_bytes() if each.is_file() else "no file"
        for each in sorted(folder.rglob("*"))
    }


@once
def test_a_copy_of_a_checkpoint_may_be_replaced(tmp_path: Path) -> None:
    """By its content: the files' times are the copy's."""
    arrays = {"a": np.ones(30), "b": np.ones(30)}
    checkpoint.save(tmp_path / "a", {**arrays, "value": 1}, mpizero.init(), largest_file=100)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    assert "state.safetensors.index.json" in contents(tmp_path / "b")
    for each in (tmp_path / "b").iterdir():
        os.utime(each, (1, 1))
    save(tmp_path / "b", 2)
    assert (loaded(tmp_path / "a"), loaded(tmp_path / "b")) == (1, 2)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "b"]


@ranks
def test_a_link_stays_and_is_followed(place: Path) -> None:
    world = mpizero.init()
    save(place / "real", 1)
    on_rank_0(world, lambda: (place / "c").symlink_to("real"))
    save(place / "c", 2)
    assert os.readlink(place / "c") == "real" and loaded(place / "real") == 2

    def lead_to_others() -> None:
        (place / "c").unlink()
        (place / "home").mkdir()
        (place / "home" / "thesis.tex").write_text("years")
        (place / "c").symlink_to("home")
        (place / "new").symlink_to("not there yet")

    on_rank_0(world, lead_to_others)
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        save(place / "c", 3)
    assert contents(place / "home") == {"thesis.tex": b"years"}
    save(place / "new", 4)
    assert os.readlink(place / "new") == "not there yet" and loaded(place / "not there yet") == 4
    on_rank_0(world, lambda: (place / "ring").symlink_to("ring"))
    with pytest.raises(CheckpointError, match="leads nowhere"):
        save(place / "ring", 5)


# What a manager may remove.


def manager(place: Path, keep: int = 1) -> mz.CheckpointManager:
    return mz.CheckpointManager(place, keep=keep, model=torch.nn.Linear(2, 2))


def step(place: Path, number: int) -> Path:
    return place / f"step-{number:08}"


@ranks
def test_a_manager_removes_what_a_manager_has_saved_and_nothing_else(
    place: Path, logged: Logged
) -> None:
    world = mpizero.init()
    mz.save(step(place, 0), model=torch.nn.Linear(2, 2))  # by hand, to be kept
    first = manager(place, keep=9)
    for number in (1, 2, 3, 4, 5, 6):
        first.save(number)

    def alter() -> None:
        (step(place, 1) / "notes.txt").write_text("the one to compare with")
        (step(place, 1) / "plots").mkdir()
        path = step(place, 2) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        step(place, 3).rename(place / "best")
        step(place, 3).symlink_to("best")
        shutil.copytree(step(place, 4), place / "step-00000004.old-1")
        step(place, 5).rename(step(place, 7))  # under another name than it was saved
        step(place, 8).mkdir()
        (step(place, 8) / "thesis.tex").write_text("years")

    on_rank_0(world, alter)
    before = contents(place)
    world.barrier()
    with logged.at_level(logging.WARNING, "mpizero"):
        last = manager(place)
        for number in (9, 10, 11):
            last.save(number)
    world.barrier()
    after = contents(place)
    gone = {name for name in before if name not in after}
    assert {name.split("/")[0] for name in gone} == {f"step-{n:08}" for n in (1, 4, 6)}
    assert {k: v for k, v in after.items() if k.startswith("step-00000001")} == {
        "step-00000001": None,
        "step-00000001/notes.txt": b"the one to compare with",
        "step-00000001/plots": None,
    }
    assert {k: v for k, v in before.items() if k not in gone}.items() <= after.items()
    assert (step(place, 11) / "manifest.json").is_file() and not step(place, 10).exists()
    said = logged.messages
    if world.rank == 0:
        assert sum("step-00000002 stays: model.safetensors is not as saved" in s for s in said) == 1
        assert sum("step-00000001 is removed but for" in s and "notes" in s for s in said) == 1
    else:
        assert said == []


@ranks
def test_a_copied_run_is_managed_too(place: Path) -> None:
    """Bit for bit what a manager has saved under that name, though the files' times differ."""
    world = mpizero.init()
    first = manager(place / "a", keep=9)
    for number in (1, 2):
        first.save(number)
    on_rank_0(
        world, lambda: shutil.copytree(place / "a", place / "b", copy_function=shutil.copyfile)
    )
    second = manager(place / "b")
    assert second.restore_latest() == 2
    second.save(3)
    world.barrier()
    assert second.steps() == [3] and first.steps() == [1, 2]


@once
def test_a_manager_leaves_a_save_of_another_job_alone(tmp_path: Path) -> None:
    """Of one that runs, which an evaluation, say, must not disturb."""
    world = mpizero.init()
    part = checkpoint.shared_part("state", {"a": np.ones(9)}, world)
    job = checkpoint.Save(step(tmp_path, 7), world, [part], {})
    job.prepare()
    assert manager(tmp_path).restore_latest() is None
    job.write()
    assert checkpoint.exists(step(tmp_path, 7))
