"""One communicator's collectives, by name: picks the algorithm, and the way for device memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from mpizero.collectives.agreement import Agreement
from mpizero.collectives.alone import Alone
from mpizero.collectives.choose import Place, choose, device_order
from mpizero.collectives.direct import Direct
from mpizero.collectives.halving_doubling import HalvingDoubling
from mpizero.collectives.hierarchical import Hierarchical, Levels
from mpizero.collectives.interface import Algorithm
from mpizero.collectives.native import Native
from mpizero.collectives.nccl import Nccl
from mpizero.collectives.node_shared import NodeShared
from mpizero.collectives.plans import Plan, Plans
from mpizero.collectives.ring import Ring
from mpizero.collectives.transport import MpiTransport, cut_evenly
from mpizero.collectives.tuning import Tuning
from mpizero.errors import ArgumentError, MismatchError, in_words
from mpizero.memory.arrays import assign, empty_like, to_host
from mpizero.memory.board import Board
from mpizero.memory.node_shared import NOWHERE, NodeMemory
from mpizero.memory.order import Order, Touched
from mpizero.memory.staging import Run, staged
from mpizero.reduction import Operation
from mpizero.world.device import CudaDevice, Device
from mpizero.world.nodes import Nodes
from mpizero.world.startup import load_mpi, thread_level

if TYPE_CHECKING:
    from mpi4py import MPI

_ALONE = Alone()

# Up to this size it takes less to reduce for all than to collect what each has reduced.
_SMALL_BYTES = 64 << 10

_ON_ONE_NODE: tuple[type[Algorithm], ...] = (Native, Ring, HalvingDoubling, NodeShared)

# All ranks' arrays, where they lie at one spot of node-shared memory and are ready to be reduced.
Parts = Sequence[Any] | None

Use = Callable[[list[Any]], None]


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
        nodes: Nodes,
        tuning: Tuning,
        crowded: bool,
    ) -> None:
        self._tuning, self._nodes = tuning, nodes
        self._compares_all = os.environ.get("MPIZERO_DEBUG", "0") not in ("", "0")
        self.comm = comm
        self._one_node = len(nodes) == 1
        self._rank, self._size = comm.rank, comm.size
        self._device = device
        self._order: Order | None = None  # of the work being done, if it is on device memory
        self._stream: Any = None  # on which this one's kernels run: its order is the ranks' own
        self._node_memory = node_memory
        self._cuda_aware = cuda_aware
        self._algorithms: dict[str, Algorithm] = {}
        self._enqueues: dict[str, Nccl] = {}  # those that go from GPU to GPU
        self._node_shared: NodeShared | None = None
        # By which algorithm the last collective went; "" where none was needed. For timelines.
        self.last_algorithm = ""
        self.board: Board | None = None
        if comm.size > 1:
            # Made now, not when first asked for: making them is collective, asking is not.
            self._make_algorithms(node_memory, Board.open(node_memory, crowded))
        self._agreement = Agreement(comm, self.board)
        self._blockwise = Direct(MpiTransport(comm, device))
        self.plans: Plans | None = None
        if self.board is not None and self._node_shared is not None:
            self.plans = Plans(self.board, self._agreement, node_memory, self._node_shared)

    def order(self, touched: Touched) -> Order | None:
        """The place of work on device memory among the streams, as the submitting thread sees it.

        None for the host.
        """
        if any(self._device.is_device_array(array) for array in touched.arrays):
            return Order(self._device, touched)
        return None

    @contextmanager
    def in_order(self, order: Order | None) -> Iterator[None]:
        """Around work: on device memory its kernels run in their place."""
        if order is None:
            yield
            return
        if self._stream is None:
            self._stream = self._device.new_stream()
        with order.section(self._stream):
            before, self._order = self._order, order
            try:
                yield
            finally:
                self._order = before

    def room(self, allocate: Callable[[], Any]) -> Any:
        """Memory for a result that is to be the caller's, in the midst of its call."""
        return allocate() if self._order is None else self._order.room(allocate)

    def agree(
        self, call: str, arrays: Sequence[Any] = (), items: Sequence[str] = (), sure: bool = False
    ) -> Parts:
        """Make sure that all ranks do the same (see ``Agreement.reach``), and are ready for it.

        Returns the counterparts of the first array if it lies in node-shared memory. Calls that are
        ``sure`` to be the same are not compared where that would cost a message (unless
        ``MPIZERO_DEBUG`` is set).
        """
        if self._size == 1 or (sure and self.board is None and not self._compares_all):
            return None
        spot = self._node_shared.spot(arrays[0]) if self._node_shared and arrays else NOWHERE
        common = self._agreement.reach(call, spot, items)
        if common is None or common == NOWHERE:
            return None
        return self._node_memory.counterparts(arrays[0], common)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Within a call: a rank that fails in here tells the others, who raise MismatchError.

        All of them agree in the end that ``what`` holds.
        """
        try:
            yield
        except Exception as error:
            # They may fail as well, each of its own error.
            with suppress(MismatchError):
                self.agree(f"refused: {in_words(error)}")
            raise
        self.agree(what)

    def plan(self, array: Any, op: Operation, algorithm: str, what: str) -> Plan | None:
        """Keep, and return, a plan for all-reduces of host arrays like this one."""
        if self.plans is None or not isinstance(array, np.ndarray):
            return None
        shared, private = (
            self._choose(algorithm, "all_reduce", array, op.name, lies_shared)
            for lies_shared in (True, False)
        )
        return self.plans.make(array, algorithm, op, what, shared, private)

    def all_reduce(
        self, array: Any, op: Operation, algorithm: str = "auto", parts: Parts = None
    ) -> None:
        """In place; ``parts``: what ``agree`` has returned for the array."""
        enqueuing = self._enqueuing(algorithm, "all_reduce", array)
        if enqueuing is not None:
            enqueuing.all_reduce(array, op)
        elif self._must_stage(array):
            row = array.reshape(1, -1)
            self._stage(row, row, lambda host, _: self.all_reduce(host, op, algorithm))
        else:
            found = self._choose(algorithm, "all_reduce", array, op.name, parts is not None)
            if parts is not None and isinstance(found, NodeShared):
                found.all_reduce_parts(parts, op)
            else:
                found.all_reduce(array, op)

    def reduce_scatter(
        self, array: Any, out: Any, op: Operation, algorithm: str = "auto", parts: Parts = None
    ) -> None:
        enqueuing = self._enqueuing(algorithm, "reduce_scatter", array)
        if enqueuing is not None:
            enqueuing.reduce_scatter(array, out, op)
        elif self._must_stage(array):
            rows, row = array.reshape(self._size, -1), out.reshape(1, -1)
            self._stage(rows, row, lambda x, y: self.reduce_scatter(x, y, op, algorithm))
        else:
            found = self._choose(algorithm, "reduce_scatter", array, op.name, parts is not None)
            if parts is not None and isinstance(found, NodeShared):
                found.reduce_scatter_parts(parts, out, op)
            else:
                found.reduce_scatter(array, out, op)

    def all_gather(self, block: Any, out: Any, algorithm: str = "auto") -> None:
        enqueuing = self._enqueuing(algorithm, "all_gather", out)
        if enqueuing is not None:
            enqueuing.all_gather(block, out)
        elif self._must_stage(out):
            row, rows = block.reshape(1, -1), out.reshape(self._size, -1)
            self._stage(row, rows, lambda x, y: self.all_gather(x, y, algorithm))
        else:
            self._choose(algorithm, "all_gather", out, None).all_gather(block, out)

    def broadcast(self, array: Any, root: int, algorithm: str = "auto") -> None:
        enqueuing = self._enqueuing(algorithm, "broadcast", array)
        if enqueuing is not None:
            enqueuing.broadcast(array, root)
        elif self._must_stage(array):
            row, is_root = array.reshape(1, -1), self._rank == root
            source, target = (row, None) if is_root else (None, row)
            self._stage(source, target, lambda x, _: self.broadcast(x, root, algorithm))
        else:
            self._choose(algorithm, "broadcast", array, None).broadcast(array, root)

    def all_to_all(self, array: Any, out: Any, algorithm: str = "auto") -> None:
        enqueuing = self._enqueuing(algorithm, "all_to_all", array)
        if enqueuing is not None:
            enqueuing.all_to_all(array, out)
        elif self._must_stage(array):
            rows, result = array.reshape(self._size, -1), out.reshape(self._size, -1)
            self._stage(rows, result, lambda x, y: self.all_to_all(x, y, algorithm))
        else:
            self._choose(algorithm, "all_to_all", array, None).all_to_all(array, out)

    def reduce(self, array: Any, root: int, op: Operation, parts: Parts = None) -> None:
        """Combine ``array`` over all ranks into the root's; the others' stay as they are."""
        is_root = self._rank == root
        if array.nbytes <= _SMALL_BYTES or self._size == 1:
            self.all_reduce(array if is_root else array.copy(), op)
            return
        blocks = cut_evenly(array.size, self._size)
        mine = blocks[self._rank]
        own = empty_like(array, (mine.stop - mine.start,))

        def finish(rows: list[Any]) -> None:
            total = op.accumulator(rows[0])
            if len(rows) > 1:
                op.accumulate(rows, total)
            op.finish_into(total, own)

        self.combine_block(array, blocks, op, parts, finish)
        self._gather(own, array if is_root else None, blocks, root)

    def gather(self, block: Any, out: Any, root: int) -> None:
        """Put every rank's ``block`` (k) into the root's ``out`` (size * k)."""
        self._gather(block, out, cut_evenly(block.size * self._size, self._size), root)

    def scatter(self, array: Any, out: Any, root: int) -> None:
        """Give rank r block r of the root's ``array`` (size * k) in ``out`` (k)."""
        blocks = cut_evenly(out.size * self._size, self._size)
        enqueuing = self._nccl_for(out)
        if enqueuing is not None:
            enqueuing.scatter(array, out, blocks, root)
            return
        host = self._host(out)
        self._direct.scatter(array if array is None else self._host(array), host, blocks, root)
        self._put(host, out)

    def all_to_all_blocks(
        self, array: Any, blocks: Sequence[slice], out: Any, places: Sequence[slice]
    ) -> None:
        """Send ``array[blocks[r]]`` to rank r; ``out[places[s]]`` comes from rank s."""
        enqueuing = self._nccl_for(out)
        if enqueuing is not None:
            enqueuing.exchange_all(array, blocks, out, places)
            return
        host = self._host(out)
        self._direct.exchange_all(self._host(array), blocks, host, places)
        self._put(host, out)

    def combine_block(
        self, array: Any, blocks: Sequence[slice], op: Operation, parts: Parts, use: Use
    ) -> None:
        """See ``Algorithm.combine_block``; ``parts``: what ``agree`` has returned for the array."""
        enqueuing = self._enqueuing("auto", "combine_block", array)
        if enqueuing is not None:
            enqueuing.combine_block(array, blocks, op, use)
            return
        found = self._for_blocks(array)
        if self._must_stage(array):

            def use_on_device(rows: list[Any]) -> None:
                total = empty_like(array, rows[0].shape, rows[0].dtype)
                assign(total, rows[0])
                use([total])

            found.combine_block(to_host(array), blocks, op, use_on_device)
        elif parts is not None and isinstance(found, NodeShared):
            found.combine_block_parts(parts, blocks, use)
        else:
            found.combine_block(array, blocks, op, use)

    def gather_blocks(self, array: Any, blocks: Sequence[slice], parts: Parts) -> None:
        """See ``Algorithm.gather_blocks``; ``parts``: what ``agree`` has returned for the array."""
        enqueuing = self._enqueuing("auto", "gather_blocks", array)
        if enqueuing is not None:
            enqueuing.gather_blocks(array, blocks)
            return
        found = self._for_blocks(array)
        if self._must_stage(array):
            host = to_host(array)
            found.gather_blocks(host, blocks)
            assign(array, host)
        elif parts is not None and isinstance(found, NodeShared):
            found.gather_blocks_parts(parts, blocks)
        else:
            found.gather_blocks(array, blocks)

    def barrier(self) -> None:
        """Wait for all ranks; what each has stored in shared memory before, all see after."""
        if self._node_shared is not None:
            self._node_shared.barrier()
        elif self._size > 1:
            self.comm.Barrier()

    def able(self, collective: str, on_device: bool = False) -> tuple[str, ...]:
        """The algorithms that offer ``collective``, of arrays on the host or ``on_device``."""
        if self._size == 1:
            known: tuple[type[Algorithm], ...] = _ON_ONE_NODE + ((Nccl,) if on_device else ())
            return tuple(each.name for each in known if each.knows(collective))
        there = {**self._algorithms, **(self._enqueues if on_device else {})}
        return tuple(name for name, each in there.items() if each.offers(collective))

    def check(self, algorithm: str, collective: str, array: Any) -> None:
        """Raise ArgumentError unless ``algorithm`` is "auto" or one for ``collective`` of array."""
        if algorithm == "auto":
            return
        able = self.able(collective, self._device.is_device_array(array))
        if algorithm not in able:
            function = f"{collective.replace('all_reduce', 'allreduce')}()"
            function = function.replace("all_gather", "allgather")
            raise ArgumentError(function, "algorithm", repr(algorithm), ", ".join(("auto", *able)))

    def _make_algorithms(self, memory: NodeMemory, board: Board | None) -> None:
        transport = MpiTransport(self.comm, self._device)
        own: list[Algorithm] = [
            Native(self.comm, self._device),
            Ring(transport),
            HalvingDoubling(transport),
        ]
        # No room for a board on one node: none of the others may count on it either. Nor on a GPU
        # that one of them has not.
        has = np.array([board is not None, isinstance(self._device, CudaDevice)], np.int64)
        self.comm.Allreduce(load_mpi().IN_PLACE, has, load_mpi().MIN)
        room = bool(has[0])
        if has[1] and isinstance(self._device, CudaDevice):
            nccl = Nccl(self.comm, self._device)
            self._enqueues[nccl.name] = nccl
        if self._one_node and room and board is not None:
            self.board = board
            self._node_shared = NodeShared(memory, board)
            own.append(self._node_shared)
        elif room and board is not None:
            levels, node = Levels.of(self.comm, self._nodes), NodeShared(memory, board)
            threaded = thread_level() == "multiple"
            own.append(Hierarchical(self.comm, levels, node, self._device, threaded))
        self._algorithms = {algorithm.name: algorithm for algorithm in own}

    def close(self) -> None:
        """Give back what the algorithms have of their own. Collective."""
        found = self._algorithms.get(Hierarchical.name)
        if isinstance(found, Hierarchical):
            found.close()
        for each in self._enqueues.values():
            each.close()

    def abandon(self) -> None:
        """A rank has died: end what waits for it. Not collective."""
        for each in self._enqueues.values():
            each.abandon()

    def ways_of_devices(self) -> dict[str, str]:
        """The algorithms from GPU to GPU, and why not, where one cannot be had ("": it can)."""
        return {name: each.reason for name, each in self._enqueues.items()}

    def _enqueuing(self, name: str, collective: str, array: Any) -> Nccl | None:
        """The algorithm that takes ``array`` from GPU to GPU. Collective, if there may be one."""
        if self._size == 1 or not self._on_device(array):
            return None
        if name == "auto":
            names = device_order(array.nbytes, self._one_node, self._tuning)
        else:
            names = [name]
        for each in names:
            found = self._enqueues.get(each)
            if found is not None and found.offers(collective):
                if name == "auto" and not found.connect():
                    continue
                self.last_algorithm = found.name
                return found
        return None

    def _nccl_for(self, array: Any) -> Nccl | None:
        """NCCL, for blocks that go to anybody, where "auto" may take it."""
        found = self._enqueuing("auto", "all_to_all", array)
        return found if isinstance(found, Nccl) else None

    def _choose(
        self, name: str, collective: str, array: Any, op: str | None, lies_shared: bool = False
    ) -> Algorithm:
        if self._size == 1:
            return _ALONE
        if name == "auto":
            where = Place(self._one_node, lies_shared, self._on_device(array))
            name = choose(collective, array.nbytes, array.dtype, op, where, self._tuning)
            found = self._algorithms.get(name)
            if found is None or not found.offers(collective):
                name = Native.name
        self.last_algorithm = name
        return self._algorithms[name]

    def _for_blocks(self, array: Any) -> Algorithm:
        if self._size == 1:
            return _ALONE
        if self._node_shared is not None and not self._on_device(array):
            self.last_algorithm = NodeShared.name
            return self._node_shared
        self.last_algorithm = Ring.name
        return self._algorithms[Ring.name]

    def _gather(self, block: Any, out: Any, blocks: Sequence[slice], root: int) -> None:
        enqueuing = self._nccl_for(block)
        if enqueuing is not None:
            enqueuing.gather(block, out, blocks, root)
            return
        host = out if out is None else self._host(out)
        self._direct.gather(self._host(block), host, blocks, root)
        if out is not None:
            self._put(host, out)

    def _host(self, array: Any) -> Any:
        """What MPI can take of ``array``: itself, or a copy of device memory on the host."""
        return to_host(array) if self._must_stage(array) else array

    def _put(self, host: Any, array: Any) -> None:
        if host is not array:
            assign(array, host)

    @property
    def _direct(self) -> Direct:
        self.last_algorithm = Direct.name
        return self._blockwise

    def _must_stage(self, array: Any) -> bool:
        return self._on_device(array) and self._size > 1 and not self._cuda_aware

    def _on_device(self, array: Any) -> bool:
        """RuntimeError for device memory which the work that is being done has not named."""
        if not self._device.is_device_array(array):
            return False
        if self._order is None:
            raise RuntimeError("device memory in work that was submitted without it")
        return True

    def _stage(self, source: Any, target: Any, run: Run) -> None:
        if not isinstance(self._device, CudaDevice):
            raise ArgumentError(
                "a collective", "x", "an array on a GPU", "host memory",
                "This rank has no CUDA device of its own (is CuPy installed?).",
            )  # fmt: skip
        staged(self._device, source, target, run)
