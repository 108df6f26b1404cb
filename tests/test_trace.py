"""Timelines: what they hold, and what the summary makes of them."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import mpizero_torch as mz
from mpizero import diagnostics
from mpizero.cli import main
from mpizero.diagnostics.clocks import offset_to_root
from mpizero.diagnostics.summary import common, length, read_events, summarise, union
from support.launch import mpirun


def shared_folder(tmp_path: Path) -> Path:
    return Path(mz.init().broadcast_object(str(tmp_path)))


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("stage", [None, 2])
def test_a_step_is_on_the_timeline(tmp_path: Path, stage: int | None) -> None:
    world, folder = mz.init(), shared_folder(tmp_path)
    model: nn.Module = nn.Linear(8, 8)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if stage is None:
        model = mz.DistributedDataParallel(model)
    else:
        model, optimizer = mz.zero(model, optimizer, stage=stage)
    with mz.trace(folder):
        for _ in range(2):
            model(torch.ones(2, 8)).sum().backward()
            optimizer.step()
        if world.rank == world.size - 1:
            time.sleep(0.3)
        world.allreduce(np.ones(1000, np.float32))
    world.barrier()
    model(torch.ones(2, 8)).sum().backward()  # is no longer on it
    events = [e for e in read_events(folder) if e["ph"] == "X"]
    mine = [event for event in events if event["pid"] == world.rank]
    names = [event["name"] for event in mine if event["cat"] == "program"]
    assert names.count("forward") == 2 and names.count("optimizer") == 2
    # A single replica is left to torch: no hooks, no span of ours.
    assert names.count("backward") == (0 if world.size == 1 and stage is None else 2)
    assert all(event["dur"] >= 0 for event in mine)
    if world.size == 1:
        return
    (call,) = [e for e in mine if e["name"] == "allreduce"]
    assert call["args"]["bytes"] == 4000 and "test_trace.py:" in call["args"]["line"]
    summaries = {each.rank: each for each in summarise(events)}
    slow = world.size - 1
    assert summaries[slow].caused > 0.25 * slow
    for rank in range(slow):
        assert summaries[rank].exposed > 0.25 and summaries[rank].caused < summaries[slow].caused


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("per_node", [None, "1"])
def test_every_collective_has_its_size_and_algorithm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_node: str | None
) -> None:
    """Blocking ones, those that go by a plan from the second time on, and the engine's."""
    if per_node is not None:  # the ranks are emulated nodes
        monkeypatch.setenv("MPIZERO_RANKS_PER_NODE", per_node)
    folder, world = shared_folder(tmp_path), mz.init().split(0)
    assert world is not None
    layer = nn.Linear(8, 8)
    plain = torch.optim.SGD(layer.parameters(), lr=0.1)
    model, optimizer = mz.zero(layer, plain, 2, world=world)
    able = world.algorithms("all_reduce")
    small, large = np.ones(8, np.float32), np.ones(1 << 16, np.float32)
    rows = np.ones((world.size, 4))
    with mz.trace(folder):
        for algorithm in ("auto", *able):
            for array in (small, large, world.allocate(1 << 14, np.float32)):
                for _ in range(2):
                    world.allreduce(array, "max", algorithm=algorithm)
        world.reduce_scatter(rows, algorithm="ring")
        world.allgather(rows[0], algorithm="ring")
        world.broadcast(small)
        world.all_to_all(rows)
        world.gather(rows[0])
        world.scatter(rows.reshape(-1) if world.rank == 0 else None, out=np.empty(4))
        world.reduce(large)
        world.allreduce(large, asynchronous=True).wait()
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    world.close()
    events = [e for e in read_events(folder) if e["ph"] == "X"]
    mine = [e for e in events if e["pid"] == mz.init().rank and "args" in e]
    calls = [e["args"] for e in mine if e["cat"] in ("blocking", "asynchronous")]
    assert all("test_trace.py:" in e["args"]["line"] for e in mine if e["args"]["line"])
    known = (*able, "direct")
    for call in calls:
        assert call.get("algorithm") in (known if call["bytes"] else (None, *known)), call
    for algorithm in able:
        named = [each for each in calls if f"max, {algorithm})" in each["call"]]
        assert len(named) == 6 and {each["algorithm"] for each in named} == {algorithm}
        assert {each["bytes"] for each in named} == {32, 1 << 18, 1 << 16}
    auto = [each for each in calls if "max, auto)" in each["call"]]
    assert len(auto) == 6 and auto[0]["algorithm"] == auto[1]["algorithm"]
    ours = [each for each in calls if "(" not in each["call"]]
    assert any("the gradients from" in e["call"] and e["bytes"] for e in ours)
    ends = [each for each in ours if "of a backward pass" in each["call"]]
    assert len(ends) == 2 and all(each["bytes"] and each["algorithm"] for each in ends)


@pytest.mark.parallel([2, 4])
def test_one_trace_at_a_time_and_nothing_without(tmp_path: Path) -> None:
    folder = shared_folder(tmp_path)
    second = mz.trace(folder / "b")
    with mz.trace(folder / "a"), pytest.raises(mz.ArgumentError, match="one trace"), second:
        pass
    assert diagnostics.recorder().listener is None


@pytest.mark.parallel([2, 3, 4])
def test_clocks_of_one_machine_agree() -> None:
    """Nodes that only pretend to be several have the same clock: the estimate must be small."""
    world = mz.init()
    assert abs(offset_to_root(world)) < 50e6


def test_a_whole_job_by_variable_and_the_summary(tmp_path: Path) -> None:
    program = """
    import numpy as np, torch, mpizero_torch as mz
    world = mz.init()
    model = mz.DistributedDataParallel(torch.nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    """
    env = {"MPIZERO_TRACE": str(tmp_path / "t"), "MPIZERO_RANKS_PER_NODE": "2"}
    result = mpirun(4, program, env=env)
    assert result.returncode == 0, result.stderr
    run = CliRunner().invoke
    plot, merged = tmp_path / "t.png", tmp_path / "all.json"
    options = ["--plot", str(plot), "--merge", str(merged)]
    shown = run(main, ["trace", "summary", str(tmp_path / "t"), *options])
    assert shown.exit_code == 0, shown.output
    heads = shown.output.splitlines()[0].split()
    assert heads[2:5] == ["forward", "backward", "optimizer"]
    assert "exposed communication:" in shown.output and "waited longest for rank" in shown.output
    assert plot.stat().st_size > 1000
    assert len({e["pid"] for e in json.loads(merged.read_text())["traceEvents"]}) == 4
    found = json.loads(run(main, ["trace", "summary", str(tmp_path / "t"), "--json"]).output)
    assert [each["rank"] for each in found] == [0, 1, 2, 3]
    assert all(each["spans"]["optimizer"] > 0 for each in found)
    none = run(main, ["trace", "summary", str(tmp_path)])
    assert none.exit_code == 1 and "MPIZERO_TRACE" in none.output


def slice_of(rank: int, kind: str, start: float, end: float, **told: Any) -> dict[str, Any]:
    return {
        "ph": "X", "name": told.pop("name", kind), "cat": kind, "pid": rank, "tid": 1,
        "ts": start * 1e6, "dur": (end - start) * 1e6, "args": told,
    }  # fmt: skip


def test_the_summary_of_a_known_timeline() -> None:
    call = {"ranks": "0-1", "sequence": 1, "bytes": 100}
    events = [
        slice_of(0, "program", 0, 4, name="forward"),
        slice_of(0, "asynchronous", 2, 6, **call),
        slice_of(0, "wait", 2, 5),
        slice_of(0, "waiting", 4, 6),
        slice_of(1, "program", 0, 5, name="forward"),
        slice_of(1, "asynchronous", 5, 6, **call),
    ]
    first, second = summarise(events)
    assert (first.total, first.exposed, first.overlapped) == (6, 2, 2)
    assert (first.waiting, first.moving, first.nbytes) == (3, 1, 100)
    assert (first.caused, second.caused) == (0, 3)


def test_time_that_overlaps_counts_once() -> None:
    assert union([(3, 4), (0, 2), (1, 3)]) == [(0, 4)]
    assert common([(0, 2), (3, 5)], [(1, 4)]) == [(1, 2), (3, 4)]
    assert length([(0, 2), (3, 5)]) == 4


def test_a_trace_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    text = '[\n{"ph": "X", "pid": 0, "name": "forward"},\n{"ph": "X", "pi'
    (tmp_path / "trace-rank-0000.json").write_text(text)
    assert len(read_events(tmp_path)) == 1


def _profiled(path: Path) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        torch.ones(5, 5).sum()
    profiled.export_chrome_trace(str(path))


@pytest.mark.once
def test_traces_of_torchs_profiler_are_put_together(tmp_path: Path) -> None:
    files = [tmp_path / "profile-0.json", tmp_path / "profile-1.json.gz"]
    for file in files:
        _profiled(file)
    out = tmp_path / "all.json"
    command = ["trace", "merge", *map(str, files), "--out", str(out)]
    for _ in range(2):  # over its own output, too
        assert CliRunner().invoke(main, command).exit_code == 0
    events = json.loads(out.read_text())["traceEvents"]
    sums = [event for event in events if event.get("name") == "aten::ones"]
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    assert [names[event["pid"]].split(":")[0] for event in sums] == ["rank 0", "rank 1"]
    assert sums[0]["ts"] + sums[0]["dur"] <= sums[1]["ts"] < 60e6  # the second was made later
    with gzip.open(files[1], "rt") as file:
        assert sums[1]["dur"] in [event.get("dur") for event in json.load(file)["traceEvents"]]


@pytest.mark.once
def test_what_is_no_trace_of_one_rank_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "notes-0.json"
    other.write_text('{"traceEvents": 3}')
    first, second = tmp_path / "a-1.json", tmp_path / "b-1.json"
    for file in (first, second, tmp_path / "nameless.json"):
        file.write_text('[{"ph": "X", "ts": 1, "dur": 1, "pid": 1}]')
    cut_off = tmp_path / "cut-0.json.gz"
    cut_off.write_bytes(gzip.compress(b"[]" * 1000)[:-20])
    out = str(tmp_path / "all.json")
    for files, said in (
        ([cut_off], "traces in Chrome's format"),
        ([other], "traces in Chrome's format"),
        ([first, second], "both of rank 1"),
        ([tmp_path / "nameless.json"], "of which rank"),
    ):
        refused = CliRunner().invoke(main, ["trace", "merge", *map(str, files), "--out", out])
        assert refused.exit_code != 0 and said in refused.output
    refused = CliRunner().invoke(main, ["trace", "merge", str(first), "--out", str(other)])
    assert refused.exit_code != 0 and other.read_text() == '{"traceEvents": 3}'
