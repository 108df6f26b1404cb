"""``mpizero bench``: how fast all-reduce is here, in the manner of osu_allreduce and nccl-tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np

from mpizero.api import World, init
from mpizero.cli import outputs
from mpizero.measure import seconds_of

_DTYPES = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
_ALGORITHMS = ("auto", "native", "ring", "halving_doubling", "node_shared", "hierarchical")


@dataclass(frozen=True)
class Row:
    """One size and algorithm. Bandwidths in 10^9 bytes a second."""

    bytes: int
    algorithm: str
    microseconds: float
    algorithm_bandwidth: float  # bytes / time
    bus_bandwidth: float  # times 2 (n-1)/n: what each rank must move, whatever the algorithm
    correct: bool


@click.command(short_help="Measure all-reduce by size and algorithm, beside the MPI's own.")
@click.option("--from", "smallest", default="4", show_default=True, help="Smallest size in bytes.")
@click.option("--to", "largest", default="64M", show_default=True, help="Largest size.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), default="float32", show_default=True)
@click.option(
    "--algorithm",
    "names",
    type=click.Choice(_ALGORITHMS),
    multiple=True,
    help="Repeat for several; all that apply, by default.",
)
@click.option("--private", is_flag=True, help="Arrays in private memory, not node-shared.")
@click.option("--seconds", default=0.2, show_default=True, help="Time for each size.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows here.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw them here (PNG).")
def bench(
    smallest: str,
    largest: str,
    dtype: str,
    names: tuple[str, ...],
    private: bool,
    seconds: float,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Sweep all-reduce over sizes and algorithms, beside the MPI library's own call.

    Run it with mpirun. "MPI" is the library's call as mpi4py makes it; each result is checked.
    """
    world = init()
    if not names:
        names = tuple(n for n in _ALGORITHMS if n == "auto" or n in world.algorithms("all_reduce"))
    rows: list[Row] = []
    if world.rank == 0:
        outputs.check(json_file, _are_rows, "bench", "--json")
        outputs.check_picture(plot_file, "bench")
        click.echo(f"{world.size} ranks on {world.node_count} node(s), {dtype}, times in us")
        if world.size == 1:
            click.echo("One rank sends nothing: start it with mpirun -n ... to measure bandwidth.")
        click.echo(f"{'bytes':>12} {'algorithm':<18} {'time':>12} {'algbw':>8} {'busbw':>8}  GB/s")
    for nbytes in _sizes(_bytes(smallest), _bytes(largest)):
        for row in measure(world, nbytes, np.dtype(_DTYPES[dtype]), names, private, seconds):
            rows.append(row)
            if world.rank == 0:
                click.echo(
                    f"{row.bytes:>12} {row.algorithm:<18} {row.microseconds:>12.1f} "
                    f"{row.algorithm_bandwidth:>8.2f} {row.bus_bandwidth:>8.2f}"
                    + ("" if row.correct else "  WRONG")
                )
    if world.rank == 0 and json_file is not None:
        found = json.dumps([asdict(row) for row in rows], indent=1).encode()
        outputs.write(json_file, found, _are_rows, "bench", "--json")
    if world.rank == 0 and plot_file is not None:
        _plot(rows, plot_file, f"all-reduce, {dtype}, {world.size} ranks")
    if not all(row.correct for row in rows):
        raise click.ClickException("some results were wrong")


def measure(
    world: World, nbytes: int, dtype: Any, names: tuple[str, ...], private: bool, seconds: float
) -> Iterator[Row]:
    """Time ``names`` and the MPI's own call on one size; a row for each."""
    count = max(1, nbytes // dtype.itemsize)
    array = np.zeros(count, dtype) if private else world.allocate(count, dtype)
    works: dict[str, Callable[[], object]] = {
        name: partial(world.allreduce, array, algorithm=name) for name in names
    }
    if dtype.name in ("float32", "float64"):  # what every MPI can sum
        works["MPI"] = world.native_allreduce(np.zeros(count, dtype))
    timed = seconds_of(world, works, seconds)
    for name, took in timed.items():
        # One rank has nothing to move: there is no bandwidth to speak of.
        bandwidth = array.nbytes / took / 1e9 if world.size > 1 else 0.0
        share = 2 * (world.size - 1) / world.size
        correct = name == "MPI" or _is_right(world, array, name)
        yield Row(array.nbytes, name, took * 1e6, bandwidth, bandwidth * share, correct)


def _is_right(world: World, array: Any, algorithm: str) -> bool:
    """Small whole numbers, whose sums are exact in every dtype."""
    every = [(np.arange(array.size) * (rank + 3)) % 7 - 2 for rank in range(world.size)]
    array[...] = every[world.rank].astype(array.dtype)
    world.allreduce(array, algorithm=algorithm)
    right = bool((array.astype(np.float64) == sum(every)).all())
    array[...] = 0
    return bool(world.allreduce(int(right), "min"))


def _sizes(smallest: int, largest: int) -> Iterator[int]:
    size = smallest
    while size <= largest:
        yield size
        size *= 4


def _bytes(text: str) -> int:
    """4, 64K, 16M, 1G."""
    units = {"K": 10, "M": 20, "G": 30}
    try:
        if text[-1:].upper() in units:
            return int(text[:-1]) << units[text[-1].upper()]
        return int(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no size; write 4096, 64K, 16M or 1G") from None


def _are_rows(data: bytes) -> bool:
    """Is it what ``--json`` has written before?"""
    names = {each.name for each in fields(Row)}
    try:
        rows = json.loads(data)
        return isinstance(rows, list) and rows != [] and all(set(row) == names for row in rows)
    except (ValueError, TypeError):
        return False


def _plot(rows: list[Row], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(row.algorithm for row in rows):
        mine = [row for row in rows if row.algorithm == name]
        style = "k--" if name == "MPI" else "o-"
        axes.plot([r.bytes for r in mine], [r.microseconds for r in mine], style, ms=3, label=name)
    axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="microseconds", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    outputs.write_picture(figure, path, "bench", dpi=120)
