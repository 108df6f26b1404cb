"""Saying in the environment who this rank is, for programs that ask torchrun's variables."""

from __future__ import annotations

import os
import socket
import weakref

from mpizero import World
from mpizero.diagnostics.siblings import launcher
from mpizero.world.children import is_child
from mpizero.world.launcher import Launch, ranks_can_be_told, read_launch
from mpizero.world.variables import ADDRESS, own, say

# Below those that systems give away by themselves.
_FIRST_PORT, _PORTS = 20_000, 10_000
_TORCHS_PORT = 29_500
_LOOPBACK = "127.0.0.1"

_said_for: weakref.ref[World] | None = None


def say_from_launcher(function: str) -> None:
    """Before MPI has started: set what the launcher has told this process, if one has.

    Where the ranks lie on several nodes, ``say_from_world`` knows the rest. Raises LaunchError
    where somebody else has set something else.
    """
    launch = read_launch(os.environ)
    if launch is None or not ranks_can_be_told(launch, os.environ):
        return
    if _said_for is not None or (is_child() and own(os.environ)):
        return
    told = {"RANK": str(launch.rank), "WORLD_SIZE": str(launch.size)}
    if launch.local_rank is not None:
        told["LOCAL_RANK"] = str(launch.local_rank)
    if launch.local_size is not None:
        told["LOCAL_WORLD_SIZE"] = str(launch.local_size)
    if _is_on_one_node(launch):
        address = dict(zip(ADDRESS, (_LOOPBACK, str(_port_of_job())), strict=True))
        told |= {"GROUP_RANK": "0", **address}
    say(os.environ, told, launch.launcher, function)


def say_from_world(world: World) -> None:
    """MPI runs: set all of them. Collective, the first time.

    ``world``: of all ranks of the job. Does nothing for a process that no launcher has started.
    Raises LaunchError where somebody else has set something else.
    """
    global _said_for
    launch = read_launch(os.environ)
    if world.size == 1 and (launch is None or launch.size != 1):
        return
    if _said_for is not None and _said_for() is world:
        return
    told = {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(world.local_rank),
        "LOCAL_WORLD_SIZE": str(world.local_size),
        "GROUP_RANK": str(world.node_index),
        **_address(world),
    }
    say(os.environ, told, "MPI", "init()")
    _said_for = weakref.ref(world)


def _address(world: World) -> dict[str, str]:
    """Where programs may open a store of their own; torch's is brought up through MPI."""
    if _said_for is not None:  # ranks have died, and who is left need not come here together
        return {name: value for name, value in own(os.environ).items() if name in ADDRESS}
    host, port = _LOOPBACK, _port_of_job()
    if world.node_count > 1:
        host, port = world.broadcast_object((socket.gethostname(), _free_port()))
    return dict(zip(ADDRESS, (host, str(port)), strict=True))


def _is_on_one_node(launch: Launch) -> bool:
    return launch.local_size is not None and launch.local_size == launch.size


def _port_of_job() -> int:
    """A port that all ranks of this node agree upon, and those of another job hardly do."""
    process = launcher()
    return _TORCHS_PORT if process is None else _FIRST_PORT + process % _PORTS


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
