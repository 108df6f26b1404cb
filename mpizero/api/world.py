"""``World``: ranks and the collectives among them. The public face of the core."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpizero.api.call import Call, Caller, ClosedCaller
from mpizero.api.even import EvenCalls
from mpizero.api.messages import MessageCalls
from mpizero.api.objects import ObjectCalls
from mpizero.api.rooted import RootedCalls
from mpizero.api.uneven import UnevenCalls
from mpizero.collectives import tuning
from mpizero.collectives.agreement import Agreement
from mpizero.collectives.dispatch import Dispatch, Parts
from mpizero.diagnostics import Lanes, recorded
from mpizero.errors import ArgumentError, MismatchError
from mpizero.memory.cuda_aware import CudaAwareness, cuda_aware
from mpizero.memory.node_shared import NOWHERE, NodeMemory
from mpizero.memory.order import Touched
from mpizero.progress import Handle, Messages, Worker, has_core, overlaps
from mpizero.world import Device, holdings
from mpizero.world.startup import load_mpi
from mpizero.world.survival import lifeline, track

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpizero.api.mesh import Mesh


_LARGEST = 2**31 - 1  # of MPI's integers


class World(EvenCalls, RootedCalls, UnevenCalls, ObjectCalls, MessageCalls):
    """Ranks that work together: where they are, and collective operations on their arrays.

    Every collective takes numpy arrays, CuPy arrays and anything with the buffer protocol, DLPack
    or ``__cuda_array_interface__``, of any shape (empty and zero-dimensional ones too) and any
    memory layout. All ranks must call the same one with the same dtype, shape and options: a
    difference raises MismatchError on every rank, naming the ranks and what each passed.

    ``asynchronous=True`` returns a Handle at once; ``handle.wait()`` returns what the call would
    have returned. ``algorithm`` is "auto", "native" (the MPI library's), "ring",
    "halving_doubling", "node_shared" (on one node) or "hierarchical" (on several); of arrays on
    GPUs also "nccl".

    Threads: a World's calls come from one thread at a time. A second one is refused with
    MpizeroError, unless the first has ended, or waits (in ``Thread.join()``, say): give each thread
    a World of its own, by ``split(0)``. Messages (``send``, ``recv``) may come from any thread.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        device: Device,
        cuda_awareness: CudaAwareness | None = None,
        *,
        in_order: bool = False,
        threaded: bool = False,
    ) -> None:
        super().__init__(comm, device)
        self.cuda_awareness = cuda_awareness or cuda_aware(self, device)
        self._lanes = lanes = Lanes.of(self, in_order)
        self._wants_thread = threaded
        overlapping = overlaps(self, wanted=in_order or threaded)
        may_thread = self.thread_level == "multiple"
        self._worker = Worker(
            overlapping, device.activate, lanes.waiting, in_order, has_core(self), may_thread
        )
        self._in_order = in_order and self.size > 1
        self._messages = Messages(self, self.cuda_awareness.enabled, lanes)
        name = holdings.new_name(self.comm)
        node_ranks = [self.job_ranks[rank] for rank in self.node_ranks]
        memory_name = (*name, self.node_leaders[self.node_index])
        self._node_memory = NodeMemory(self.node_comm, memory_name, node_ranks)
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
        self._hold_together(name)
        self.closed = False
        self.mesh: Mesh | None = None  # of which it is an axis
        self._plans = self._caller.plans
        self._parts: dict[str, World] = {}
        self._node: World | None = None
        if self.node_count > 1:
            self._node = World(self.node_comm, device, self.cuda_awareness, threaded=threaded)

    def _hold_together(self, name: holdings.Name) -> None:
        """From here on the ranks have this World, each as long as it needs it."""
        comms, messages, lanes = self.comms, self._messages, self._lanes
        dispatches, memory = self._caller.dispatches, self._node_memory

        def give_back() -> None:
            messages.close()
            lanes.give_back(messages.lanes)
            for dispatch in dispatches:
                dispatch.close()
            memory.close()
            for comm in comms:
                comm.Free()

        self._caller.hold = holdings.hold(name, self.job_ranks, give_back)
        self._worker.end_with(self._caller.hold)

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
        hundreds of sub-worlds at a time. ``close()`` gives one back; one that all of its ranks have
        let go of, by ``let_go()`` or since nothing refers to it, is given back when these ranks, or
        more, make another or allocate memory.
        """

        own_color, own_key = color, self.rank

        def prepare() -> Call:
            nonlocal own_color, own_key
            if color is not None:  # MPI takes nothing else, and would say so to this rank alone
                own_color = _integer("split()", "color", color, 0, _LARGEST)
            if key is not None:
                own_key = _integer("split()", "key", key, -_LARGEST, _LARGEST)
            return Call("split()", lambda run, parts: None)

        self._caller.perform(prepare, False)
        comm = self.split_comm(own_color, own_key)
        return None if comm is None else self._world_of(comm)

    def subworld(self, ranks: Sequence[int], *, in_order: bool = False) -> World | None:
        """The World of ``ranks`` of this one, numbered in that order; None for other ranks.

        Collective over ``ranks`` alone (MPI_Comm_create_group, MPI 4.1, section 7.4.2): the others
        need not call it. Who calls it for several sub-worlds does so in an order that all have in
        common. ``in_order``: blocking and asynchronous calls have one order, in which a call may be
        blocking on one rank and asynchronous on another; and the latter get a thread wherever MPI
        allows it. Raises ArgumentError for ranks that are not of this world or come twice, and
        MismatchError where they stand in another order on another rank. Given back as those of
        ``split`` are.
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
            try:
                Agreement(comm, None).reach(what)
            except MismatchError:
                comm.Free()
                raise
            if listed != sorted(listed):
                whole, comm = comm, track(comm.Split(0, listed.index(self.rank)))
                whole.Free()
            return self._world_of(comm, in_order)

    def _world_of(
        self, comm: MPI.Intracomm, in_order: bool = False, threaded: bool = False
    ) -> World:
        """A World over a communicator, which it replaces by duplicates of its own."""
        world = World(comm, self.device, self.cuda_awareness, in_order=in_order, threaded=threaded)
        comm.Free()
        return world

    def part(self, name: str, color: int, *, threaded: bool = False) -> World:
        """The sub-world of the ranks that give the same ``color``: one and the same for a name.

        Collective when a name is new. For the engine, which would split anew for every model.
        ``threaded``: asynchronous operations get a thread wherever MPI allows it, here and in its
        own parts.
        """
        threaded = threaded or self._wants_thread
        if name not in self._parts:
            self._caller.perform(lambda: Call("part()", lambda run, parts: None), False)
            comm = self.split_comm(color, self.rank)
            if comm is None:
                raise RuntimeError("every rank belongs to a part")
            self._parts[name] = self._world_of(comm, threaded=threaded)
        return self._parts[name]

    def algorithms(self, collective: str, *, on_device: bool = False) -> tuple[str, ...]:
        """The algorithms that there are for a collective ("all_reduce", ...) in this world.

        Of host arrays, or those ``on_device``: "nccl" enqueues work on streams, the others touch
        the host.
        """
        return tuple(self._caller.algorithms(collective, on_device))

    @property
    def device_ways(self) -> dict[str, str]:
        """The algorithms from GPU to GPU: "" for one that can be had, else why it cannot.

        Empty where a rank has no GPU, or there is only one.
        """
        return dict(self._caller.ways_of_devices())

    def native_allreduce(self, array: Any) -> Callable[[], None]:
        """The MPI library's all-reduce of ``array``, in place, as mpi4py calls it: to compare."""
        mpi = load_mpi()
        return lambda: self.comm.Allreduce(mpi.IN_PLACE, array)

    def allocate(self, count: int, dtype: Any) -> Any:
        """A zeroed 1-D numpy array where the ranks of a node can reach it: reduced without copies.

        Collective. ``count`` elements; in private memory where the node has no room to share (said
        once) or there is only one rank. Freed when all ranks have let go of it.
        """
        self._caller.open_for("allocate()")
        with recorded(self._lanes.memory, self._agree_on_memory("allocate", count, dtype)):
            if self.local_size == 1:
                return np.zeros(count, dtype)
            return self._node_memory.allocate(count, dtype)

    def allocate_common(self, count: int, dtype: Any) -> Any:
        """A zeroed 1-D numpy array that is one and the same memory for all ranks of a node.

        Collective. None where the node has no room for it (said once). What one rank writes the
        others see after the next collective call that all take part in.
        """
        self._caller.open_for("allocate_common()")
        with recorded(self._lanes.memory, self._agree_on_memory("allocate_common", count, dtype)):
            if self.local_size == 1:
                return np.zeros(count, dtype)
            return self._node_memory.allocate_common(count, dtype)

    def _agree_on_memory(self, function: str, count: int, dtype: Any) -> str:
        """All ranks are about to allocate; returns what this one does, in words. Collective.

        To make a window is a call of MPI's own: who refuses must have said so before it.
        """

        def prepare() -> Call:
            _integer(f"{function}()", "count", count, 0)
            np.dtype(dtype)
            return Call(f"{function}()", lambda run, parts: None)

        self._caller.perform(prepare, False)
        return f"{function}({count}, {np.dtype(dtype)})"

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
        touched: Touched,
        *,
        sure: bool = True,
        nbytes: int = 0,
        prepare: Callable[[], None] | None = None,
    ) -> Handle:
        """Queue ``work`` behind the asynchronous operations: for the engine.

        The caller is ``sure``, if it has agreed with the other ranks on the order and form of what
        it submits; ``what`` it is then gets compared only where that costs nothing.
        ``touched``: all memory that the work reads or writes, device memory with the stream on
        which it is used: there the work is done after what is queued now, and before what is
        queued after ``wait``. ``nbytes``: how much it is about, where that is not the first array's
        size; for timelines and reports. ``prepare`` is carried out before it, in its place of the
        order, and before other ranks may read the first of the arrays.
        """
        call = Call(what, work, touched, nbytes=nbytes, fill=prepare)
        handle: Handle = self._caller.start(call, True, sure=sure)
        return handle

    def agree(self, items: Sequence[str], what: str) -> None:
        """Compare lists of descriptions over the ranks; MismatchError names the first difference.

        Collective. For what must be equal everywhere and is too long for one line of an error.
        """

        def prepare() -> Call:
            return Call(what, lambda run, parts: None, items=[str(item) for item in items])

        self._caller.perform(prepare, False)

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
        holdings.settle(self.comm, self.job_ranks)
        name = self._caller.hold.name
        self._shut()
        holdings.give_back(name)

    def let_go(self) -> None:
        """Like ``close`` to this rank, which asks no other: not collective.

        What is under way goes on (on a thread by itself, else when it is waited for). What is held
        is given back once it is done and all ranks have let go: when they make another World, or
        allocate memory, these ranks alone or with others.
        """
        if not self.closed:
            if self._node is not None:
                self._node.let_go()
            self._parts.clear()
            self._worker.let_go()
            self._shut()

    def _shut(self) -> None:
        self._caller, self._plans, self.closed = ClosedCaller(), None, True

    def abandon(self, error: BaseException) -> None:
        """A rank has died: let go of everything without asking the others. Like ``close`` to users.

        Communicators that have lost a rank cannot be freed together; they stay, revoked.
        """
        if self.closed:
            return
        self._worker.abandon(error)
        for dispatch in self._caller.dispatches:
            dispatch.abandon()
        if self._node is not None:
            self._node.abandon(error)
        while self._parts:
            self._parts.popitem()[1].abandon(error)
        self._node_memory.abandon()
        self._shut()


def _integer(function: str, argument: str, value: Any, least: int, most: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or (most is not None and number > most):
        allowed = f"an integer >= {least}" if most is None else f"an integer, {least} to {most}"
        raise ArgumentError(function, argument, repr(value), allowed)
    return number
