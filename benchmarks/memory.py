"""How much memory training takes, over all ranks of a node: ours beside torch's and DeepSpeed's.

    PYTHONPATH=tests python benchmarks/memory.py [--ranks 2] [--contestants torch-ddp,fsdp2]

Each contestant trains a few steps in a launch of its own, while this process reads every 20 ms what
the kernel counts for its ranks: the proportional set size (PSS), which gives each of n processes
that share a page 1/n of it, so that the sum over ranks is what the node has to have. "started" is
the sum before there is a model: mostly libraries. "peak" is the most that was seen, "steps" the
most while training (models are built whole before they are cut), "steady" the median after the last
step, "data" the peak of what is no file's. What lasts less than a look may be missed.

What is freed is often kept by glibc for later, in pieces: 40 % of FSDP2's peak with GPT-2.
With --return-freed it gives blocks from 128 KB on back to the kernel at once, which shows what is
really in use, and costs time.

A process of others that uses the same libraries takes its part of their pages: let none run
meanwhile, or compare by "data", which it leaves alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from contestants import CONTESTANTS, REFERENCE, keys

from support.launch import launch_environment, mpirun_command, started

DEFAULT = "torch-ddp,torch-zero1,fsdp2,fsdp2-keep,mpizero-ddp,zero1,zero2,zero3,zero3-private"
LOOK_SECONDS = 0.02
MIB = 2**20
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}  # set, it does not grow by itself
COLUMNS = ("started", "steps", "steady", "data", "peak")


class Look(NamedTuple):
    """What was seen at one time: the phase, and bytes over all ranks, with and without files."""

    phase: str
    total: int
    data: int


def sizes(pid: str) -> tuple[int, int]:
    """The proportional set size of a process in bytes, and its part that is no file's."""
    found = {"Pss": 0, "Pss_File": 0}
    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0]) * 1024
    return found["Pss"], found["Pss"] - found["Pss_File"]


def watch(process: subprocess.Popen[str], folder: Path, limit: float) -> list[Look]:
    """What was seen until a launch's end."""
    looks, end = [], time.monotonic() + limit
    while process.poll() is None:
        if time.monotonic() > end:
            raise TimeoutError(f"not done in {limit:.0f} s")
        mark = folder / "phase"
        phase = mark.read_text() if mark.exists() else "starting"
        each = [sizes(path.stem) for path in folder.glob("*.pid")]
        looks.append(Look(phase, sum(total for total, _ in each), sum(data for _, data in each)))
        time.sleep(LOOK_SECONDS)
    return looks


def why_failed(folder: Path, status: int) -> str:
    """A launch's end in a line: what a rank noted, else the last it wrote to stderr."""
    if (folder / "failure").exists():
        return (folder / "failure").read_text()
    lines = (folder / "stderr").read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), f"status {status}")


def measure(key: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train as one contestant; its row."""
    row: dict[str, Any] = {"key": key, "name": CONTESTANTS[key].name}
    program = str(Path(__file__).with_name("memory_rank.py"))
    environment = launch_environment(RETURN_FREED if options.return_freed else None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [*mpirun_command(sys.executable, options.ranks), sys.executable, program]
        command += [key, options.model, str(options.context), str(options.steps), name]
        with (
            (folder / "stdout").open("w") as out,
            (folder / "stderr").open("w") as err,
            started(command, env=environment, stdout=out, stderr=err) as process,
        ):
            try:
                looks = watch(process, folder, options.limit)
            except TimeoutError as error:
                return {**row, "failed": str(error)}
        if process.returncode:
            return {**row, "failed": why_failed(folder, process.returncode)}
    return {**row, **summary(looks)}


def summary(looks: list[Look]) -> dict[str, int]:
    """Bytes: before the model, the most ever, the most while training, and after it."""
    totals: dict[str, list[int]] = {}
    for look in looks:
        totals.setdefault(look.phase, []).append(look.total)
    return {
        "started": int(statistics.median(totals["started"])),
        "peak": max(look.total for look in looks),
        "steps": max(totals["training"]),
        "steady": int(statistics.median(totals["trained"])),
        "data": max(look.data for look in looks),
        "looks": len(totals["training"]),
    }


def main() -> None:
    options = parse()
    title = f"{options.model}, {options.context} tokens a rank, {options.ranks} ranks"
    if options.return_freed:
        title += ", freed memory returned"
    print(f"{title}; MiB over all ranks")
    width = max(len(CONTESTANTS[key].name) for key in options.contestants)
    print(f"{'':<{width}}" + "".join(f"{column:>10}" for column in COLUMNS) + "  of torch DDP's")
    rows: list[dict[str, Any]] = []
    for key in options.contestants:
        row = measure(key, options)
        rows.append(row)
        base = next((each for each in rows if each["key"] == REFERENCE and "peak" in each), None)
        if base and "peak" in row:
            row["share"] = row["peak"] / base["peak"]
        print(line_of(row, width), flush=True)
    if options.json:
        write(options, rows)
    if options.plot:
        plot([row for row in rows if "peak" in row], title, options.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", default="gpt2", help="as for train_step.py")
    parser.add_argument("--context", type=int, default=128, help="gpt2's tokens a rank and step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--contestants", type=keys, default=DEFAULT, metavar="A,B,C",
        help=f"of {', '.join(CONTESTANTS)}; default: {DEFAULT}",
    )  # fmt: skip
    parser.add_argument("--return-freed", action="store_true", help="count only what is in use")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    # What the others are compared with comes first.
    options.contestants.sort(key=lambda key: key != REFERENCE)
    return options


def line_of(row: dict[str, Any], width: int) -> str:
    """A row as it is printed."""
    if "failed" in row:
        return f"{row['name']:<{width}}  failed: {row['failed']}"
    cells = "".join(f"{row[column] / MIB:>10.0f}" for column in COLUMNS)
    share = f"{row['share']:>8.0%}" if "share" in row else ""
    return f"{row['name']:<{width}}{cells}{share}"


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    import machine  # starts MPI, which is no state to launch ranks from

    found = {
        "kind": "memory", "machine": machine.describe(), "model": options.model,
        "context": options.context, "ranks": options.ranks, "steps": options.steps,
        "return_freed": options.return_freed, "rows": rows,
    }  # fmt: skip
    options.json.write_text(json.dumps(found, indent=1))


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """A bar for each contestant: the peak, and in it what stays after a step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.3 * len(rows)))
    names = [row["name"] for row in rows]
    axes.barh(names, [row["peak"] / MIB for row in rows], label="peak")
    axes.barh(names, [row["steady"] / MIB for row in rows], height=0.5, label="after a step")
    axes.invert_yaxis()
    axes.set(xlabel="MiB over all ranks (PSS)", title=title)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
