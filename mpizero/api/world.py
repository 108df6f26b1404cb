"""``World``: ranks and the collectives among them. The public face of the core."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpizero.api.call import Call, Caller, ClosedCaller
from mpizero.api.describe import check_form, describe
from mpizero.api.messages import MessageCalls
from mpizero.api.rooted import RootedCalls
from mpizero.api.uneven import UnevenCalls
from mpizero.collectives import tuning
from mpizero.collectives.agreement import Agreement
from mpizero.collectives.dispatch import Dispatch, Parts
from mpizero.collectives.plans import Plan, Plans
from mpizero.collectives.transport import cut_evenly
from mpizero.diagnostics import Lanes, recorded
from mpizero.errors import ArgumentError
from mpizero.memory.arrays import overlap
from mpizero.memory.cuda_aware import CudaAwareness, cuda_aware
from mpizero.memory.node_shared import NOWHERE, NodeMemory
from mpizero.progress import Handle, Messages, Worker, overlaps
from mpizero.reduction import operation
from mpizero.world import Device
from mpizero.world.startup import load_mpi
from mpizero.world.survival import lifeline, track

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpizero.api.mesh import Mesh


class World(RootedCalls, UnevenCalls, MessageCalls):
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
        self,
        comm: MPI.Intracomm,
        device: Device,
        cuda_awareness: CudaAwareness | None = None,
        *,
        in_order: bool = False,
    ) -> None:
        super().__init__(comm, device)
        self.cuda_awareness = cuda_awareness or cuda_aware(self, device)
        self._lanes = lanes = Lanes.of(self, in_order)
        threaded = overlaps(self, wanted=in_order)
        self._worker = Worker(threaded, device.activate, lanes.waiting, in_order)
        self._in_order = in_order and self.size > 1
        self._messages = Messages(self, self.cuda_awareness.enabled, lanes)
        self._node_memory = NodeMemory(self.node_comm)
        self.tuning = tuning.load(self.comm, self.local_size, self.node_count)
        self._caller: Any = Caller(
            self,
            self._worker,
            self.cuda_awareness.enabled,
            self._node_memory,
            self.tuning,
            lanes,
            in_order,
        )
        self.closed = False
        self.mesh: Mesh | None = None  # of which it is an axis
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
        return None if comm is None else self._world_of(comm)

    def subworld(self, ranks: Sequence[int], *, in_order: bool = False) -> World | None:
        """The World of ``ranks`` of this one, numbered in that order; None for other ranks.

        Collective over ``ranks`` alone (MPI_Comm_create_group, MPI 4.1, section 7.4.2): the others
        need not call it. Who calls it for several sub-worlds does so in an order that all have in
        common. ``in_order``: blocking and asynchronous calls have one order, in which a call may be
        blocking on one rank and asynchronous on another; and the latter get a thread wherever MPI
        allows it. Raises ArgumentError for ranks that are not of this world or come twice, and
        MismatchError where they stand in another order on another rank. ``close()`` gives it back.
        """
        listed = list(ranks)
        if not listed or len({*listed}) < len(listed) or not {*listed} <= {*range(self.size)}:
            allowed = f"different ranks, 0 to {self.size - 1}"
            raise ArgumentError("subworld()", "ranks", str(listed), allowed)
        self._caller.open_for("subworld()")
        if self.rank not in listed:
            return None
        what = f"subworld({listed})"
        with recorded(Lanes.forming(self, listed), what):
            comm = self.comm_of(sorted(listed))
            Agreement(comm, None).reach(what)
            if listed != sorted(listed):
                whole, comm = comm, track(comm.Split(0, listed.index(self.rank)))
                whole.Free()
            return self._world_of(comm, in_order)

    def _world_of(self, comm: MPI.Intracomm, in_order: bool = False) -> World:
        """A World over a communicator, which it replaces by duplicates of its own."""
        world = World(comm, self.device, self.cuda_awareness, in_order=in_order)
        comm.Free()
        return world

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

        ``op``: "sum", "mean", "max", "min", "product", and of bits "band", "bor", "bxor". float16
        and bfloat16 are summed in float32 in a fixed order and rounded once; max and min pass NaN
        on. "mean" wants floating or complex numbers, those of bits integers or booleans. Raises
        ArgumentError and MismatchError.
        """
        # Where the two kinds of calls have one order, they must go alike.
        plans = None if asynchronous and not self._in_order else self._plans
        if plans is not None and not asynchronous and type(x) is np.ndarray and out is None:
            plan = plans.find(x, op, algorithm)
            if plan is not None and x.flags.c_contiguous and x.flags.writeable:
                if not self._in_order:
                    self._repeat(plans, plan, x)
                    return x
                if self._worker.take_turn():
                    try:
                        self._repeat(plans, plan, x)
                    finally:
                        self._worker.give_turn()
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

    def _repeat(self, plans: Plans, plan: Plan, x: Any) -> None:
        """An all-reduce like one that came before: all has been looked up."""
        lane = self._lanes.blocking
        at = lane.begin(plan.description, x.nbytes, lane.recorder.here())
        try:
            plans.carry_out(plan, x)
        finally:
            lane.end(at, plans.last_algorithm)

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
        (size * k, ...); (size,) for a zero-dimensional ``x``. ``x`` may be this rank's own part of
        ``out``, where its values are to be.
        """

        def prepare() -> Call:
            source = self._open(x, "allgather()", "x", writable=False)
            first, *rest = source.shape or (1,)
            shape = (self.size * first, *rest)
            target = self._target("allgather()", source, out, shape, own_part=True)
            self._caller.check_algorithm(algorithm, "all_gather")

            in_place = self.size > 1 and overlap(source.flat, target.flat)
            blocks = cut_evenly(target.flat.size, self.size)

            def work(run: Dispatch, parts: Parts) -> Any:
                if in_place:
                    run.gather_blocks(target.flat, blocks, parts)
                else:
                    run.all_gather(source.flat, target.flat, algorithm)
                return target.commit()

            what = describe("allgather", source, algorithm, *(["in place"] if in_place else []))
            return Call(what, work, (target.flat if in_place else source.array,))

        return self._caller.perform(prepare, asynchronous)

    def broadcast(
        self, x: Any, root: int = 0, *, asynchronous: bool = False, algorithm: str = "auto"
    ) -> Any:
        """Give every rank the ``root``'s ``x``, in place (any shape and dtype); returns ``x``."""

        def prepare() -> Call:
            self._check_rank("broadcast()", "root", root)
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

    def barrier(self, *, asynchronous: bool = False) -> Handle | None:
        """Wait until every rank has come here; ``asynchronous``: with a handle's ``wait``."""
        # The agreement that precedes every call is a barrier by itself.
        found: Handle | None = self._caller.perform(
            lambda: Call("barrier()", lambda run, parts: None), asynchronous
        )
        return found

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
