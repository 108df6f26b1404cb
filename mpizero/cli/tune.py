"""``mpizero tune``: measure on this machine which algorithm is best, and remember it."""

from __future__ import annotations

from functools import partial

import click
import ml_dtypes
import numpy as np

from mpizero.api import World, init
from mpizero.collectives.tuning import ALL_BYTES, Rules, Tuning, case, check_file, save
from mpizero.errors import ArgumentError
from mpizero.measure import seconds_of

_SIZES = [4**k for k in range(4, 14)]  # 256 B to 64 MiB

# What is not the MPI's own must be better by this much, or measuring again would change its mind.
_MARGIN = 0.95

_NEARLY = 0.9


@click.command(short_help="Measure which algorithm is best here, and remember it.")
@click.option("--seconds", default=0.15, show_default=True, help="Time for each size and case.")
@click.option("--largest", default=_SIZES[-1], show_default=True, help="Largest size in bytes.")
def tune(seconds: float, largest: int) -> None:
    """Measure all-reduce by size, dtype and place, and write the table that "auto" reads.

    Run it with mpirun, with as many ranks per node, and nodes, as the jobs that it is for.
    """
    world = init()
    if world.size == 1:
        raise click.ClickException("one rank has nothing to choose: start it with mpirun -n ...")
    if world.rank == 0:
        try:
            check_file()
        except ArgumentError as error:
            raise click.ClickException(str(error)) from error
    one_node = world.node_count == 1
    rules: dict[str, Rules] = {}
    bucket_bytes = Tuning().bucket_bytes
    for half in (False, True):
        for shared in (True, False) if one_node else (False,):
            name = case(half, shared, one_node)
            best = _measure(world, half, shared, seconds, largest)
            rules[name] = _rules([(nbytes, algorithm) for nbytes, algorithm, _ in best])
            if not half and shared == one_node:  # where gradients lie
                bucket_bytes = _bucket_bytes([(nbytes, time) for nbytes, _, time in best])
            if world.rank == 0:
                click.echo(f"{name}: " + ", ".join(f"{a} to {_text(n)}" for n, a in rules[name]))
    tuning = Tuning(rules, bucket_bytes, source="tuned")
    if world.rank == 0:
        click.echo(f"gradient buckets of {_text(bucket_bytes)}")
        path = save(tuning, world.local_size, world.node_count)
        click.echo(f"written to {path}" if path else "not written: MPIZERO_TUNING=off")


def _measure(
    world: World, half: bool, shared: bool, seconds: float, largest: int
) -> list[tuple[int, str, float]]:
    """For each size in bytes: the fastest algorithm, and the seconds that it takes."""
    dtype = np.dtype(ml_dtypes.bfloat16 if half else np.float32)
    found: list[tuple[int, str, float]] = []
    for nbytes in [size for size in _SIZES if size <= largest]:
        count = nbytes // dtype.itemsize
        array = world.allocate(count, dtype) if shared else np.zeros(count, dtype)
        works = {
            name: partial(world.allreduce, array, algorithm=name)
            for name in world.algorithms("all_reduce")
        }
        times = seconds_of(world, works, seconds)
        best = min(times, key=lambda name: times[name] * (1 if name == "native" else 1 / _MARGIN))
        found.append((nbytes, best, times[best]))
    return found


def _rules(best: list[tuple[int, str]]) -> Rules:
    """The fastest algorithm up to each size, neighbours with the same one joined."""
    found: list[tuple[int, str]] = []
    for nbytes, algorithm in best:
        if found and found[-1][1] == algorithm:
            found.pop()
        found.append((nbytes * 2, algorithm))  # up to halfway to the next size
    return (*found[:-1], (ALL_BYTES, found[-1][1]))


def _bucket_bytes(times: list[tuple[int, float]]) -> int:
    """The smallest bucket that moves bytes nearly as fast as the best, so that most can overlap.

    At least a MiB: each bucket costs a few calls besides.
    """
    speed = {nbytes: nbytes / seconds for nbytes, seconds in times}
    enough = [n for n in speed if speed[n] >= _NEARLY * max(speed.values()) and n >= 1 << 20]
    return min(enough, default=Tuning().bucket_bytes)


def _text(nbytes: int) -> str:
    if nbytes >= ALL_BYTES:
        return "any size"
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes} B"
