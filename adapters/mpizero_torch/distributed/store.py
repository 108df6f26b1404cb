"""The store that torch wants beside a process group, brought up through MPI.

The backend itself needs none; some of torch does (RPC, barriers of its own, user code). Rank 0
serves a ``TCPStore`` on a port that the system chooses, and tells the others through MPI where.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

from mpizero import World
from mpizero_torch.distributed.c10d import TCPStore

_SOME_ADDRESS = ("192.0.2.1", 9)  # of documentation (RFC 5737); nothing is sent there


def store_of(world: World, timeout: timedelta) -> Any:
    """A store that all ranks share. Collective."""
    with world.together("making the store"):
        store: Any = None
        place: tuple[str, int] | None = None
        if world.rank == 0:
            host = "127.0.0.1" if world.node_count == 1 else _own_address()
            store = _open(host, 0, world.size, timeout, serves=True)
            place = host, store.port
        host, port = world.broadcast_object(place)
        return store or _open(host, port, world.size, timeout, serves=False)


def _open(host: str, port: int, size: int, timeout: timedelta, *, serves: bool) -> Any:
    return TCPStore(host, port, size, serves, timeout, wait_for_workers=False)


def _own_address() -> str:
    """This host's address on the network, without asking for names."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_SOME_ADDRESS)  # chooses a route; a datagram socket sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
