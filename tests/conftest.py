"""What all tests share: the plugin for ranks, the ``gpu`` marker, hypothesis' settings."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from mpi4py import MPI

from mpizero import World
from support.placements import Placement, placed_in_all_ways

pytest_plugins = ["support.logged", "support.ranks"]

# Every rank must draw the same examples in the same order: from the test's own name, not from a
# database, a clock or what failed on one rank alone.
settings.register_profile(
    "ranks",
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)
settings.register_profile("alone", derandomize=True, database=None, deadline=None)
settings.load_profile("ranks" if MPI.COMM_WORLD.size > 1 else "alone")


@pytest.fixture(scope="module")
def placed_worlds() -> Iterator[list[tuple[Placement, World]]]:
    """A World for every way in which ranks may lie on nodes: one is drawn for each example."""
    with placed_in_all_ways() as worlds:
        yield worlds


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a GPU where there is none."""
    if item.get_closest_marker("gpu") and not _has_gpu():
        pytest.skip("needs a CUDA GPU and CuPy")


def _has_gpu() -> bool:
    if importlib.util.find_spec("cupy") is None:
        return False
    import cupy

    try:
        return bool(cupy.cuda.runtime.getDeviceCount() > 0)
    except cupy.cuda.runtime.CUDARuntimeError:
        return False
