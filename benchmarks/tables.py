"""Print the results of benchmarks as the tables of docs/performance.md.

python benchmarks/tables.py docs/figures/*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TORCH = "torch DDP, gloo"

COLUMNS = ("started", "steps", "steady", "data", "peak")  # of memory.py

TITLES = {
    "allreduce": "",  # each has its own
    "train": "\n| model | ranks | | step, ms | x torch DDP | communication and optimizer, ms |"
    "\n|---|---|---|---:|---:|---:|",
    "checkpoint": "\n| model | | save, s | GB/s | load, cold, s | GB/s | load, warm, s "
    "| blocked, s | of save | steps meanwhile |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    "distributed": "\n| ranks | | bytes | mpizero | gloo | x gloo | alone |"
    "\n|---|---|---:|---:|---:|---:|---:|",
    "memory": "\n| model | ranks | | started | steps | steady | data | peak | of torch DDP's |"
    "\n|---|---|---|---:|---:|---:|---:|---:|---:|",
}


def kind_of(found: dict[str, Any]) -> str:
    """Which benchmark wrote this."""
    return str(found.get("kind", "train" if "model" in found else "allreduce"))


def allreduce(found: dict[str, Any]) -> None:
    """Sizes down; microseconds, and how many times faster than the peers ours is."""
    for dtype in dict.fromkeys(row["dtype"] for row in found["rows"]):
        print(f"\n{dtype}, {found['ranks']} ranks, microseconds\n")
        print(
            "| bytes | node-shared | private | MPI | gloo | copy | x MPI | x gloo | of the bound |"
        )
        print("|---:" * 9 + "|")
        for row in found["rows"]:
            if row["dtype"] == dtype:
                each = row["seconds"].values()  # in the order in which allreduce.py names them
                times = " | ".join(f"{seconds * 1e6:.1f}" for seconds in each)
                ours, _, mpi, gloo, copy = each
                ratios = f"{mpi / ours:.2f} | {gloo / ours:.1f} | {copy / ours:.0%}"
                print(f"| {row['bytes']} | {times} | {ratios} |")


def train(found: dict[str, Any]) -> None:
    """A line for each contestant."""
    rows = {row["name"]: row for row in found["rows"]}
    for name, row in rows.items():
        step = row["step"] * 1e3
        line = f"| {found['model']} | {found['ranks']} | {name} | {step:.1f} | "
        if TORCH in rows:
            line += f"{rows[TORCH]['step'] / row['step']:.2f}"
        line += " | "
        if "communication and optimizer" in row:
            line += f"{row['communication and optimizer'] * 1e3:.1f}"
        print(f"{line} |")


def checkpoint(found: dict[str, Any]) -> None:
    """A line for each bound and contestant; GB/s of the checkpoint's bytes."""
    nbytes, bounds = found["rows"][0]["bytes"] / 1e9, found["bounds"]
    for who in dict.fromkeys(key.partition(",")[0] for key in bounds):
        write, cold, warm = (bounds[f"{who}, {what}"] for what in ("write", "cold", "warm"))
        print(
            f"| {found['model']} | plain calls, {who} | {write:.2f} | {nbytes / write:.2f} | "
            f"{cold:.2f} | {nbytes / cold:.2f} | {warm:.2f} | | | |"
        )
    for row in found["rows"]:
        size = row["bytes"] / 1e9
        line = f"| {found['model']} | {row['name']} | {row['save']:.2f} | {size / row['save']:.2f}"
        line += f" | {row['cold']:.2f} | {size / row['cold']:.2f} | {row['warm']:.2f} | "
        if "blocked" in row:
            line += f"{row['blocked']:.2f} | {row['blocked'] / row['save']:.0%}"
            line += f" | x{row['slower']:.2f} |"
        else:
            line += "| | |"
        print(line)


def distributed(found: dict[str, Any]) -> None:
    """A line for each call (microseconds) and way to train (milliseconds a step)."""
    for row in found["rows"]:
        seconds, unit, name = row["seconds"], *((1e6, "us") if "bytes" in row else (1e3, "ms"))
        times = " | ".join(f"{seconds[each] * unit:.1f} {name}" for each in ("mpizero", "gloo"))
        ratio = seconds["gloo"] / seconds["mpizero"]
        alone = f"{seconds['alone'] * unit:.1f} {name}" if "alone" in seconds else ""
        cells = (found["ranks"], row["call"], row.get("bytes", ""), times, f"{ratio:.2f}", alone)
        print("".join(f"| {cell} " for cell in cells) + "|")


def memory(found: dict[str, Any]) -> None:
    """A line for each contestant that came through; MiB over all ranks."""
    for row in found["rows"]:
        if "failed" in row:
            continue
        sizes = (row[key] / 2**20 for key in COLUMNS)
        share = f"{row['share']:.0%}" if "share" in row else ""
        cells = (found["model"], found["ranks"], row["name"], *(f"{size:.0f}" for size in sizes))
        print("".join(f"| {cell} " for cell in (*cells, share)) + "|")


def main() -> None:
    """Print what each named file holds."""
    results = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    print(", ".join(f"{key} {value}" for key, value in results[0]["machine"].items()))
    kinds = {kind: [each for each in results if kind_of(each) == kind] for kind in TITLES}
    for found in kinds["allreduce"]:
        allreduce(found)
    lines = {
        "train": train, "distributed": distributed, "memory": memory, "checkpoint": checkpoint,
    }  # fmt: skip
    for kind, line in lines.items():
        if kinds[kind]:
            print(TITLES[kind])
        for found in kinds[kind]:
            line(found)


if __name__ == "__main__":
    main()
