"""Collectives in two levels: shared memory inside a node, messages between nodes.

Only node-level sums travel: each rank combines one slice over its node, exchanges it with the ranks
of the other nodes that have the same place on theirs (its *column*), and hands the result to its
node. So a byte crosses a node's link as often as if the node were a single rank, however many
ranks share it. Large arrays go chunk by chunk: while one chunk is on the network, the next is
combined in the node.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpizero.collectives.halving_doubling import HalvingDoubling
from mpizero.collectives.interface import Algorithm, TwoPhase
from mpizero.collectives.node_shared import NodeShared
from mpizero.collectives.ring import Ring
from mpizero.collectives.transport import MpiTransport, cut_evenly
from mpizero.diagnostics import serve
from mpizero.memory.dtypes import is_half
from mpizero.reduction import Operation
from mpizero.world.device import Device
from mpizero.world.startup import load_mpi
from mpizero.world.survival import track

if TYPE_CHECKING:
    from mpi4py import MPI

# Between nodes, small slices want few messages and large ones few bytes.
_RING_FROM_BYTES = 1 << 20


@dataclass(frozen=True)
class Levels:
    """The two levels of a communicator: its nodes, and this rank's column.

    ``rank_at[m][i]`` is the i-th rank of node m. Column i is of the i-th ranks of all nodes, and
    *in the order of the nodes*, wherever the nodes' ranks lie in the communicator: rank m of a
    column is on node m. There are as many columns as the smallest node has ranks: on larger nodes
    the ranks beyond them work inside the node only and have no ``column``.
    """

    rank_at: tuple[tuple[int, ...], ...]
    columns: int
    column: MPI.Intracomm | None

    @classmethod
    def of(cls, comm: MPI.Intracomm, nodes: tuple[tuple[int, ...], ...]) -> Levels:
        """The levels of ``comm``, whose ranks lie on ``nodes`` as listed. Collective."""
        mpi = load_mpi()
        columns = min(len(ranks) for ranks in nodes)
        node = next(at for at, ranks in enumerate(nodes) if comm.rank in ranks)
        place = nodes[node].index(comm.rank)
        column: Any = comm.Split(place if place < columns else mpi.UNDEFINED, key=node)
        return cls(nodes, columns, None if column == mpi.COMM_NULL else track(column))

    def free(self) -> None:
        """Give the communicator back. Collective."""
        if self.column is not None:
            self.column.Free()

    @property
    def even(self) -> bool:
        """Do all nodes have the same number of ranks?"""
        return all(len(ranks) == self.columns for ranks in self.rank_at)


class Hierarchical(Algorithm):
    name = "hierarchical"

    def __init__(
        self,
        comm: MPI.Intracomm,
        levels: Levels,
        node: NodeShared,
        device: Device,
        threaded: bool,
    ) -> None:
        self.rank, self.size = comm.rank, comm.size
        self._levels = levels
        self._node = node
        # Chunks must be cut alike on all nodes, also where one keeps the array in shared memory and
        # another passes it through slots, or has room for small slots only. On the network a chunk
        # takes much longer than a message's latency.
        self._chunk_bytes: int = comm.allreduce(node.slot_bytes, load_mpi().MIN)
        self._ring: TwoPhase | None = None
        self._halving: TwoPhase | None = None
        if levels.column is not None:
            transport = MpiTransport(levels.column, device)
            self._ring, self._halving = Ring(transport), HalvingDoubling(transport)
        # The network's part of the pipeline; needs MPI_THREAD_MULTIPLE.
        self._network = ThreadPoolExecutor(1, "mpizero-network", serve) if threaded else None

    def close(self) -> None:
        """Collective."""
        if self._network is not None:
            self._network.shutdown()
        self._levels.free()

    def all_reduce(self, array: Any, op: Operation) -> None:
        """Combine in the node, across nodes, and share in the node: a pipeline over chunks."""
        parts = self._node.counterparts(array)
        width = max(1, self._chunk_bytes // array.itemsize)
        crossing: tuple[slice, Callable[[], Any]] | None = None
        for start in range(0, array.size, width):
            chunk = slice(start, min(start + width, array.size))
            total = self._combine(array, parts, chunk, op)
            arrived = self._start(total, array.dtype, op)
            if crossing is not None:
                self._share(array, parts, *crossing)
            crossing = chunk, arrived
        if crossing is not None:
            self._share(array, parts, *crossing)
        if parts is not None:
            self._node.barrier()

    def broadcast(self, array: Any, root: int) -> None:
        """To the root's column, then inside each node."""
        at_node, at_place = self._locate(root)
        if at_place >= self._levels.columns:  # a rank without a column hands over to the first
            if self.rank in self._levels.rank_at[at_node]:
                self._node.broadcast(array, at_place)
            at_place = 0
        if self._node.rank == at_place:
            self._between(array.nbytes).broadcast(array, at_node)
        self._node.broadcast(array, at_place)

    def all_gather(self, block: Any, out: Any) -> None:
        """Along the columns, then inside each node; nodes must have equally many ranks."""
        nodes, places = len(self._levels.rank_at), self._levels.columns
        column = np.empty(nodes * block.size, block.dtype)
        self._between(column.nbytes).all_gather(block, column)
        everything = np.empty(out.size, out.dtype)
        self._node.all_gather(column, everything)
        blocks = everything.reshape(places, nodes, -1)
        rows = out.reshape(self.size, -1)
        for node, ranks in enumerate(self._levels.rank_at):
            for place, rank in enumerate(ranks):
                rows[rank] = blocks[place, node]

    def reduce_scatter(self, array: Any, out: Any, op: Operation) -> None:
        """Each place combines its column's blocks in the node, then they are exchanged."""
        levels = self._levels
        order = [ranks[place] for place in range(levels.columns) for ranks in levels.rank_at]
        by_place = np.ascontiguousarray(array.reshape(self.size, -1)[order]).reshape(-1)
        sums = Operation(op.name, op.function)  # not finished before all nodes' shares are in
        if is_half(array.dtype):
            by_place = op.accumulator(by_place)
        column = np.empty(by_place.size // self._levels.columns, by_place.dtype)
        self._node.reduce_scatter(by_place, column, sums)
        total = np.empty(out.size, column.dtype)
        self._between(column.nbytes).reduce_scatter(column, total, sums)
        op.finish_into(total, out)

    def offers(self, collective: str) -> bool:
        if collective in ("all_gather", "reduce_scatter") and not self._levels.even:
            return False
        return super().offers(collective)

    def _combine(self, array: Any, parts: list[Any] | None, chunk: slice, op: Operation) -> Any:
        """This rank's slice of the chunk combined over its node, neither finished nor rounded."""
        rows = self._node.publish(array[chunk]) if parts is None else [p[chunk] for p in parts]
        own = self._slices(chunk)[self._node.rank]
        dtype = np.float32 if is_half(array.dtype) else array.dtype
        total = np.empty(own.stop - own.start, dtype)
        op.accumulate([row[own] for row in rows], total)
        return total

    def _start(self, total: Any, dtype: Any, op: Operation) -> Callable[[], Any]:
        """Combine ``total`` across nodes, on the network's thread; returns how to get it."""
        if self._network is None:
            result = self._across(total, dtype, op)
            return lambda: result
        return self._network.submit(self._across, total, dtype, op).result

    def _across(self, total: Any, dtype: Any, op: Operation) -> Any:
        """The column's sum, finished and rounded to ``dtype``. Partial sums travel unrounded."""
        result = np.empty(total.size, dtype) if is_half(dtype) else total
        if self._levels.column is not None:
            column = self._between(total.nbytes)
            blocks = cut_evenly(total.size, column.size)
            own = blocks[column.rank]
            column.scatter_blocks(total, blocks, op)
            op.finish_into(total[own], result[own])
            column.gather_blocks(result, blocks)
        return result

    def _share(
        self, array: Any, parts: list[Any] | None, chunk: slice, arrived: Callable[[], Any]
    ) -> None:
        """Put a chunk's slices, now complete, into all arrays of the node."""
        slices = self._slices(chunk)
        own, result = slices[self._node.rank], arrived()
        if parts is not None:
            for part in parts:
                part[chunk][own] = result
            return
        slots = self._node.slots(chunk.stop - chunk.start, array.dtype)
        slots[self._node.rank][own] = result
        self._node.barrier()
        for slot, place in zip(slots, slices, strict=True):
            array[chunk][place] = slot[place]

    def _slices(self, chunk: slice) -> list[slice]:
        """Which part of a chunk each place of the node combines; ranks without column: nothing."""
        count = chunk.stop - chunk.start
        idle = self._node.size - self._levels.columns
        return cut_evenly(count, self._levels.columns) + [slice(count, count)] * idle

    def _between(self, nbytes: int) -> TwoPhase:
        """The algorithm among this rank's column."""
        found = self._ring if nbytes >= _RING_FROM_BYTES else self._halving
        if found is None:
            raise RuntimeError("a rank without a column was asked to communicate between nodes")
        return found

    def _locate(self, rank: int) -> tuple[int, int]:
        """The node of a rank, and its place there."""
        for node, ranks in enumerate(self._levels.rank_at):
            if rank in ranks:
                return node, ranks.index(rank)
        raise ValueError(f"no rank {rank} among {self.size}")
