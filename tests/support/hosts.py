"""Emulated hosts: an MPI job whose nodes are network namespaces of this machine, on slow links.

Each host has its own name and address, so that MPI sees several nodes, and a link whose rate is
limited in both directions (``tc tbf``). Cores, files and /dev/shm are those of the machine. All of
it lives in namespaces of one process, with which the kernel takes it away, however the run ends.

Run as a program (``python -m support.hosts``) it makes the hosts, within those namespaces.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from support.launch import Finished, find_mpirun, is_openmpi, launch_environment, run

_NETWORK = "10.213.7"
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux"}
_ISOLATE = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]


@cache
def why_no_hosts() -> str:
    """Why this machine cannot emulate hosts; "" if it can."""
    missing = {package for tool, package in _TOOLS.items() if shutil.which(tool) is None}
    if missing:
        return f"apt-get install {' '.join(sorted(missing))}"
    if os.geteuid() != 0:
        return "namespaces take root"
    trial = "ip link add one type veth peer name two && tc qdisc add dev one root tbf rate 1mbit "
    trial += "burst 64kb latency 100ms && ip link add switch type bridge"
    done = subprocess.run([*_ISOLATE, "sh", "-c", trial], capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else ""


def mpirun_on_hosts(
    hosts: int,
    ranks_per_host: int,
    rate: str,
    arguments: Sequence[str],
    timeout: float = 60,
    env: Mapping[str, str | None] | None = None,
) -> Finished:
    """``mpirun python ARGUMENTS`` on so many emulated hosts; ``rate`` is that of each link.

    Raises LaunchTimeoutError as ``support.launch.mpirun`` does.
    """
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        plan = Path(folder) / "plan.json"
        agent = Path(folder) / "agent"
        agent.write_text(_AGENT)
        agent.chmod(0o755)
        addresses = [f"{_NETWORK}.{index + 1}" for index in range(hosts)]
        launcher = _launcher(addresses, ranks_per_host, str(agent))
        command = [*launcher, sys.executable, *arguments]
        plan.write_text(json.dumps({"addresses": addresses, "rate": rate, "command": command}))
        network = {"FI_PROVIDER": "tcp", "UCX_TLS": "tcp,self"}
        environment = launch_environment({**network, **(env or {})})
        isolated = [*_ISOLATE, sys.executable, "-m", "support.hosts", str(plan)]
        environment["PYTHONPATH"] += f":{Path(__file__).parents[1]}"
        return run(isolated, environment, timeout)


# Takes the place of ssh: [OPTION ...] ADDRESS COMMAND ..., the command as words of a shell.
_AGENT = f"""#!/bin/sh
while [ $# -gt 0 ]; do
    case "$1" in
        {_NETWORK}.*) break ;;
        *) shift ;;
    esac
done
address=$1
shift
exec ip netns exec "$address" unshare --uts sh -c 'hostname "host-$0"; eval "$1"' \\
    "${{address##*.}}" "$*"
"""


def _launcher(addresses: Sequence[str], per_host: int, agent: str) -> list[str]:
    mpirun, ranks = find_mpirun(sys.executable), str(len(addresses) * per_host)
    slots = ",".join(f"{address}:{per_host}" for address in addresses)
    if not is_openmpi(mpirun):
        where = ["-launcher", "ssh", "-launcher-exec", agent, "-iface", "eth0", "-hosts", slots]
        return [mpirun, *where, "-ppn", str(per_host), "-n", ranks]
    network = f"{_NETWORK}.0/24"
    runtime = {"plm": "ssh", "plm_ssh_agent": agent, "prte_if_include": network}
    library = {
        "pml": "ob1", "btl": "self,sm,tcp", "btl_tcp_if_include": network, "osc": "^ucx",
        "mpi_yield_when_idle": "1",
    }  # fmt: skip
    options = [word for pair in runtime.items() for word in ("--prtemca", *pair)]
    options += [word for pair in library.items() for word in ("--mca", *pair)]
    bind = ["--oversubscribe", "--bind-to", "none"]
    return [mpirun, *options, *bind, "--host", slots, "-n", ranks]


def _make_hosts(addresses: Sequence[str], rate: str) -> None:
    limit = f"root tbf rate {rate} burst 64kb latency 200ms"
    _shell("mkdir -p /run/netns && mount -t tmpfs tmpfs /run/netns")
    _shell("ip link add switch type bridge && ip link set switch up")
    for index, address in enumerate(addresses):
        port = f"port{index}"
        inside = f"ip -n {address}"
        _shell(f"ip netns add {address}")
        _shell(f"ip link add {port} type veth peer name eth0 netns {address}")
        _shell(f"ip link set {port} master switch up && tc qdisc add dev {port} {limit}")
        _shell(f"{inside} address add {address}/24 dev eth0 && {inside} link set lo up")
        _shell(f"{inside} link set eth0 up && tc -n {address} qdisc add dev eth0 {limit}")


def _shell(line: str) -> None:
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{line}: {done.stderr.strip()}")


def main() -> int:
    """Within the namespaces: make the hosts, and start the job from the first of them."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    _make_hosts(plan["addresses"], plan["rate"])
    first = ["ip", "netns", "exec", plan["addresses"][0], "unshare", "--uts", "sh", "-c"]
    line = f"hostname host-1; exec {shlex.join(plan['command'])}"
    return subprocess.run([*first, line]).returncode


if __name__ == "__main__":
    sys.exit(main())
