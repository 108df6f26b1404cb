"""A process dies at any call of a save or a removal: what there was is there, or what is to be.

And nothing of the user's is touched by the mending.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpizero
from mpizero import checkpoint
from mpizero.checkpoint import folder, notes
from support.killed_calls import deaths, dies

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def _in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk: processes die here, and no machines."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def save(path: Path, value: int, **options: Any) -> None:
    array = np.full(30, value)
    part = checkpoint.shared_part("state", {"a": array, "b": array}, mpizero.init())
    job = checkpoint.Save(path, mpizero.init(), [part], {"value": value}, **options)
    checkpoint.carry_out(job, mpizero.init(), False)


def value(path: Path) -> Any:
    """What a checkpoint holds, all of it read; None if there is none."""
    if not checkpoint.exists(path):
        return None
    with checkpoint.Checkpoint(path) as found:
        assert not found.verify()
        assert (found.read("state", "b") == found.values["value"]).all()
        return found.values["value"]


def names(parent: Path) -> list[str]:
    return sorted(each.name for each in parent.iterdir())


@pytest.fixture
def place(tmp_path: Path) -> Callable[[], Path]:
    """A new folder, of which the user has things called like ours."""

    def make() -> Path:
        parent = tmp_path / "runs"
        if parent.exists():
            shutil.rmtree(parent)
        for name in USERS:
            (parent / name).mkdir(parents=True)
            (parent / name / "thesis.tex").write_text("years")
        return parent

    return make


# A copy that was kept, and names as long as ours.
USERS = ("c.old-good", "c.old-0123456789abcdef", "c.partial-0123456789abcdef")


def assert_users_are_there(parent: Path) -> None:
    for name in USERS:
        assert (parent / name / "thesis.tex").read_text() == "years"


def test_a_first_save_is_cut_off(place: Callable[[], Path]) -> None:
    parent, count = place(), 0
    for _ in deaths(lambda: save(parent / "c", 1)):
        count += 1
        assert value(parent / "c") in (None, 1)
        save(parent / "c", 2)
        assert value(parent / "c") == 2
        assert names(parent) == sorted(["c", *USERS])
        assert_users_are_there(parent)
        place()
    assert count > 20


@pytest.mark.parametrize("as_read_first", [False, True])
def test_an_exchange_is_cut_off(place: Callable[[], Path], as_read_first: bool) -> None:
    """``as_read_first``: somebody loads it before it is saved again."""
    parent, seen = place(), []
    several = {"largest_file": 100} if as_read_first else {}
    save(parent / "c", 1, **several)
    for _ in deaths(lambda: save(parent / "c", 2, **several)):
        if as_read_first:
            seen.append(value(parent / "c"))
            assert seen[-1] in (1, 2)
        save(parent / "c", 3)
        assert value(parent / "c") == 3
        assert names(parent) == sorted(["c", *USERS])
        assert names(parent / "c") == ["checksums.bin", "manifest.json", "state.safetensors"]
        assert_users_are_there(parent)
        save(place() / "c", 1, **several)
    if as_read_first:
        assert seen == sorted(seen) and set(seen) == {1, 2}


@pytest.mark.parametrize("of_users", [[], ["notes.txt"]])
def test_a_removal_is_cut_off(place: Callable[[], Path], of_users: list[str]) -> None:
    """With something of the user's in the folder it keeps its name, and the rest goes."""

    def make() -> Path:
        parent = place()
        save(parent / "c", 1)
        for name in of_users:
            (parent / "c" / name).write_text("mine")
        return parent

    parent, count = make(), 0
    for _ in deaths(lambda: folder.discard(parent / "c")):
        count += 1
        assert value(parent / "c") in (None, 1)
        folder.tidy(parent)
        folder.discard(parent / "c")
        assert names(parent) == sorted([*(["c"] if of_users else []), *USERS])
        for name in of_users:
            assert names(parent / "c") == [name]
            assert (parent / "c" / name).read_text() == "mine"
        assert_users_are_there(parent)
        make()
    assert count > 8


def test_an_old_one_that_was_put_aside_is_not_removed_as_long_as_there_is_no_other(
    place: Callable[[], Path],
) -> None:
    """Somebody makes a folder in its place before it is given back."""
    parent = place()
    save(parent / "c", 1)
    assert dies(lambda: save(parent / "c", 2), 2, ["rename"])
    (parent / "c").mkdir()
    folder.tidy(parent)
    folder.remove_leftovers(parent / "c")
    (parent / "c").rmdir()
    assert value(parent / "c") == 1


def test_what_somebody_is_at_work_on_stays(tmp_path: Path) -> None:
    """Another save of the same checkpoint, here or in another job: each comes to its end."""
    world = mpizero.init()
    part = checkpoint.shared_part("state", {"a": np.ones(3)}, world)
    first = checkpoint.Save(tmp_path / "c", world, [part], {"value": 1})
    first.prepare()
    assert notes.leftovers(tmp_path) == []
    folder.tidy(tmp_path)
    save(tmp_path / "c", 2)
    assert value(tmp_path / "c") == 2
    first.write()
    with checkpoint.Checkpoint(tmp_path / "c") as found:
        assert found.values == {"value": 1}
    assert names(tmp_path) == ["c"]


def test_notes_are_what_they_were_or_none() -> None:
    note = notes.Note("c.old-12", "c", {"a.bin": (3, 1_700_000_000_123_456_789), "b": None})
    text = note.to_json()
    assert notes.Note.parse(text) == note
    for at in range(len(text)):
        flipped = bytearray(text)
        flipped[at] ^= 1
        assert notes.Note.parse(bytes(flipped)) is None
    for name in ("..", "a/b", "", "/etc/passwd"):
        assert notes.Note.parse(notes.Note("c", "c", {name: None}).to_json()) is None
        assert notes.Note.parse(notes.Note("c", name, {}).to_json()) is None
    for other in (b"", b"{}", b"[]", b"null", b"{" * 100_000):
        assert notes.Note.parse(other) is None


def test_a_child_of_a_fork_holds_nothing(tmp_path: Path) -> None:
    """A DataLoader's worker lives on for a while when its rank has been killed."""
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go[1])
        job = checkpoint.Save(tmp_path / "c", mpizero.init(), [], {})
        job.prepare()
        if os.fork() == 0:
            os.write(ready[1], b"x")
            os.read(go[0], 1)  # until the test is over
            os._exit(0)
        os.read(ready[0], 1)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        assert len(notes.leftovers(tmp_path)) == 1
        folder.tidy(tmp_path)
        assert names(tmp_path) == []
    finally:
        for end in (*ready, *go):
            os.close(end)
