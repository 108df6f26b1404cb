"""The benchmarks that docs/performance.md reports, with the MPI of the Python that runs this.

    .venv/bin/python benchmarks/run_all.py [--quick] [--out FOLDER] [--ranks 2,4] [--only zero]

Writes a JSON file and a figure for each, whose names tell Open MPI's from MPICH's, and prints the
tables in the end. What is measured between nodes (between_nodes.py) needs several, and is left out.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.launch import (  # noqa: E402
    find_mpirun,
    is_openmpi,
    launch_environment,
    mpirun_command,
    started,
)

FIGURES = ROOT / "docs" / "figures"

# Enough to see that everything runs; the figures say nothing.
QUICK_SWEEP = ("--seconds", "0.01", "--largest", "65536")
QUICK_STEPS = ("--steps", "1")


@dataclass(frozen=True)
class Benchmark:
    """A script of this folder on some ranks; ``name`` is that of the files that it writes.

    ``launches``: it starts its ranks itself.
    """

    name: str
    ranks: int
    script: str
    arguments: Sequence[str]
    launches: bool = False

    def command(self, out: Path) -> list[str]:
        """What runs it, in the project's folder."""
        launcher = [] if self.launches else mpirun_command(sys.executable, self.ranks)
        return [
            *launcher,
            *(sys.executable, f"benchmarks/{self.script}", *self.arguments),
            *("--json", str(self.json(out)), "--plot", str(self.json(out).with_suffix(".png"))),
        ]

    def json(self, out: Path) -> Path:
        """The file of its results; that of its figure is beside it."""
        return out / f"{self.name}.json"


def benchmarks(ranks: Sequence[int], openmpi: bool, quick: bool) -> Iterator[Benchmark]:
    """All that is reported of one MPI: of Open MPI no 16-bit sums, and of the GPTs only one."""
    mark = "-openmpi" if openmpi else ""
    dtypes = ("--dtype", "float32") if openmpi else ()
    sweep = QUICK_SWEEP if quick else ("--seconds", "0.5")
    for n in ranks:
        yield Benchmark(f"allreduce{mark}-{n}", n, "allreduce.py", (*sweep, *dtypes))
        for model in ("gpt2", "mlp200") if openmpi else ("gpt2", "gpt10m", "mlp200"):
            # GPT-2 on four ranks leaves no room for the one that trains alone.
            alone = ("--without-alone",) if model == "gpt2" and n > 2 else ()
            steps = QUICK_STEPS if quick else ()
            arguments = ("--model", model, *steps, *alone)
            yield Benchmark(f"train{mark}-{model}-{n}", n, "train_step.py", arguments)
        yield from zero(n, mark, quick)
    # Four copies of stock torch, and one alone, would not fit 24 GB on four ranks.
    few = ("--seconds", "0.01", "--largest", "65536", "--model", "mlp200", "--steps", "1")
    arguments = few if quick else ()
    yield Benchmark(f"distributed{mark}-2", 2, "distributed.py", arguments)
    if not openmpi:  # the disk is the same
        rounds = ("--model", "gpt10m", "--rounds", "1") if quick else ("--rounds", "3")
        # All of them at once would leave too little of 24 GB for what is written.
        contestants = ("--contestants", "zero1,zero3,dcp-fsdp2")
        yield Benchmark("checkpoint-gpt2-2", 2, "checkpoint.py", (*rounds, *contestants))


def zero(n: int, mark: str, quick: bool) -> Iterator[Benchmark]:
    """ZeRO beside replicas; with MPICH also beside what torch has for it, and all their memory."""
    steps = QUICK_STEPS if quick else ()
    for model in ("mlp200", "gpt2"):
        ours = ("torch-ddp", "zero1", "zero2", *(("zero3",) if n == 2 or model == "mlp200" else ()))
        contestants = ",".join(("no-update", *ours) if n == 2 or model == "mlp200" else ours)
        arguments = ("--model", model, "--contestants", contestants, *steps)
        yield Benchmark(f"zero{mark}-{model}-{n}", n, "train_step.py", arguments)
    if mark:
        return
    # All of them at once would not fit 24 GB on four ranks.
    peers = (
        "torch-ddp,torch-zero1,fsdp2,zero3,zero3-private" if n == 2 else "fsdp2,zero3,zero3-private"
    )
    few = steps or ("--steps", "5")
    arguments = ("--model", "gpt2", "--contestants", peers, *few)
    yield Benchmark(f"zero3-gpt2-{n}", n, "train_step.py", arguments)
    yield Benchmark(f"memory-gpt2-{n}", n, "memory.py", ("--ranks", str(n)), launches=True)


def run(command: Sequence[str]) -> None:
    """Print a command and run it in the project's folder; end here if it fails."""
    print(f"\n>>> {shlex.join(command)}", flush=True)
    environment = launch_environment()
    folders = (ROOT, ROOT / "adapters", ROOT / "tests")
    environment["PYTHONPATH"] = ":".join(map(str, folders))
    with started(command, cwd=ROOT, env=environment) as process:
        if status := process.wait():
            sys.exit(f"the command above failed with status {status}")


def main() -> None:
    """Run all benchmarks one after the other, and print their results as tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="2,4", help="numbers of ranks")
    parser.add_argument(
        "--only", action="append", metavar="PREFIX", help="those whose names begin so; repeatable"
    )
    parser.add_argument("--quick", action="store_true", help="only to see that everything runs")
    parser.add_argument("--out", type=Path, default=FIGURES, help="default: docs/figures")
    options = parser.parse_args()
    out = options.out.resolve()
    if options.quick and out == FIGURES:
        parser.error("--quick measures too little for docs/figures; name another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    counts = [int(count) for count in options.ranks.split(",")]
    openmpi = is_openmpi(find_mpirun(sys.executable))
    every = [
        each
        for each in benchmarks(counts, openmpi, options.quick)
        if each.name.startswith(tuple(options.only or [""]))
    ]
    if not every:
        parser.error(f"no benchmark's name begins with {' or '.join(options.only)}")
    for each in every:
        run(each.command(out))
    run([sys.executable, "benchmarks/tables.py", *(str(each.json(out)) for each in every)])


if __name__ == "__main__":
    main()
