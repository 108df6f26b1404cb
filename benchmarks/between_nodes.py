"""What an all-reduce sends between nodes: bytes on each node's link, and time, by algorithm.

    mpirun -n 4 --host node0:2,node1:2 python benchmarks/between_nodes.py [--megabytes 16]

Bytes are what the kernel counts on the node's network interfaces, so they include what MPI and TCP
add, and leave out hardware that bypasses the kernel. The formula for a two-level all-reduce of b
bytes over m nodes, whatever the number of ranks on a node: each node sends 2 (m-1)/m b.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

import mpizero
from mpizero import World


def bytes_sent() -> int:
    """What this host has sent over its network so far."""
    total = 0
    for line in Path("/proc/net/dev").read_text().splitlines()[2:]:
        name, _, counters = line.partition(":")
        if name.strip() != "lo":
            total += int(counters.split()[8])
    return total


def measure(world: World, array: np.ndarray, algorithm: str, rounds: int) -> dict[str, float]:
    """Seconds (median of the slowest rank) and bytes sent a round, by the node that sends most."""
    world.allreduce(array, algorithm=algorithm)
    world.barrier()
    before, seconds = bytes_sent(), []
    for _ in range(rounds):
        world.barrier()
        start = time.perf_counter()
        world.allreduce(array, algorithm=algorithm)
        seconds.append(time.perf_counter() - start)
    world.barrier()
    sent = world.allreduce((bytes_sent() - before) / rounds, "max")
    slowest = np.median(world.allreduce(np.array(seconds), "max"))
    return {"seconds": float(slowest), "bytes": sent}


def main() -> None:
    """Measure each algorithm that there is between nodes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=16.0)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--private", action="store_true", help="not in node-shared memory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    world = mpizero.init()
    count = int(options.megabytes * 2**20) // 4
    array = np.zeros(count, np.float32) if options.private else world.allocate(count, np.float32)
    nodes = world.node_count
    formula = 2 * (nodes - 1) / nodes * array.nbytes
    found = {}
    if world.rank == 0:
        print(f"{nodes} nodes, {world.size} ranks, {array.nbytes / 2**20:g} MiB", end="; ")
        print(f"the formula: {formula / 2**20:.1f} MiB from each node")
    for name in ("native", "ring", "halving_doubling", "hierarchical"):
        if name not in world.algorithms("all_reduce"):
            continue
        found[name] = row = measure(world, array, name, options.rounds)
        if world.rank == 0:
            mib, share = row["bytes"] / 2**20, row["bytes"] / formula if formula else 0.0
            print(f"{name:<17}{row['seconds'] * 1e3:10.1f} ms {mib:10.1f} MiB  x{share:.2f}")
    if world.rank == 0 and options.json:
        options.json.write_text(json.dumps({"nodes": nodes, "ranks": world.size, **found}))


if __name__ == "__main__":
    main()
