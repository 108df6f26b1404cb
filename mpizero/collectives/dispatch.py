"""One communicator's collectives, by name: picks the algorithm, and the way for device memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mpizero.collectives.alone import Alone
from mpizero.collectives.choose import Place, choose
from mpizero.collectives.halving_doubling import HalvingDoubling
from mpizero.collectives.hierarchical import Hierarchical, Levels
from mpizero.collectives.interface import Algorithm
from mpizero.collectives.native import Native
from mpizero.collectives.node_shared import SMALL_BYTES, NodeShared
from mpizero.collectives.ring import Ring
from mpizero.collectives.transport import MpiTransport
from mpizero.collectives.tuning import Tuning
from mpizero.errors import ArgumentError
from mpizero.memory.node_shared import NodeMemory
from mpizero.memory.staging import Run, fence, staged
from mpizero.reduction import Operation
from mpizero.world.device import CudaDevice, Device
from mpizero.world.startup import thread_level

if TYPE_CHECKING:
    from mpi4py import MPI

_ALONE = Alone()


class Dispatch:
    """Runs collectives over ``comm`` on contiguous 1-D arrays that all ranks agree on.

    Device arrays go to MPI as they are if it is ``cuda_aware``, else through pinned host memory.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        device: Device,
        cuda_aware: bool,
        node_memory: NodeMemory,
        tuning: Tuning,
        crowded: bool,
    ) -> None:
        self._crowded = crowded  # more ranks than cores on this node
        self._tuning = tuning
        self.comm = comm
        self._node_memory = node_memory
        self._one_node = node_memory.comm.size == comm.size
        self._rank, self._size = comm.rank, comm.size
        self._device = device
        self._cuda_aware = cuda_aware
        self._transport = MpiTransport(comm, device)

    def mark(self, arrays: Sequence[Any], stream: int | None = None) -> Any:
        """What the submitting thread has queued on ``arrays``' device, as an event to wait for.

        On CuPy's current stream, or on the raw ``stream`` of another library. None for the host.
        """
        if any(self._device.is_device_array(array) for array in arrays):
            return self._device.record(stream)
        return None

    def run_after(self, event: Any, work: Callable[[], Any]) -> Any:
        """Do ``work`` once what ``event`` marks has been done; device work is finished after."""
        if event is None:
            return work()
        with fence(self._device, event):
            return work()

    def lies_shared(self, arrays: Sequence[Any]) -> bool:
        """Does the first array lie in memory that all ranks share? (False for small ones.)

        False on several nodes, where one may have had no room to share while another had.
        """
        if not arrays or not self._one_node or arrays[0].nbytes <= SMALL_BYTES:
            return False
        return self._node_memory.find(arrays[0]) is not None

    def all_reduce(
        self, array: Any, op: Operation, algorithm: str = "auto", shared: bool = False
    ) -> None:
        """In place; ``shared`` (the same on all ranks): the array lies in node-shared memory."""
        if self._must_stage(array):
            row = array.reshape(1, -1)
            self._stage(row, row, lambda host, _: self.all_reduce(host, op, algorithm))
        else:
            found = self._find(algorithm, "all_reduce", array, op.name, shared)
            found.all_reduce(array, op)

    def reduce_scatter(
        self, array: Any, out: Any, op: Operation, algorithm: str = "auto", shared: bool = False
    ) -> None:
        if self._must_stage(array):
            rows, row = array.reshape(self._size, -1), out.reshape(1, -1)
            self._stage(rows, row, lambda x, y: self.reduce_scatter(x, y, op, algorithm))
        else:
            found = self._find(algorithm, "reduce_scatter", array, op.name, shared)
            found.reduce_scatter(array, out, op)

    def all_gather(self, block: Any, out: Any, algorithm: str = "auto") -> None:
        if self._must_stage(out):
            row, rows = block.reshape(1, -1), out.reshape(self._size, -1)
            self._stage(row, rows, lambda x, y: self.all_gather(x, y, algorithm))
        else:
            self._find(algorithm, "all_gather", out, None).all_gather(block, out)

    def broadcast(self, array: Any, root: int, algorithm: str = "auto") -> None:
        if self._must_stage(array):
            row, is_root = array.reshape(1, -1), self._rank == root
            source, target = (row, None) if is_root else (None, row)
            self._stage(source, target, lambda x, _: self.broadcast(x, root, algorithm))
        else:
            self._find(algorithm, "broadcast", array, None).broadcast(array, root)

    def all_to_all(self, array: Any, out: Any, algorithm: str = "auto") -> None:
        if self._must_stage(array):
            rows, result = array.reshape(self._size, -1), out.reshape(self._size, -1)
            self._stage(rows, result, lambda x, y: self.all_to_all(x, y, algorithm))
        else:
            self._find(algorithm, "all_to_all", array, None).all_to_all(array, out)

    def able(self, collective: str) -> tuple[str, ...]:
        """The algorithms that offer ``collective``."""
        return tuple(name for name, each in self._algorithms.items() if each.offers(collective))

    def check(self, algorithm: str, collective: str) -> None:
        """Raise ArgumentError unless ``algorithm`` is "auto" or one that offers ``collective``."""
        if algorithm == "auto":
            return
        able = self.able(collective)
        if algorithm not in able:
            function = f"{collective.replace('all_reduce', 'allreduce')}()"
            function = function.replace("all_gather", "allgather")
            raise ArgumentError(function, "algorithm", repr(algorithm), ", ".join(("auto", *able)))

    @cached_property
    def _algorithms(self) -> dict[str, Algorithm]:
        own: list[Algorithm] = [
            Native(self.comm, self._device),
            Ring(self._transport),
            HalvingDoubling(self._transport),
        ]
        if self._one_node:
            own.append(NodeShared(self.comm, self._node_memory, self._crowded))
        else:
            node = self._node_memory.comm
            leader = node.bcast(self._rank)
            levels = Levels.of(self.comm, leader, node.rank)
            threaded = thread_level() == "multiple"
            own.append(
                Hierarchical(
                    self.comm, levels, self._node_memory, self._device, self._crowded, threaded
                )
            )
        return {algorithm.name: algorithm for algorithm in own}

    def _find(
        self, name: str, collective: str, array: Any, op: str | None, shared: bool = False
    ) -> Algorithm:
        if self._size == 1:
            return _ALONE
        if name == "auto":
            where = Place(self._one_node, shared, self._device.is_device_array(array))
            name = choose(collective, array.nbytes, array.dtype, op, where, self._tuning)
            if not self._algorithms[name].offers(collective):
                name = "native"
        return self._algorithms[name]

    def _must_stage(self, array: Any) -> bool:
        return self._size > 1 and not self._cuda_aware and self._device.is_device_array(array)

    def _stage(self, source: Any, target: Any, run: Run) -> None:
        if not isinstance(self._device, CudaDevice):
            raise ArgumentError(
                "a collective", "x", "an array on a GPU", "host memory",
                "This rank has no CUDA device of its own (is CuPy installed?).",
            )  # fmt: skip
        staged(self._device, None, source, target, run)
