"""``MpiProcessGroup``: the core's ``World`` as torch's process group."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Work

from mpizero import World
from mpizero_torch.distributed.arrays import array_of
from mpizero_torch.distributed.backend_view import BackendView
from mpizero_torch.distributed.c10d import BarrierOptions, PrefixStore
from mpizero_torch.distributed.monitored import monitored_barrier
from mpizero_torch.distributed.moving import MovingCalls
from mpizero_torch.distributed.profiled import shown_as
from mpizero_torch.distributed.reducing import ReducingCalls
from mpizero_torch.distributed.staging import SharedBuffers
from mpizero_torch.distributed.works import PendingWork

_BARRIER = BarrierOptions()
_NAME = "mpizero"
_DEVICES = [torch.device("cpu"), torch.device("cuda")]


class MpiProcessGroup(ReducingCalls, MovingCalls):
    """Ranks of the job as torch's process group.

    ``world``: the ranks, whose calls must be in order; it is the group's own. Collectives come from
    one thread at a time, others are refused; messages, and waiting for works, from any.
    """

    def __init__(self, world: World, store: Any, timeout: timedelta, name: str) -> None:
        super().__init__(world.rank, world.size)
        self.world = world
        self._store, self._timeout = store, timeout
        self._buffers = SharedBuffers(world)
        self._is_shut_down = False
        self._group_name, self._group_desc = name, "undefined"

    def getBackendName(self) -> str:  # noqa: N802 (torch's name)
        """The name that it is registered under."""
        return _NAME

    name = _get_backend_name = getBackendName

    def getGroupName(self) -> str:  # noqa: N802 (torch's name)
        """The name that torch has given the group, the same on all of its ranks."""
        return self._group_name

    # torch keeps names in C++ backends, of which there are none here.
    group_name = property(getGroupName)

    def _set_group_name(self, name: str) -> None:
        self._group_name = name

    @property
    def group_desc(self) -> str:
        """What the group is for."""
        return self._group_desc

    def _set_group_desc(self, desc: str) -> None:
        self._group_desc = desc

    def rank(self) -> int:
        """This process's rank in the group."""
        return self.world.rank

    def size(self) -> int:
        """How many ranks there are in the group."""
        return self.world.size

    def get_group_store(self) -> Any:
        """The store that torch has made for the group."""
        return self._store

    @property
    def _device_types(self) -> list[torch.device]:
        return _DEVICES if self.world.device.kind == "cuda" else _DEVICES[:1]

    def _get_backend(self, device: torch.device) -> BackendView:
        # Made anew: the two would refer to each other, and a group that is dropped would stay.
        return BackendView(self, self._buffers)

    def _set_sequence_number_for_group(self) -> None:
        pass  # ranks compare what they do in every call

    def _get_sequence_number_for_group(self) -> int:
        return 0

    def set_timeout(self, timeout: timedelta) -> None:
        """How long a monitored barrier may take; for other calls see ``mpizero.init(timeout=)``."""
        self._timeout = timeout

    @shown_as("barrier", inputs=None)
    def barrier(self, opts: Any = _BARRIER) -> Work:
        """Wait until every rank has come here."""
        handle = self._start(opts, self.world.barrier)
        return self._work(handle, [])

    @shown_as("send")
    def send(self, tensors: Sequence[torch.Tensor], to: int, tag: int) -> Work:
        """Send one tensor to a rank, which receives it with the same tag."""
        (tensor,) = tensors
        message = self.world.send(array_of(tensor), to, tag, asynchronous=True)
        return PendingWork([message], tensors)

    @shown_as("recv")
    def recv(self, tensors: Sequence[torch.Tensor], source: int, tag: int) -> Work:
        """Receive one tensor from a rank."""
        return self._receive(tensors, source, tag)

    @shown_as("recvAnySource")
    def recv_anysource(self, tensors: Sequence[torch.Tensor], tag: int) -> Work:
        """Receive one tensor from whichever rank sends one with the tag."""
        return self._receive(tensors, None, tag)

    def monitored_barrier(
        self, timeout: timedelta | float | None = None, wait_all_ranks: bool = False
    ) -> None:
        """A barrier that says which ranks did not come in time: RuntimeError on all that did."""
        seconds = self._timeout if timeout is None else timeout
        if isinstance(seconds, timedelta):
            seconds = seconds.total_seconds()
        monitored_barrier(self.world, seconds, wait_all_ranks)

    def split_group(
        self,
        new_ranks: Sequence[int],
        timeout: timedelta | None = None,
        opts: Any = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: Any = None,
    ) -> MpiProcessGroup | None:
        """A group of some ranks of this one; None for the others. Collective over those ranks."""
        part = self.world.subworld(list(new_ranks), in_order=True)
        if part is None:
            return None
        name = group_name or f"{self.group_name}:split:{list(new_ranks)}"
        store = PrefixStore(f"{name}/", self._store)
        made = MpiProcessGroup(part, store, timeout or self._timeout, name)
        made._set_group_desc(group_desc or "undefined")
        return made

    def shutdown(self) -> None:
        """Let go of the ranks: each rank for itself, whatever others do.

        What is under way goes on beside the program, at its end too.
        """
        if not self._is_shut_down:
            self._is_shut_down = True
            self.world.let_go()
            self._buffers = SharedBuffers(self.world)

    abort = shutdown

    def _receive(self, tensors: Sequence[torch.Tensor], source: int | None, tag: int) -> Work:
        (tensor,) = tensors
        message = self.world.recv(array_of(tensor), source, tag, asynchronous=True)
        return PendingWork([message], tensors)
