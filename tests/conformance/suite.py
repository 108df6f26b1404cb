"""torch's suite, ready to be run in processes that exist already, with any backend.

The suite forks its processes and asks the environment which backend it is for. It knows backends
by their names, and skips whatever it does not know a name to be capable of. A backend that it does
not know is given every test that gloo or torch's own MPI backend would be given.
"""

from __future__ import annotations

import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.testing._internal.common_distributed import DistTestCases
from torch.testing._internal.common_utils import set_rng_seed

from conformance import ddp
from conformance.tables import BACKEND, DDP, Table

# Two decorators skip tests of groups on fewer than 8 ranks or an odd number, unless the backend is
# MPI. The tests themselves do with fewer: they are run, with gloo too.
_RUNS_ON_FEW_RANKS = "mpi"

# Read when the suite is imported; every test gets files of its own.
_ANY_FOLDER, _ANY_STORE = "/", "file:///dev/null"


class _Name(str):
    """A backend's name that is also taken for gloo's and MPI's: what they do is asked of it."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other in ("gloo", "mpi") or str.__eq__(self, str(other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash("gloo")  # so it is found in sets of names in which gloo's is


class Suite:
    """The tests of a table, for one backend and number of ranks."""

    def __init__(self, backend: str, ranks: int, table: Table = BACKEND) -> None:
        self._backend, self._ranks, self._of_ddp = backend, ranks, table is DDP
        name = backend if backend == "gloo" else _Name(backend)
        DistTestCases.backend_feature["plugin"].add(backend)
        os.environ.update(WORLD_SIZE=str(ranks), BACKEND=_RUNS_ON_FEW_RANKS)
        os.environ.update(TEMP_DIR=_ANY_FOLDER, INIT_METHOD=_ANY_STORE)
        # The suite reads its backend's name there, once; the real environment keeps no objects.
        decorators = ddp.without_gpus(ranks) if self._of_ddp else nullcontext()
        with patch.object(os, "environ", {**os.environ, "BACKEND": name}), decorators:
            suite: Any = importlib.import_module(
                "torch.testing._internal.distributed.distributed_test"
            )
        for known in (
            suite.PROFILING_SUPPORTED_BACKENDS,
            suite.SEND_RECV_PROFILING_SUPPORTED_BACKENDS,
        ):
            if backend not in known:
                known.append(backend)
        self._suite = suite
        self._class: Any = type(
            "TestDistributed", (suite.TestDistBackend, suite.DistributedTest._DistTestBase), {}
        )

    def names(self) -> list[str]:
        """All tests, in the order in which they stand in the suite."""
        base = self._suite.DistributedTest._DistTestBase
        tests = {name: test for name, test in vars(base).items() if name.startswith("test_")}
        module = vars(self._suite)
        return [
            name
            for name, test in tests.items()
            if not self._of_ddp or ddp.is_about_ddp(test, base, module)
        ]

    def changed(self) -> AbstractContextManager[None]:
        """The context in which tests are to be run."""
        if not self._of_ddp:
            return nullcontext()
        package = "mpizero_torch" if self._backend == "mpizero" else "torch.nn.parallel"
        wrapper = importlib.import_module(package).DistributedDataParallel
        return ddp.replaced(self._suite, wrapper, self._ranks)

    def case(self, name: str, rank: int) -> Any:
        """A test as the suite's own processes have it: ``case.NAME()`` runs its body."""
        case = self._class(name)
        case.rank = rank
        return case

    def why_skipped(self, name: str) -> str | None:
        """The reason, if it is known before the test is run."""
        method = getattr(self._class, name)
        if getattr(method, "__unittest_skip__", False):
            return str(getattr(method, "__unittest_skip_why__", ""))
        return None

    def prepare(self, folder: Path) -> None:
        """Give the next test its files: those of its barriers and of a store."""
        os.environ.pop("TORCH_DISTRIBUTED_DEBUG", None)  # a test before may have left its level
        self._suite.dist.set_debug_level(self._suite.dist.DebugLevel.OFF)
        for part in ("barrier", "test_dir", "init_dir"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        os.environ["TEMP_DIR"] = str(folder)
        self._suite.INIT_METHOD = f"file://{folder}/init_dir/shared_init_file"
        self._suite.Barrier.barrier_id = 0

    def seconds_for_group(self, name: str) -> float:
        """The time limit of the process group that the suite wants for a test."""
        seconds: float = self._suite.CUSTOM_PG_TIMEOUT.get(name, self._suite.default_pg_timeout)
        return seconds

    def wait_for_all(self, ranks: int, seconds: float) -> None:
        """The suite's own barrier, through files."""
        self._suite.Barrier.sync(wait_for=ranks, timeout=seconds)

    def seed(self) -> None:
        """Set the random number generators as the suite does before each test."""
        set_rng_seed()

    def meaning_of_exit(self, code: object) -> str | None:
        """Why a test that left by ``sys.exit(code)`` is skipped; None if that is no skip."""
        skips = self._suite.TEST_SKIPS.values()
        return next((skip.message for skip in skips if skip.exit_code == code), None)
