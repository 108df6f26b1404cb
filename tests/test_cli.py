"""The command line, under mpirun as users start it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpizero.cli.tune import _bucket_bytes, _rules
from mpizero.collectives import tuning
from mpizero.collectives.choose import Place, choose
from mpizero.collectives.tuning import ALL_BYTES, BUILT_IN, Tuning, case
from support.launch import mpirun

pytestmark = pytest.mark.once

CLI = ["-c", "from mpizero.cli import main; main()"]


def test_bench_prints_writes_and_draws(tmp_path: Path) -> None:
    rows, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    options = [
        "bench",
        "--to",
        "64K",
        "--seconds",
        "0.01",
        "--json",
        str(rows),
        "--plot",
        str(plot),
    ]
    result = mpirun(2, [*CLI, *options])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("node_shared") == 8  # from 4 B to 64 KiB by fours, on rank 0 only
    measured = json.loads(rows.read_text())
    assert {row["algorithm"] for row in measured} >= {"auto", "native", "ring", "MPI"}
    assert all(row["correct"] and row["microseconds"] > 0 for row in measured)
    for row in measured:
        assert row["bus_bandwidth"] == pytest.approx(row["algorithm_bandwidth"])  # 2 (n-1)/n
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_tune_writes_a_table_that_is_found_again(tmp_path: Path) -> None:
    file = tmp_path / "tables.json"
    env = {"MPIZERO_TUNING": str(file)}
    options = ["tune", "--seconds", "0.01", "--largest", "4096"]
    result = mpirun(2, [*CLI, *options], env=env)
    assert result.returncode == 0, result.stderr
    program = "import mpizero; w = mpizero.init(); print(w.tuning.source, w.tuning.rules)"
    for ranks, found in ((2, str(file)), (3, "built in")):  # valid for that shape of job only
        said = mpirun(ranks, program, env=env)
        assert said.stdout.count(found) == ranks, said.stdout + said.stderr
    file.write_text("{ this is no table")
    assert mpirun(2, program, env=env).stdout.count("built in") == 2


def test_tune_alone_says_what_to_do() -> None:
    result = mpirun(1, [*CLI, "tune"])
    assert result.returncode != 0 and "mpirun -n" in result.stderr


def test_the_choice_follows_the_table() -> None:
    here = Place(one_node=True, shared=True, on_device=False)
    table = Tuning({case(False, True, True): ((100, "ring"), (ALL_BYTES, "node_shared"))})
    assert choose("all_reduce", 100, "f4", "sum", here, table) == "ring"
    assert choose("all_reduce", 101, "f4", "sum", here, table) == "node_shared"
    private = Place(one_node=True, shared=False, on_device=False)
    assert choose("all_reduce", 10**9, "f4", "sum", private, table) == "native"
    assert choose("all_reduce", 10**9, "f4", "sum", here, BUILT_IN) == "node_shared"


def test_tables_are_kept_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = Tuning({"a": ((1, "x"),)}), Tuning({"b": ((2, "y"),)}, bucket_bytes=7)
    path = tuning.save(first, 2, 1)
    assert path == tmp_path / "mpizero" / "tuning.json" and tuning.save(second, 4, 2) == path
    assert tuning._read(tuning.job_key(2, 1)).rules == first.rules
    assert tuning._read(tuning.job_key(4, 2)).bucket_bytes == 7
    monkeypatch.setenv("MPIZERO_TUNING", "off")
    assert tuning.save(first, 2, 1) is None and tuning._read(tuning.job_key(2, 1)) is BUILT_IN


def test_measured_times_become_rules_and_a_bucket_size() -> None:
    best = [(256, "native"), (1024, "native"), (4096, "ring"), (16384, "node_shared")]
    assert _rules(best) == ((2048, "native"), (8192, "ring"), (ALL_BYTES, "node_shared"))
    # 10 GB/s from 4 MiB on: larger buckets only wait longer for their gradients.
    times = [(n << 20, (n << 20) / speed) for n, speed in ((1, 5e9), (4, 9.5e9), (16, 1e10))]
    assert _bucket_bytes(times) == 4 << 20
    assert _bucket_bytes([(4096, 1e-6)]) == Tuning().bucket_bytes  # nothing large was measured
