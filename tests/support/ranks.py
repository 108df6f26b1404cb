"""A pytest plugin for tests under ``mpirun``: one report for all ranks.

mpi-pytest runs the same tests on every rank. This adds: only rank 0 prints; a test that failed on
any rank counts as failed on all, and rank 0's report shows why; a rank that failed while the others
still wait for it in MPI ends the launch at once instead of at the time limit.

Why mpi-pytest and not pytest-isolate-mpi: the latter starts ``mpirun`` anew for each test, which is
safer, but costs seconds of importing torch on every rank each time. Here one launch serves all
tests of a rank count. Tests that end or abort the job belong in a launch of their own: see
``support.launch.mpirun``.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from support.launch import RANK_COUNTS

LOGS_VARIABLE = "MPIZERO_TEST_LOGS"

# How long a rank whose test failed waits for the others to end theirs.
_PATIENCE_SECONDS = 15.0

_FAILURE = pytest.StashKey[str]()
_LOG = pytest.StashKey[Path]()
_COMM = pytest.StashKey[MPI.Intracomm]()


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give the session a communicator of its own, and ranks above 0 a log instead of a terminal."""
    comm = config.stash[_COMM] = MPI.COMM_WORLD.Dup()
    if comm.rank == 0:
        return
    directory = Path(os.environ.get(LOGS_VARIABLE) or tempfile.gettempdir())
    # Where ranks share a place for `tmp_path`, one may clean up what another is looking at.
    own_temporary = directory / f"pytest-rank-{comm.rank}"
    own_temporary.mkdir(exist_ok=True)
    os.environ["PYTEST_DEBUG_TEMPROOT"] = str(own_temporary)
    path = config.stash[_LOG] = directory / f"pytest-rank-{comm.rank}.log"
    log = path.open("w", buffering=1)  # by lines: a rank that is killed leaves all it had to say
    config.add_cleanup(log.close)
    config.pluginmanager.unregister(name="terminalreporter")
    config.pluginmanager.register(pytest.TerminalReporter(config, log), "terminalreporter")


def pytest_report_header(config: pytest.Config) -> str:
    """Say which MPI runs the tests, and on how many ranks."""
    library = MPI.Get_library_version().splitlines()[0].split(",")[0]
    return f"mpi: {' '.join(library.split())}, ranks: {config.stash[_COMM].size}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse markers that would leave a test out of every launch, or that mpi-pytest misses."""
    for item in items:
        marker = item.get_closest_marker("parallel")
        if marker is None:
            continue
        given = marker.args[0] if marker.args else marker.kwargs.get("nprocs", 3)
        counts = [given] if isinstance(given, int) else list(given)
        if not set(counts) <= set(RANK_COUNTS):
            raise pytest.UsageError(f"{item.nodeid}: the suite is run on {RANK_COUNTS} ranks only")
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if len(counts) > 1 and "_nprocs" not in parameters:
            raise pytest.UsageError(
                f"{item.nodeid}: mpi-pytest wants the parallel marker on the function itself"
            )


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """All ranks must run the same tests in the same order, or they wait for each other for ever.

    What is there before the first test stays to the end: looking through a million such objects
    whenever garbage is collected would be most of what many a test takes.
    """
    mine = [item.nodeid for item in session.items]
    of_all = session.config.stash[_COMM].allgather((mine, session.testsfailed))
    tests, failed = of_all[0]
    for rank, (theirs, theirs_failed) in enumerate(of_all):
        if theirs != tests or theirs_failed != failed:
            differing = sorted(set(theirs) ^ set(tests)) or "their order, or what failed to import"
            pytest.exit(f"ranks 0 and {rank} collected different tests: {differing}", returncode=4)
    if "torch" in sys.modules:
        importlib.import_module("torch._dynamo")  # as the first optimizer would
        _seed_no_devices()
    gc.collect()
    gc.freeze()


def _seed_no_devices() -> None:
    """Where there are no devices, ``torch.manual_seed`` notes whole stacks for each of their kinds.

    It does so in case that they come to be used, and takes a hundred times as long by it.
    """
    import torch

    for name in ("cuda", "xpu", "mtia"):
        kind: Any = getattr(torch, name)
        if not kind.is_available():
            kind.manual_seed_all = lambda seed: None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember what failed in setup and in the test itself."""
    report = yield
    if report.failed:
        item.stash[_FAILURE] = report.longreprtext
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Learn where else the test failed, or its teardown; if only elsewhere, fail here too.

    Asked before the teardown as well: fixtures, and mpi-pytest's barrier, would wait there for a
    rank that is stuck in the test.
    """
    mine = item.stash.get(_FAILURE, "")
    of_all = _failures_of_all(item, mine)
    result: object = None
    error: BaseException | None = None
    try:
        result = yield
    except (Exception, pytest.fail.Exception) as its_error:
        error = its_error
    teardown = "".join(traceback.format_exception(error, limit=-3)) if error else ""
    of_all_teardowns = _failures_of_all(item, teardown)
    if error:
        raise error
    elsewhere = [
        _prefixed(rank, text)
        for rank, text in [*enumerate(of_all), *enumerate(of_all_teardowns)]
        if _gist(text) not in mine
    ]
    if elsewhere:
        pytest.fail("failed on another rank\n" + "\n".join(elsewhere), pytrace=False)
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(
    session: pytest.Session, exitstatus: int
) -> Generator[None, object, object]:
    """A session that came to its end has told rank 0 everything: its log can go.

    What another plugin raises here would end the launch with its traceback still captured.
    """
    try:
        result = yield
    except Exception:
        _print_past_capture(session.config, traceback.format_exc())
        raise
    if exitstatus != pytest.ExitCode.INTERNAL_ERROR and _LOG in session.config.stash:
        session.config.stash[_LOG].unlink(missing_ok=True)
    return result


def _failures_of_all(item: pytest.Item, mine: str) -> list[str]:
    comm = item.config.stash[_COMM]
    if comm.size == 1:
        return [mine]
    arrived = comm.Ibarrier()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not arrived.Test():
        if mine and time.monotonic() > deadline:
            _end_launch(item, mine)
        time.sleep(0.0005)
    return comm.allgather(mine)


def _end_launch(item: pytest.Item, failure: str) -> None:
    text = (
        f"{item.nodeid} failed, and the other ranks did not end it within "
        f"{_PATIENCE_SECONDS:.0f} s, so this launch ends here:\n{failure}"
    )
    _print_past_capture(item.config, text)
    if _LOG in item.config.stash:
        item.config.stash[_LOG].unlink(missing_ok=True)
    MPI.COMM_WORLD.Abort(1)


def _print_past_capture(config: pytest.Config, text: str) -> None:
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        sys.stderr.write(f"\n{_prefixed(config.stash[_COMM].rank, text)}\n")
        sys.stderr.flush()


def _gist(failure: str) -> str:
    """The line that tells one failure from another: pytest marks it with an E."""
    lines = failure.splitlines() or [""]
    return next((line for line in lines if line.startswith("E ")), lines[-1])


def _prefixed(rank: int, text: str) -> str:
    return "\n".join(f"[rank {rank}] {line}" for line in text.splitlines())
