"""``World``: ranks and the collectives among them. The public face of the core."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpizero.api.call import Call, Caller, ClosedCaller
from mpizero.api.describe import check_form, describe
from mpizero.collectives import tuning
from mpizero.collectives.dispatch import Dispatch, Parts
from mpizero.diagnostics import Lanes, recorded
from mpizero.errors import ArgumentError
from mpizero.memory.arrays import OpenArray, empty_like, open_array, overlap
from mpizero.memory.cuda_aware import CudaAwareness, cuda_aware
from mpizero.memory.node_shared import NOWHERE, NodeMemory
from mpizero.progress import Handle, Worker, overlaps
from mpizero.reduction import operation
from mpizero.world import Device, Group
from mpizero.world.startup import load_mpi
from mpizero.world.survival import lifeline

if TYPE_CHECKING:
    from mpi4py import MPI


class World(Group):
    """Ranks that work together: where they are, and collective operations on their arrays.

    Every collective takes numpy arrays, CuPy arrays and anything with the buffer protocol, DLPack
    or ``__cuda_array_interface__``, of any shape (empty and zero-dimensional ones too) and any
    memory layout. All ranks must call the same one with the same dtype, shape and options: a
    difference raises MismatchError on every rank, naming the ranks and what each passed.

    ``asynchronous=True`` returns a Handle at once; ``handle.wait()`` returns what the call would
    have returned. ``algorithm`` is "auto", "native" (the MPI library's), "ring",
    "halving_doubling", "node_shared" (on one node) or "hierarchical" (on several).
    """

    def __init__(
        self, comm: MPI.Intracomm, device: Device, cuda_awareness: CudaAwareness | None = None
    ) -> None:
        super().__init__(comm, device)
        self.cuda_awareness = cuda_awareness or cuda_aware(self, device)
        self._lanes = lanes = Lanes.of(self)
        self._worker = Worker(overlaps(self), device.activate, lanes.waiting)
        self._node_memory = NodeMemory(self.node_comm)
        self.tuning = tuning.load(self.comm, self.local_size, self.node_count)
        self._caller: Any = Caller(
            self,
            self._worker,
            self.cuda_awareness.enabled,
            self._node_memory,
            self.tuning,
            lanes,
        )
        self.closed = False
        self._plans = self._caller.plans
        self._parts: dict[str, World] = {}
        self._node: World | None = None
        if self.node_count > 1:
            self._node = World(self.node_comm, device, self.cuda_awareness)

    @property
    def node(self) -> World:
        """The ranks that share this rank's node (this very World if there is only one node)."""
        return self if self._node is None else self._node

    @property
    def survives(self) -> bool:
        """Is the job one that goes on when ranks die (``init(elastic=True)``, several ranks)?"""
        return lifeline() is not None

    @property
    def overlaps(self) -> bool:
        """True if asynchronous operations run on a thread of their own, beside the compute."""
        return self._worker.threaded

    def split(self, color: int | None, key: int | None = None) -> World | None:
        """Part the ranks into sub-worlds: one for each ``color``, ordered by ``key``, then rank.

        Collective (MPI 4.1, section 7.4.2). Ranks that give None get None. MPIs have room for some
        hundreds of sub-worlds at a time: ``close()`` those that are done.
        """

        def prepare() -> Call:
            if color is not None and color < 0:
                raise ArgumentError("split()", "color", str(color), "None or an integer >= 0")
            return Call("split()", lambda run, parts: None)

        self._caller.perform(prepare, False)
        comm = self.split_comm(color, self.rank if key is None else key)
        return None if comm is None else World(comm, self.device, self.cuda_awareness)

    def part(self, name: str, color: int) -> World:
        """The sub-world of the ranks that give the same ``color``: one and the same for a name.

        Collective when a name is new. For the engine, which would split anew for every model.
        """
        if name not in self._parts:
            part = self.split(color)
            if part is None:
                raise RuntimeError("every rank belongs to a part")
            self._parts[name] = part
        return self._parts[name]

    def allreduce(
        self,
        x: Any,
        op: str = "sum",
        *,
        out: Any = None,
        asynchronous: bool = False,
        algorithm: str = "auto",
    ) -> Any:
        """Combine ``x`` over all ranks, element by element; every rank gets the same bits.

        In place: ``x`` holds the result and is returned; with ``out`` (same shape and dtype),
        ``x`` stays as it is. A Python or numpy scalar is returned as a new scalar.

        ``op``: "sum", "mean", "max", "min" or "product". float16 and bfloat16 are summed in
        float32 in a fixed order and rounded once; max and min pass NaN on. "mean" wants floating
        or complex numbers. Raises ArgumentError and MismatchError.
        """
        plans = None if asynchronous else self._plans
        if plans is not None and type(x) is np.ndarray and out is None:
            plan = plans.find(x, op, algorithm)
            if plan is not None and x.flags.c_contiguous and x.flags.writeable:
                lane = self._lanes.blocking
                at = lane.begin(plan.description, x.nbytes, lane.recorder.here())
                try:
                    plans.carry_out(plan, x)
                finally:
                    lane.end(at, plans.last_algorithm)
                return x
        if isinstance(x, (numbers.Number, np.generic)):
            return self._reduce_scalar(x, op, asynchronous, algorithm)

        def prepare() -> Call:
            source = self._open(x, "allreduce()", "x", writable=out is None)
            target = source if out is None else self._open(out, "allreduce()", "out", writable=True)
            check_form("allreduce()", target, source.shape, source.dtype)
            self._caller.check_algorithm(algorithm, "all_reduce")
            combine = operation(op, source.dtype, self.size, "allreduce()")
            what = describe("allreduce", source, op, algorithm)
            plan = self._caller.plan(source.array, combine, algorithm, what) if plans else None

            def fill() -> None:
                target.flat[...] = source.flat

            def work(run: Dispatch, parts: Parts) -> Any:
                if plans is not None and plan is not None:
                    plans.carry_out(plan, target.flat)
                    run.last_algorithm = plans.last_algorithm
                else:
                    run.all_reduce(target.flat, combine, algorithm, parts)
                return target.commit()

            return Call(
                what,
                work,
                (target.flat,),
                agrees_itself=plan is not None,
                fill=None if target is source else fill,
            )

        return self._caller.perform(prepare, asynchronous)

    def reduce_scatter(
        self,
        x: Any,
        op: str = "sum",
        *,
        out: Any = None,
        asynchronous: bool = False,
        algorithm: str = "auto",
    ) -> Any:
        """Combine ``x`` over all ranks; rank r gets the r-th part of the result's first axis.

        ``x``: shape (size * k, ...), left as it is. Returns a new array, or ``out``, of shape
        (k, ...). ``op`` as in ``allreduce``. Raises ArgumentError if the first axis is no
        multiple of the number of ranks.
        """

        def prepare() -> Call:
            source = self._open(x, "reduce_scatter()", "x", writable=False)
            shape = self._part_shape("reduce_scatter()", source)
            target = self._target("reduce_scatter()", source, out, shape)
            self._caller.check_algorithm(algorithm, "reduce_scatter")
            combine = operation(op, source.dtype, self.size, "reduce_scatter()")

            def work(run: Dispatch, parts: Parts) -> Any:
                run.reduce_scatter(source.flat, target.flat, combine, algorithm, parts)
                return target.commit()

            return Call(describe("reduce_scatter", source, op, algorithm), work, (source.array,))

        return self._caller.perform(prepare, asynchronous)

    def allgather(
        self, x: Any, *, out: Any = None, asynchronous: bool = False, algorithm: str = "auto"
    ) -> Any:
        """Put the ranks' arrays behind one another along the first axis, on every rank.

        ``x``: shape (k, ...), any dtype. Returns a new array, or ``out``, of shape
        (size * k, ...); (size,) for a zero-dimensional ``x``.
        """

        def prepare() -> Call:
            source = self._open(x, "allgather()", "x", writable=False)
            first, *rest = source.shape or (1,)
            target = self._target("allgather()", source, out, (self.size * first, *rest))
            self._caller.check_algorithm(algorithm, "all_gather")

            def work(run: Dispatch, parts: Parts) -> Any:
                run.all_gather(source.flat, target.flat, algorithm)
                return target.commit()

            return Call(describe("allgather", source, algorithm), work, (source.array,))

        return self._caller.perform(prepare, asynchronous)

    def broadcast(
        self, x: Any, root: int = 0, *, asynchronous: bool = False, algorithm: str = "auto"
    ) -> Any:
        """Give every rank the ``root``'s ``x``, in place (any shape and dtype); returns ``x``."""

        def prepare() -> Call:
            if not 0 <= root < self.size:
                raise ArgumentError("broadcast()", "root", str(root), f"0 to {self.size - 1}")
            target = self._open(x, "broadcast()", "x", writable=self.rank != root)
            self._caller.check_algorithm(algorithm, "broadcast")

            def work(run: Dispatch, parts: Parts) -> Any:
                run.broadcast(target.flat, root, algorithm)
                return target.original if self.rank == root else target.commit()

            return Call(describe("broadcast", target, root, algorithm), work, (target.array,))

        return self._caller.perform(prepare, asynchronous)

    def all_to_all(
        self, x: Any, *, out: Any = None, asynchronous: bool = False, algorithm: str = "auto"
    ) -> Any:
        """Send the r-th part of ``x``'s first axis to rank r, for all r.

        ``x``: shape (size * k, ...), any dtype. Returns a new array, or ``out``, of that shape
        whose s-th part came from rank s.
        """

        def prepare() -> Call:
            source = self._open(x, "all_to_all()", "x", writable=False)
            self._part_shape("all_to_all()", source)
            target = self._target("all_to_all()", source, out, source.shape)
            self._caller.check_algorithm(algorithm, "all_to_all")

            def work(run: Dispatch, parts: Parts) -> Any:
                run.all_to_all(source.flat, target.flat, algorithm)
                return target.commit()

            return Call(describe("all_to_all", source, algorithm), work, (source.array,))

        return self._caller.perform(prepare, asynchronous)

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:  # the agreement that precedes every call is a barrier by itself
            self._caller.perform(lambda: Call("barrier()", lambda run, parts: None), False)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's picklable ``value``, in rank order, on every rank. For small things."""

        def work(run: Dispatch, parts: Parts) -> Any:
            return run.comm.allgather(value)

        return list(self._caller.perform(lambda: Call("gather_objects()", work), False))

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """The ``root``'s picklable ``value`` on every rank. For small things."""

        def work(run: Dispatch, parts: Parts) -> Any:
            return run.comm.bcast(value, root)

        return self._caller.perform(lambda: Call(f"broadcast_object(root={root})", work), False)

    def algorithms(self, collective: str) -> tuple[str, ...]:
        """The algorithms that there are for a collective ("all_reduce", ...) in this world."""
        return tuple(self._caller.algorithms(collective))

    def native_allreduce(self, array: Any) -> Callable[[], None]:
        """The MPI library's all-reduce of ``array``, in place, as mpi4py calls it: to compare."""
        mpi = load_mpi()
        return lambda: self.comm.Allreduce(mpi.IN_PLACE, array)

    def allocate(self, count: int, dtype: Any) -> Any:
        """A zeroed 1-D numpy array where the ranks of a node can reach it: reduced without copies.

        Collective. ``count`` elements; in private memory where the node has no room to share (said
        once) or there is only one rank. Freed when all ranks have let go of it.
        """
        if self.local_size == 1:
            return np.zeros(count, dtype)
        with recorded(self._lanes.memory, f"allocate({count}, {np.dtype(dtype)})"):
            return self._node_memory.allocate(count, dtype)

    def allocate_common(self, count: int, dtype: Any) -> Any:
        """A zeroed 1-D numpy array that is one and the same memory for all ranks of a node.

        Collective. None where the node has no room for it (said once). What one rank writes the
        others see after the next collective call that all take part in.
        """
        if self.local_size == 1:
            return np.zeros(count, dtype)
        with recorded(self._lanes.memory, f"allocate_common({count}, {np.dtype(dtype)})"):
            return self._node_memory.allocate_common(count, dtype)

    def counterparts(self, array: Any) -> list[Any] | None:
        """All ranks' arrays in the place of ``array``, which ``allocate`` gave; by rank.

        None where not all ranks share a node, or there was no room to share. Sends nothing: it is
        the caller's business that what is read there has been written.
        """
        if self.node_count > 1:
            return None
        spot = self._node_memory.spot(array)
        return None if spot == NOWHERE else self._node_memory.counterparts(array, spot)

    def submit(
        self,
        what: str,
        work: Callable[[Dispatch, Parts], Any],
        arrays: Sequence[Any] = (),
        stream: int | None = None,
        *,
        sure: bool = True,
        nbytes: int = 0,
    ) -> Handle:
        """Queue ``work`` behind the asynchronous operations: for the engine.

        The caller is ``sure``, if it has agreed with the other ranks on the order and form of what
        it submits; ``what`` it is then gets compared only where that costs nothing.
        ``arrays`` are those that the work reads; device ones are waited for, on the raw CUDA
        ``stream`` that fills them, or CuPy's current one. ``nbytes``: how much it is about, where
        that is not their size; for timelines and reports.
        """
        call = Call(what, work, arrays, stream, nbytes=nbytes)
        handle: Handle = self._caller.start(call, True, sure=sure)
        return handle

    def agree(self, items: Sequence[str], what: str) -> None:
        """Compare lists of descriptions over the ranks; MismatchError names the first difference.

        Collective. For what must be equal everywhere and is too long for one line of an error.
        """
        self._caller.start(Call(what, lambda run, parts: None, items=items), False)

    def finish(self) -> None:
        """Finish what is under way and end the progress thread (done at exit by itself)."""
        self._worker.close()
        if self._node is not None:
            self._node.finish()

    def close(self) -> None:
        """Finish what is under way and give communicators and shared memory back.

        Collective; a second time it does nothing. Arrays that ``allocate`` gave may be used
        further, but whatever else is asked of a closed World raises LaunchError. Not needed at
        exit.
        """
        if self.closed:
            return
        self.barrier()
        self._worker.close()
        if self._node is not None:
            self._node.close()
        while self._parts:
            self._parts.popitem()[1].close()
        self._caller.close()
        self._node_memory.close()
        self.free()
        self._caller, self._plans, self.closed = ClosedCaller(), None, True

    def abandon(self, error: BaseException) -> None:
        """A rank has died: let go of everything without asking the others. Like ``close`` to users.

        Communicators that have lost a rank cannot be freed together; they stay, revoked.
        """
        if self.closed:
            return
        self._worker.abandon(error)
        if self._node is not None:
            self._node.abandon(error)
        while self._parts:
            self._parts.popitem()[1].abandon(error)
        self._node_memory.abandon()
        self._caller, self._plans, self.closed = ClosedCaller(), None, True

    def _reduce_scalar(self, x: Any, op: str, asynchronous: bool, algorithm: str) -> Any:
        if asynchronous:

            def refuse() -> Call:
                raise ArgumentError(
                    "allreduce()",
                    "x",
                    "a scalar with asynchronous=True",
                    "an array",
                    "np.asarray(x)",
                )

            return self._caller.perform(refuse, True)
        # A Python integer on one rank and a float on another would be different dtypes; the
        # agreement says so.
        result = self.allreduce(np.array(x), op, algorithm=algorithm)[()]
        return result if isinstance(x, np.generic) else result.item()

    def _open(self, x: Any, function: str, argument: str, *, writable: bool) -> OpenArray:
        opened = open_array(x, function, argument, writable=writable)
        self.device.check(opened.array, function, argument)
        return opened

    def _part_shape(self, function: str, source: OpenArray) -> tuple[int, ...]:
        if not source.shape or source.shape[0] % self.size:
            raise ArgumentError(
                function,
                "x",
                f"an array of shape {source.shape}",
                f"one whose first axis is a multiple of the {self.size} ranks",
                "Pad it, or use allreduce().",
            )
        return (source.shape[0] // self.size, *source.shape[1:])

    def _target(
        self, function: str, source: OpenArray, out: Any, shape: tuple[int, ...]
    ) -> OpenArray:
        if out is None:
            out = empty_like(source.array, shape)
        target = self._open(out, function, "out", writable=True)
        check_form(function, target, shape, source.dtype)
        if self.size > 1 and source.flat.size and overlap(source.flat, target.flat):
            raise ArgumentError(function, "out", "memory of x", "memory of its own")
        return target
