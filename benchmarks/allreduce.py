"""All-reduce from 4 B to 256 MB: ours beside MPI's, gloo's, and the bound, in one run.

    mpirun -n 2 python benchmarks/allreduce.py [--dtype float32] [--json FILE] [--plot FILE]

The contestants take turns; medians of the slowest rank. "copy" is the bound: plain copies of as
many bytes as an all-reduce within a node must read and write on each rank, by all ranks at once.
16-bit numbers are compared with MPI's float32 of the same count: MPI has no bfloat16.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import torch.distributed as dist

import mpizero_torch as mz
from mpizero import World
from mpizero.measure import seconds_of
from mpizero_torch.tensors import numpy_dtype as numpy_dtype_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = [4**k for k in range(1, 15)]  # 4 B to 256 MiB

SHARED, PRIVATE, MPI, GLOO, COPY = (
    "mpizero, node-shared",
    "mpizero, private",
    "MPI_Allreduce",
    "gloo",
    "copy",
)


def contestants(world: World, nbytes: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What takes part at one size, by name."""
    count = nbytes // dtype.itemsize
    numpy_dtype = numpy_dtype_of(dtype)
    shared = world.allocate(count, numpy_dtype)
    private = np.zeros(count, numpy_dtype)
    # Ones are in memory; untouched zeros would all be read from one page of the kernel's.
    source = np.ones(count, numpy_dtype)
    mpi, gloo = np.zeros(count, np.float32), torch.zeros(count, dtype=dtype)
    return {
        SHARED: partial(world.allreduce, shared),
        PRIVATE: partial(world.allreduce, private),
        MPI: world.native_allreduce(mpi),
        GLOO: lambda: dist.all_reduce(gloo),
        COPY: partial(np.copyto, np.empty_like(source), source),
    }


def sweep(world: World, name: str, largest: int, budget: float) -> Iterator[dict[str, Any]]:
    """A row for each size: seconds by contestant."""
    for nbytes in SIZES:
        if nbytes <= largest:
            works = contestants(world, nbytes, DTYPES[name])
            seconds = seconds_of(world, works, budget)
            yield {"dtype": name, "bytes": nbytes, "seconds": seconds}


def report(row: dict[str, Any]) -> str:
    """One line: times in microseconds, and how many times faster than MPI and gloo ours is."""
    seconds = row["seconds"]
    times = "".join(f"{seconds[name] * 1e6:>12.1f}" for name in (SHARED, PRIVATE, MPI, GLOO, COPY))
    ratios = f"{seconds[MPI] / seconds[SHARED]:>9.2f}{seconds[GLOO] / seconds[SHARED]:>9.2f}"
    return (
        f"{row['dtype']:<9}{row['bytes']:>10}{times}{ratios}{seconds[COPY] / seconds[SHARED]:>8.0%}"
    )


def plot(rows: list[dict[str, Any]], ranks: int, path: Path) -> None:
    """Time over size, one panel a dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, panels = plt.subplots(
        1, len(names), figsize=(5 * len(names), 4), sharey=True, squeeze=False
    )
    for axes, dtype in zip(panels[0], names, strict=True):
        mine = [row for row in rows if row["dtype"] == dtype]
        for name in (SHARED, PRIVATE, MPI, GLOO, COPY):
            label = f"{name} (float32)" if name == MPI and dtype != "float32" else name
            style = {"mpizero, node-shared": "o-", COPY: "k:"}.get(name, ".--")
            times = [row["seconds"][name] * 1e6 for row in mine]
            axes.plot([row["bytes"] for row in mine], times, style, ms=4, label=label)
        axes.set(xscale="log", yscale="log", xlabel="bytes", title=f"{dtype}, {ranks} ranks")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[0][0].set_ylabel("microseconds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the sweep and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=list(DTYPES), action="append", help="default: all")
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="bytes")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each size, at least")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    world = mz.init()
    torch.set_num_threads(1)
    store = world.broadcast_object(tempfile.mktemp())
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=world.rank, world_size=world.size
    )
    rows = []
    if world.rank == 0:
        titles = ("node-shared", "private", "MPI", "gloo", "copy")
        print(
            f"{world.size} ranks, microseconds; x: times faster than MPI, than gloo; of the bound"
        )
        print(f"{'dtype':<9}{'bytes':>10}" + "".join(f"{t:>12}" for t in titles))
    for dtype in options.dtype or DTYPES:
        for row in sweep(world, dtype, options.largest, options.seconds):
            rows.append(row)
            if world.rank == 0:
                print(report(row), flush=True)
    if world.rank == 0 and options.json:
        found = {"machine": machine.describe(), "ranks": world.size, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1))
    if world.rank == 0 and options.plot:
        plot(rows, world.size, options.plot)
    world.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
