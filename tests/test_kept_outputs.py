"""What stands where a command, a trace or a table is to be written stays, unless it is ours."""

from __future__ import annotations

import gc
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from matplotlib import pyplot

import mpizero
import mpizero_torch as mz
from mpizero import ArgumentError, checkpoint, diagnostics, outputs
from mpizero.cli import main
from mpizero.cli.outputs import write_picture
from mpizero.collectives import tuning
from mpizero.collectives.tuning import ALL_BYTES, Tuning
from mpizero_torch.sharding.offload import StateOnDisk

once = pytest.mark.once
ranks = pytest.mark.parallel([1, 2, 3])

MINE = b'{"mine": "years of work"}'

PLAN = ("plan", "--parameters", "1e6", "--plot")
BENCH = ("bench", "--to", "4", "--seconds", "0.001", "--algorithm", "auto")
COMMANDS = {
    "plan --plot": (*PLAN, "out.png"),
    "bench --json": (*BENCH, "--json", "out.json"),
    "bench --plot": (*BENCH, "--plot", "out.pdf"),
    "trace --merge": ("trace", "summary", "traces", "--merge", "out.json"),
    "trace --plot": ("trace", "summary", "traces", "--plot", "out.png"),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The same on all ranks: rank 0's."""
    return Path(mpizero.init().broadcast_object(str(tmp_path)))


@once
@pytest.mark.parametrize("how", COMMANDS)
def test_commands_write_over_their_own_outputs_only(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if how.startswith("trace"):
        with mz.trace(tmp_path / "traces"), diagnostics.recorder().span("forward"):
            pass
    out = tmp_path / COMMANDS[how][-1]
    out.write_bytes(MINE)
    refused = CliRunner().invoke(main, COMMANDS[how])
    assert refused.exit_code == 1 and "something else" in refused.output, refused.output
    assert out.read_bytes() == MINE
    out.unlink()
    out.symlink_to("target")
    (tmp_path / "target").write_bytes(MINE)
    assert CliRunner().invoke(main, COMMANDS[how]).exit_code == 1
    assert (tmp_path / "target").read_bytes() == MINE
    out.unlink()
    for _ in range(2):  # once anew, and once over its own
        done = CliRunner().invoke(main, COMMANDS[how])
        assert done.exit_code == 0, done.output
        assert out.stat().st_size > 50
    left = {"target", out.name, *(["traces"] if how.startswith("trace") else [])}
    assert {each.name for each in tmp_path.iterdir()} == left


@once
@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf", ".eps", ".ps", ""])
def test_pictures_are_known_again(tmp_path: Path, ending: str) -> None:
    figure, _ = pyplot.subplots()
    path = tmp_path / f"a{ending or '.png'}"
    for _ in range(2):
        write_picture(figure, tmp_path / f"a{ending}", "plan")
    assert outputs.is_marked(path.read_bytes()) and list(tmp_path.iterdir()) == [path]
    figure.savefig(path)  # somebody else's
    assert not outputs.is_marked(path.read_bytes())
    pyplot.close(figure)


@once
def test_an_output_is_whole_and_takes_over_what_was_allowed(tmp_path: Path) -> None:
    def write(data: bytes, path: Path) -> None:
        outputs.write(path, data, lambda found: found.startswith(b"ours"), "f()", "out")

    path = tmp_path / "a"
    path.touch(0o600)  # holds nothing
    write(b"ours", path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write(b"ours, too", path)
    assert path.read_bytes() == b"ours, too" and list(tmp_path.iterdir()) == [path]
    write(b"ours", Path("/dev/null"))
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(ArgumentError, match="a folder"):
        write(b"ours", tmp_path)
    path.write_bytes(b"mine")
    with pytest.raises(ArgumentError, match=r"f\(\): argument 'out' is .*a', which holds"):
        write(b"ours", path)
    assert path.read_bytes() == b"mine"
    draft = tmp_path / "draft"
    draft.write_bytes(b"ours")
    with pytest.raises(FileExistsError):
        outputs.put(draft, path)  # it has come since
    assert path.read_bytes() == b"mine"


@once
@pytest.mark.parametrize("fails", [False, True])
def test_an_export_leaves_its_neighbours(tmp_path: Path, fails: bool) -> None:
    checkpoint.save(tmp_path / "c", {"a": np.ones(9)}, mpizero.init())
    for name in ("out.partial", "out.tmp"):
        (tmp_path / name).write_bytes(MINE)
    (tmp_path / "nowhere").symlink_to("nothing")
    if fails:
        file = tmp_path / "c" / "state.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    export = ("checkpoint", "export", str(tmp_path / "c"), "--part", "state")
    result = CliRunner().invoke(main, [*export, str(tmp_path / "out")])
    assert result.exit_code == fails, result.output
    for name in ("out.partial", "out.tmp"):
        assert (tmp_path / name).read_bytes() == MINE
    there = {"c", "nowhere", "out.partial", "out.tmp", *([] if fails else ["out"])}
    assert {each.name for each in tmp_path.iterdir()} == there
    assert CliRunner().invoke(main, [*export, str(tmp_path / "nowhere")]).exit_code == 1
    assert os.readlink(tmp_path / "nowhere") == "nothing"


def as_file(path: Path) -> None:
    path.write_bytes(MINE)


def as_profile(path: Path) -> None:
    """Of another tool that writes the same format."""
    path.write_text('[\n{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}}]')


def as_link(path: Path) -> None:
    (path.parent / "precious").write_bytes(MINE)
    path.symlink_to("precious")


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


@ranks
@pytest.mark.parametrize("make", [as_file, as_profile, as_link, as_pipe])
def test_a_trace_is_written_over_earlier_traces_only(
    place: Path, make: Callable[[Path], None]
) -> None:
    """Of one rank there is another file: no rank has written anything then, and all are told."""
    world = mpizero.init()
    with mz.trace(place):
        world.allreduce(1)
    world.barrier()
    path = place / f"trace-rank-{world.size - 1:04}.json"
    if world.rank == 0:
        path.unlink()
        make(path)
    world.barrier()
    before = {p.name: p.read_bytes() for p in place.iterdir() if p.is_file()}
    with pytest.raises(ArgumentError, match=r"argument 'folder'"), mz.trace(place):
        raise AssertionError("a trace has begun")
    assert {p.name: p.read_bytes() for p in place.iterdir() if p.is_file()} == before
    world.barrier()
    if world.rank == 0:
        path.unlink()
    world.barrier()
    with mz.trace(place):
        world.allreduce(1)
    assert json.loads((place / f"trace-rank-{world.rank:04}.json").read_text())[-1] == {}


@once
@pytest.mark.parametrize("text", ['{"mine": 1}', "a list of things", "[1]", '{"a": {"rules": 1}}'])
def test_a_table_is_kept_in_a_file_of_tables(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, table = tmp_path / "notes.json", Tuning({"x": ((ALL_BYTES, "ring"),)}, 7, "tuned")
    monkeypatch.setenv("MPIZERO_TUNING", str(path))
    path.write_text(text)
    (tmp_path / f"notes.{os.getpid()}").write_bytes(MINE)
    for write in (tuning.check_file, lambda: tuning.save(table, 2, 1)):
        with pytest.raises(ArgumentError, match="MPIZERO_TUNING"):
            write()
    assert path.read_text() == text
    path.rename(tmp_path / "elsewhere")
    path.symlink_to("real")
    for ranks_per_node in (2, 4):
        assert tuning.save(table, ranks_per_node, 1) == path
    assert os.readlink(path) == "real" and len(json.loads(path.read_text())) == 2
    assert (tmp_path / f"notes.{os.getpid()}").read_bytes() == MINE


@ranks
def test_what_somebody_puts_beside_offloaded_state_stays(place: Path) -> None:
    world = mpizero.init()
    (place / "1.bin").write_bytes(MINE)
    (place / "mpizero-state-mine").mkdir(exist_ok=True)
    aside = StateOnDisk(place)
    state = {name: aside.keep(torch.full((9,), 2.0)) for name in ("a", "b", "c")}
    own = aside._folder
    first, second, _ = sorted(own.iterdir())
    (own / "notes.txt").write_bytes(MINE)
    second.unlink()
    second.write_bytes(MINE)  # in the place of a file of ours
    assert all((value == 2).all() for value in state.values())
    child = os.fork()
    if child == 0:  # whose copies die, too
        del aside
        gc.collect()
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert first.exists()
    del aside
    gc.collect()
    assert {each.name: each.read_bytes() for each in own.iterdir()} == {
        second.name: MINE, "notes.txt": MINE,
    }  # fmt: skip
    world.barrier()
    assert (place / "1.bin").read_bytes() == MINE and (place / "mpizero-state-mine").is_dir()
