"""Checkpoints of the core: what is saved is loaded, by any number of ranks, or refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import mpizero
from mpizero import ArgumentError, CheckpointError, World, checkpoint
from mpizero.checkpoint import files, mpi_io, progress, read, tree
from mpizero.checkpoint.folder import discard
from mpizero.checkpoint.format import DTYPES, TensorSpec, lay_out, parse_header
from support.killed_calls import dies
from support.logged import Logged
from support.placements import SEVERAL_NODES, Placement, placed

ranks = pytest.mark.parallel([1, 2, 3, 4])
once = pytest.mark.once


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same on all ranks: rank 0's."""
    return Path(mpizero.init().broadcast_object(str(tmp_path)))


def values(scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "w": (rng.normal(size=(300, 70)) * scale).astype(np.float32),
        "empty": np.empty((0, 3), np.float32),
        "half": rng.normal(size=5).astype(ml_dtypes.bfloat16),
        "scalar": np.array(2.5 * scale),
        "large": rng.integers(0, 9, 1_500_000),
    }


def part(world: World, color: int | None) -> World | None:
    return world if world.size == 1 else world.split(color)


def assert_equal(found: Any, expected: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


@ranks
@pytest.mark.parametrize("writer", ["posix", "mpi-io"])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("largest", [1 << 30, 100_000])
def test_what_is_saved_is_loaded(
    folder: Path, asynchronous: bool, largest: int, writer: str
) -> None:
    world = mpizero.init()
    state = mpizero.ShardedState.scatter(values(), world)
    plain = {"lr": 0.1, "past": [1, (2, None)], "array": values()["w"]}
    pending = checkpoint.save(
        folder / "c", {"model": state, "plain": plain}, world,
        asynchronous=asynchronous, largest_file=largest, writer=writer,
    )  # fmt: skip
    assert (pending is not None) == asynchronous
    if pending is not None:
        for flat in state.flats.values():  # what was saved is what was
            flat[...] = 0
        pending.wait()
        pending.wait()
    found = checkpoint.load(folder / "c", world)
    assert_equal(found["model"].gather(), values())
    assert found["plain"]["lr"] == 0.1 and found["plain"]["past"] == [1, (2, None)]
    np.testing.assert_array_equal(found["plain"]["array"], values()["w"])
    several = sorted(path.name for path in (folder / "c").glob("*.safetensors"))
    assert (len(several) > 1) == (largest < 1 << 30)
    assert not [each for each in folder.iterdir() if each.name != "c"]


@pytest.mark.parallel([2, 3, 4])
def test_any_number_of_ranks_loads_what_any_other_saved(folder: Path) -> None:
    world = mpizero.init()
    for saving in range(1, world.size + 1):
        savers = world.split(0 if world.rank < saving else None)
        if savers is not None:
            state = mpizero.ShardedState.scatter(values(saving), savers)
            checkpoint.save(folder / f"{saving}", {"model": state}, savers)
            savers.close()
        world.barrier()
        for loading in range(1, world.size + 1):
            loaders = world.split(0 if world.rank >= world.size - loading else None)
            if loaders is not None:
                found = checkpoint.load(folder / f"{saving}", loaders)
                assert_equal(found["model"].gather(), values(saving))
                loaders.close()


@ranks
def test_others_can_read_it(folder: Path) -> None:
    """By the library of the format's makers."""
    world = mpizero.init()
    arrays = {**values(), "bool": np.array([True, False])}
    del arrays["half"]  # numpy's loader knows no bfloat16
    checkpoint.save(folder / "c", arrays, world)
    assert_equal(load_file(folder / "c" / "state.safetensors"), arrays)


@ranks
@pytest.mark.parametrize("fails_in", ["create", "write_at", "sync", "rename"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_fails_leaves_what_was(
    folder: Path, fails_in: str, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = mpizero.init()
    checkpoint.save(folder / "c", {"a": values()["w"]}, world)
    # The array has three blocks of 4 MiB, so three ranks write.
    culprit = min(world.size, 3) - 1 if fails_in in ("write_at", "sync") else 0

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if world.rank == culprit:
            patch.setattr(files, fails_in, fail)
        with pytest.raises(CheckpointError, match=rf"rank {culprit}\].*No space left"):
            pending = checkpoint.save(
                folder / "c", {"a": values()["large"]}, world, asynchronous=asynchronous
            )
            if pending is not None:
                pending.wait()
    np.testing.assert_array_equal(checkpoint.load(folder / "c", world)["a"], values()["w"])
    assert [each.name for each in folder.iterdir()] == ["c"]
    checkpoint.save(folder / "c", {"a": values()["scalar"]}, world)
    assert checkpoint.load(folder / "c", world)["a"] == 2.5


@ranks
def test_a_collective_write_that_fails_on_one_rank(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By MPI-IO: the others go on to the end, and hear of it then."""
    world = mpizero.init()
    together = mpi_io.write_together

    def fail(comm: Any, path: Path, pieces: Any) -> None:
        together(comm, path, [])
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        if world.rank == world.size - 1:
            patch.setattr(mpi_io, "write_together", fail)
        with pytest.raises(CheckpointError, match=rf"rank {world.size - 1}\].*Input/output"):
            checkpoint.save(folder / "c", {"a": values()["large"]}, world, writer="mpi-io")
    assert list(folder.iterdir()) == []
    with pytest.raises(ArgumentError, match="writer"):
        checkpoint.save(folder / "c", {"a": 1}, world, writer="other")


@ranks
def test_what_mpi_cannot_open(folder: Path) -> None:
    world = mpizero.init()
    with pytest.raises(OSError, match="MPI-IO cannot open"):
        mpi_io.write_together(world.comm, folder / "nothing", [])


@once
def test_parallel_file_systems_are_known_by_their_mounts(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/a / ext4 rw 0 0\n"
        "10.0.0.1@o2ib:/data /data lustre rw 0 0\n"
        "disks /data/fast\\040disks gpfs rw 0 0\n"
    )
    for folder, kind in (
        ("/", "ext4"), ("/data", "lustre"), ("/data/a/b", "lustre"), ("/database", "ext4"),
        ("/data/fast disks/x", "gpfs"),
    ):  # fmt: skip
        assert mpi_io.file_system(Path(folder), str(mounts)) == kind
    assert mpi_io.file_system(tmp_path, str(tmp_path / "none")) == ""
    assert mpi_io.file_system(tmp_path) not in mpi_io.PARALLEL


@pytest.mark.parallel([2, 3, 4])
def test_what_one_rank_cannot_read_no_rank_goes_on_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = mpizero.init()
    checkpoint.save(folder / "c", {"a": values()["w"]}, world)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        if world.rank == 1:
            patch.setattr(files, "read_at", fail)
        with pytest.raises(CheckpointError, match=r"'a': .*Input/output error"):
            checkpoint.load(folder / "c", world)
    np.testing.assert_array_equal(checkpoint.load(folder / "c", world)["a"], values()["w"])


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("comes", [True, False])
def test_what_a_rank_does_not_see_yet_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    """As on a network's file system that another node has just written to."""
    world = mpizero.init()
    checkpoint.save(folder / "c", {"a": values()["w"]}, world)
    looks, stock = [], os.open

    def late(path: Any, *how: Any, **options: Any) -> int:
        if str(path).endswith(".safetensors"):
            looks.append(path)
            if not comes or len(looks) < 3:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return stock(path, *how, **options)

    with monkeypatch.context() as patch:
        if not comes:
            patch.setattr(read, "PATIENCE", 0.25)
        if world.rank == 1:
            patch.setattr(os, "open", late)
        if comes:
            found = checkpoint.load(folder / "c", world)
            np.testing.assert_array_equal(found["a"], values()["w"])
            assert len(looks) >= 3 * (world.rank == 1)
        else:
            with pytest.raises(CheckpointError, match=r"cannot be opened: No such file.*0\.25 s"):
                checkpoint.load(folder / "c", world)


@ranks
@pytest.mark.parametrize("refusal", [None, OSError(errno.EINVAL, "no advice here")])
def test_file_systems_need_not_take_advice(
    folder: Path, refusal: OSError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def advise(*advice: int) -> None:
        asked.append(advice)
        if refusal is not None:
            raise refusal

    world = mpizero.init()
    monkeypatch.setattr(files, "_ADVISE", advise)
    checkpoint.save(folder / "c", values(), world)
    assert_equal(checkpoint.load(folder / "c", world), values())
    assert asked
    monkeypatch.setattr(files, "_ADVISE", None)  # a system that has no such call
    checkpoint.save(folder / "c", values(), world)
    assert_equal(checkpoint.load(folder / "c", world), values())


@ranks
@pytest.mark.parametrize("writers", [1, 2])
def test_few_write_at_a_time(folder: Path, writers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world = mpizero.init()
    part = checkpoint.shared_part("state", {"large": values()["large"]}, world)
    job = checkpoint.Save(folder / "c", world, [part], {}, writers_per_node=writers)
    at_work = folder / "at work"
    at_work.mkdir(exist_ok=True)
    write_own, most = job.write_own, 0

    def watched() -> None:
        nonlocal most
        (at_work / str(world.rank)).touch()
        time.sleep(0.05)
        most = len(list(at_work.iterdir()))
        write_own()
        (at_work / str(world.rank)).unlink()

    monkeypatch.setattr(job, "write_own", watched)
    checkpoint.carry_out(job, world, False)
    assert 1 <= most <= writers
    with checkpoint.Checkpoint(folder / "c", world) as found:
        np.testing.assert_array_equal(found.read("state", "large"), values()["large"])
    with pytest.raises(ArgumentError, match="writers_per_node"):
        checkpoint.Save(folder / "d", world, [part], {}, writers_per_node=0)


@pytest.mark.parallel([3, 4])
@pytest.mark.parametrize("placement", SEVERAL_NODES, ids=str)
def test_few_of_each_node_write_at_a_time(
    folder: Path, placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes may have several turns, and others one: all wait for the same ones."""
    node = placement.node_of
    with placed(placement) as world:
        part = checkpoint.shared_part("state", {"large": values()["large"]}, world)
        job = checkpoint.Save(folder / "c", world, [part], {}, writers_per_node=1)
        at_work = folder / f"at work on {node[world.rank]}"
        at_work.mkdir(exist_ok=True)
        write_own, most = job.write_own, 0

        def watched() -> None:
            nonlocal most
            (at_work / str(world.rank)).touch()
            time.sleep(0.02)
            most = len(list(at_work.iterdir()))
            write_own()
            (at_work / str(world.rank)).unlink()

        monkeypatch.setattr(job, "write_own", watched)
        checkpoint.carry_out(job, world, False)
        assert most == 1
        with checkpoint.Checkpoint(folder / "c", world) as found:
            np.testing.assert_array_equal(found.read("state", "large"), values()["large"])


@ranks
def test_the_memory_of_copies_goes_to_the_next_save(folder: Path) -> None:
    world = mpizero.init()

    def save_half(scale: float) -> int:
        """Where the copy is; what is saved is what was, though it changes meanwhile."""
        state = mpizero.ShardedState.scatter({"x": values(scale)["w"]}, world)
        part = checkpoint.Part("state", *_of(state))
        job = checkpoint.Save(folder / "c", world, [part], {})
        job.prepare()
        job.copy()
        place = int(job._parts[0].pieces[0].values.ctypes.data)
        for flat in state.flats.values():
            flat[...] = 0
        job.write()
        with checkpoint.Checkpoint(folder / "c", world) as found:
            np.testing.assert_array_equal(found.read("state", "x"), values(scale)["w"])
        return place

    first = save_half(1.0)
    assert save_half(2.0) == first


def _of(state: mpizero.ShardedState) -> tuple[list[TensorSpec], list[checkpoint.Piece]]:
    own, elements = state.piece("x")
    return (
        [TensorSpec("x", own.dtype, state.shape("x"))],
        [checkpoint.Piece("x", elements.start, own)],
    )


@ranks
def test_long_ones_are_told_of_on_rank_zero(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    logged: Logged,
) -> None:
    world = mpizero.init()
    monkeypatch.setattr(progress, "_SECONDS_BEFORE_FIRST", -1.0)
    large = {"large": mpizero.ShardedState.scatter({"x": values()["large"]}, world)}
    with logged.at_level("INFO", "mpizero"):
        checkpoint.save(folder / "c", large, world)
        checkpoint.load(folder / "c", world)
        said, told = capfd.readouterr().err, [*logged.messages]
        pending = checkpoint.save(folder / "d", large, world, asynchronous=True)
        assert pending is not None
        pending.wait()
    if world.rank == 0:
        assert "saving" in said and "loading" in said and "%," in said
        assert len(told) == 2 and "c saved: 0.012 GB" in told[0] and "loaded" in told[1]
        assert "d saved: 0.012 GB" in logged.messages[-1]
    else:
        assert said == "" and told == []
    assert "saving" not in capfd.readouterr().err  # nobody waits for one in the background


@ranks
def test_there_is_none(folder: Path) -> None:
    world = mpizero.init()
    with pytest.raises(CheckpointError, match="There is no checkpoint at"):
        checkpoint.load(folder / "nothing", world)
    with pytest.raises(ArgumentError, match="object"):
        checkpoint.save(folder / "c", {"a": [object()]}, world)


@once
def test_a_cut_off_change_is_undone(tmp_path: Path) -> None:
    """Between the two renames: the old one has a name of the moment, the new one its first."""
    world = mpizero.init()
    checkpoint.save(tmp_path / "c", {"a": 1}, world)
    assert dies(lambda: checkpoint.save(tmp_path / "c", {"a": 2}, world), 2, ["rename"])
    assert not (tmp_path / "c").exists()
    assert checkpoint.load(tmp_path / "c", world) == {"a": 1}
    checkpoint.save(tmp_path / "c", {"a": 2}, world)
    assert [each.name for each in tmp_path.iterdir()] == ["c"]


@ranks
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_no_checkpoint_is_not_replaced(folder: Path, what: str) -> None:
    world = mpizero.init()
    precious = folder / "runs" / "thesis.tex" if what == "folder" else folder / "runs"
    if world.rank == 0:
        precious.parent.mkdir(exist_ok=True)
        precious.write_text("years")
    with pytest.raises(CheckpointError, match="runs is no checkpoint"):
        checkpoint.save(folder / "runs", {"a": 1}, world)
    assert precious.read_text() == "years"
    world.barrier()
    if world.rank == 0:
        shutil.rmtree(folder / "runs") if what == "folder" else precious.unlink()
        (folder / "runs").mkdir()
    world.barrier()
    checkpoint.save(folder / "runs", {"a": 1}, world)  # an empty folder is
    assert checkpoint.load(folder / "runs", world) == {"a": 1}


@once
def test_a_removal_that_is_cut_off_is_ended_by_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = mpizero.init()
    for name in ("a", "b"):
        checkpoint.save(tmp_path / name, {"a": 1}, world)
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        patch.setattr(files, "remove", fail)
        discard(tmp_path / "a")
        checkpoint.save(tmp_path / "b", {"a": 2}, world)  # and what it replaces
    assert len(checkpoint.leftovers(tmp_path)) == 2
    for name in ("a", "b"):
        assert checkpoint.exists(tmp_path / name) == (name == "b")
        checkpoint.save(tmp_path / name, {"a": 3}, world)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "b"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Of one process, several files."""
    kept = {name: array for name, array in values().items() if name != "large"}
    checkpoint.save(tmp_path / "c", kept, mpizero.init(), largest_file=50_000)
    return tmp_path / "c"


@once
def test_any_byte_that_changes_is_noticed(saved: Path) -> None:
    world = mpizero.init()
    rng = np.random.default_rng(0)
    for path in sorted(saved.iterdir()):
        if path.name.endswith("index.json"):  # for others; not read here
            continue
        original = path.read_bytes()
        for place in rng.integers(0, len(original), 150):
            flipped = bytearray(original)
            flipped[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=r"safetensors|manifest|checksums"):
                checkpoint.load(saved, world)
        path.write_bytes(original)
    assert checkpoint.load(saved, world)["scalar"] == 2.5


@once
def test_damage_names_file_and_tensor(saved: Path) -> None:
    path = max(saved.glob("*.safetensors"), key=lambda each: each.stat().st_size)
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{path.name} is damaged at tensor 'w'"):
        checkpoint.load(saved, mpizero.init())
    with checkpoint.Checkpoint(saved) as found:
        assert len(found.verify()) == 1 and "'w'" in found.verify()[0]


def rewrite(folder: Path, change: Any) -> None:
    """Change the manifest, and let its checksum fit."""
    from mpizero.checkpoint.manifest import _checksum

    path = folder / "manifest.json"
    body = json.loads(path.read_text())
    del body["crc32"]
    change(body)
    path.write_text(json.dumps({**body, "crc32": _checksum(body)}))


CRAFTED = {
    "another folder": lambda b: b["files"][0].update(name="../../etc/passwd"),
    "an absolute path": lambda b: b["files"][0].update(name="/etc/passwd.safetensors"),
    "no such file": lambda b: b["files"][0].update(name="other.safetensors"),
    "a file twice": lambda b: b["files"].append(b["files"][0]),
    "a file less": lambda b: b["files"].pop(),
    "a huge file": lambda b: b["files"][0].update(bytes=1 << 60),
    "a negative size": lambda b: b["files"][0].update(bytes=-1),
    "no number": lambda b: b["files"][0].update(bytes="9"),
    "huge checksums": lambda b: b["checksums"].update(bytes=1 << 60),
    "a later version": lambda b: b.update(version=2),
    "another format": lambda b: b.update(format="pickle"),
    "no files": lambda b: b.pop("files"),
    "a strange value": lambda b: b["values"].update(x={"$call": "os.system"}),
    "a wrong value": lambda b: b["values"].update(x={"$counter": 3}),
    "no such tensor": lambda b: b["values"].update(x={"$array": "nothing"}),
    "deep lists": lambda b: b["values"].update(x=nested(600, lambda x: [x])),
    "deep tables": lambda b: b["values"].update(x=nested(200, lambda x: {"$tuple": [x]})),
    "lists that are a little too deep": lambda b: b["values"].update(x=nested(101, lambda x: [x])),
}


def nested(depth: int, within: Any) -> Any:
    value = 0
    for _ in range(depth):
        value = within(value)
    return value


@once
@pytest.mark.parametrize("how", CRAFTED)
def test_crafted_manifests_are_refused(saved: Path, how: str) -> None:
    rewrite(saved, CRAFTED[how])
    with pytest.raises((CheckpointError, ArgumentError)):
        checkpoint.load(saved, mpizero.init())


@ranks
def test_deep_values_are_refused_on_all_ranks(folder: Path) -> None:
    """What a rank cannot pickle, or walk through, it cannot tell the others either."""
    world = mpizero.init()
    deepest = nested(100, lambda x: [x])
    checkpoint.save(folder / "c", {"x": deepest, "y": nested(99, lambda x: {1: x})}, world)
    assert checkpoint.load(folder / "c", world)["x"] == deepest
    if world.rank == 0:
        rewrite(folder / "c", CRAFTED["deep lists"])
    with pytest.raises(ArgumentError, match="nested more than 100 deep"):
        checkpoint.save(folder / "d", {"x": [deepest]}, world)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged.*nested"):
        checkpoint.load(folder / "c", world)
    assert world.allreduce(1) == world.size
    assert not (folder / "d").exists()


@once
def test_links_are_not_followed(saved: Path) -> None:
    path = next(iter(saved.glob("*.safetensors")))
    path.rename(saved.parent / "elsewhere")
    path.symlink_to(saved.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        checkpoint.load(saved, mpizero.init())


HEADERS = {
    "a gap": {"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}},
    "an overlap": {
        "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
    },
    "a wrong size": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 3]}},
    "a negative shape": {"a": {"dtype": "U8", "shape": [-3, -1], "data_offsets": [0, 3]}},
    "a huge shape": {"a": {"dtype": "U8", "shape": [1 << 62, 4], "data_offsets": [0, 3]}},
    "a true shape": {"a": {"dtype": "U8", "shape": [3, True], "data_offsets": [0, 3]}},
    "an unknown dtype": {"a": {"dtype": "PICKLE", "shape": [3], "data_offsets": [0, 3]}},
    "an impossible shape of no elements": {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "U8", "shape": [0, 1 << 80], "data_offsets": [3, 3]},
    },
    "too many axes": {"a": {"dtype": "U8", "shape": [3, *[1] * 99], "data_offsets": [0, 3]}},
    "no table": {"a": 3},
    "too short": {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}},
}


@once
@pytest.mark.parametrize("how", HEADERS)
def test_crafted_headers_are_refused(how: str) -> None:
    text = json.dumps(HEADERS[how]).encode()
    header = len(text).to_bytes(8, "little") + text
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        parse_header("model.safetensors", len(header) + 3, header)


@once
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
        max_size=8,
    ),
    st.integers(1, 400),
)
def test_layouts_are_what_their_headers_say(
    tensors: list[tuple[str, list[int]]], largest: int
) -> None:
    specs = [TensorSpec(f"t{i}", DTYPES[d], tuple(s)) for i, (d, s) in enumerate(tensors)]
    found = lay_out("model", specs, largest)
    assert sorted(name for file in found for name in file.specs) == sorted(s.name for s in specs)
    for file in found:
        assert parse_header(file.name, file.nbytes, file.header).starts == file.starts
        for name, start in file.starts.items():
            assert start % file.specs[name].dtype.itemsize == 0


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner)
        | st.dictionaries(st.text(), inner).map(OrderedDict)
        | st.dictionaries(st.integers(), st.integers()).map(Counter)
        | st.sets(st.integers(0, 4))  # whose order is that of their size
    ),
    max_leaves=10,
)


@once
@given(plain)
def test_plain_values_come_back(value: Any) -> None:
    arrays: dict[str, Any] = {}
    text = json.dumps(tree.encode(value, "x", arrays), allow_nan=False)
    found = tree.decode(json.loads(text), arrays.__getitem__)
    assert repr(found) == repr(value) and type(found) is type(value)  # repr: nan is not nan
