"""Print the results of benchmarks as the tables of docs/performance.md.

python benchmarks/tables.py docs/figures/*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


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
    rows = {row["name"]: row["step"] * 1e3 for row in found["rows"]}
    theirs = rows["torch DDP, gloo"]
    for name, step in rows.items():
        print(
            f"| {found['model']} | {found['ranks']} | {name} | {step:.1f} | {theirs / step:.2f} |"
        )


def main() -> None:
    """Print what each named file holds."""
    results = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    print(", ".join(f"{key} {value}" for key, value in results[0]["machine"].items()))
    for found in results:
        if "model" not in found:
            allreduce(found)
    print("\n| model | ranks | | step, ms | x torch DDP |\n|---|---|---|---:|---:|")
    for found in results:
        if "model" in found:
            train(found)


if __name__ == "__main__":
    main()
