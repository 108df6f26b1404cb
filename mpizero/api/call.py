"""One collective call: prepared on this rank, agreed upon by all, carried out now or later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from mpizero.api.one_thread import OneThread
from mpizero.collectives.dispatch import Dispatch, Parts
from mpizero.collectives.plans import Plan, Plans
from mpizero.collectives.tuning import Tuning
from mpizero.diagnostics import Lanes
from mpizero.errors import (
    LaunchError,
    MismatchError,
    in_words,
    is_settled,
    settle,
    unsettle,
)
from mpizero.memory.node_shared import NodeMemory
from mpizero.memory.order import NOTHING, Touched
from mpizero.progress import Worker
from mpizero.progress.handle import finished
from mpizero.reduction import Operation
from mpizero.world import Group
from mpizero.world.holdings import Hold
from mpizero.world.survival import lifeline, translated

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class Call:
    """What a rank is about to do: told to the others as ``description``, done by ``work``.

    ``touched``: all memory that the work reads or writes. ``work(run, parts)``: ``parts`` are all
    ranks' counterparts of the first array, if they lie in node-shared memory. ``items`` are parts
    of a long description.
    """

    description: str
    work: Callable[[Dispatch, Parts], Any]
    touched: Touched = NOTHING
    nbytes: int = 0  # how much it is about, if not the first array's size
    items: Sequence[str] = ()
    agrees_itself: bool = False  # ``work`` compares the call with the other ranks' as it goes
    # Puts the first array's values there. To agree is to be ready: others may read them after that.
    fill: Callable[[], None] | None = None


class Caller:
    """Carries calls out for a group: blocking ones at once, asynchronous ones through a worker.

    The two kinds use communicators of their own, so that their orders are independent: a blocking
    call may overtake an asynchronous one on one rank and not on another. ``in_order``: they have
    one communicator and one order, and a call may be blocking on one rank and not on another.
    """

    def __init__(
        self,
        group: Group,
        worker: Worker,
        cuda_aware: bool,
        node_memory: NodeMemory,
        tuning: Tuning,
        lanes: Lanes,
        in_order: bool = False,
    ) -> None:
        self._alone = group.size == 1
        self._lanes = lanes
        self._in_order = in_order

        def dispatch(comm: MPI.Intracomm) -> Dispatch:
            crowded = group.cores_per_rank < 1
            return Dispatch(
                comm, group.device, cuda_aware, node_memory, group.nodes, tuning, crowded
            )

        self._blocking = dispatch(group.comm)
        self._background = self._blocking if in_order else dispatch(group.background)
        self._worker = worker
        # What these ranks hold together, as long as calls can be made or are under way: whatever
        # is to be carried out refers to this Caller.
        self.hold: Hold | None = None
        self._groups = {run.comm.py2f() for run in (self._blocking, self._background)}
        self._blocks = 0  # of ``telling`` that this rank is in
        self.one_thread = OneThread()

    def perform(self, prepare: Callable[[], Call], asynchronous: bool) -> Any:
        """Prepare a call, agree on it with the other ranks, and carry it out.

        Returns the call's result, or a Handle if ``asynchronous``. If this rank refuses its
        arguments, the other ranks get a MismatchError that quotes it, instead of waiting for ever.
        """
        try:
            call = prepare()
        except Exception as error:
            self._refuse(error, asynchronous)
            raise
        return self.start(call, asynchronous)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """See ``World.telling``."""
        self._blocks += 1
        try:
            yield
        except Exception as error:
            # Nothing is said of what the others know already, nor after an error within a call that
            # all had agreed on: who knows where they are?
            if not any(is_settled(error, group) for group in self._groups):
                self._refuse(error, False)
            if self._blocks == 1:
                for group in self._groups:  # the program may raise this very object again
                    unsettle(error, group)
            raise
        finally:
            self._blocks -= 1

    def settle(self, error: BaseException) -> None:
        """The others know of ``error``: to be called where it is about to leave a block."""
        if self._blocks:
            for group in self._groups:
                settle(error, group)

    def start(self, call: Call, asynchronous: bool, *, sure: bool = False) -> Any:
        """Carry a prepared call out; ``sure``: by a layer that has agreed on it before."""
        if self._alone or not self.one_thread.enter(call.description):
            return self._start(call, asynchronous, sure)
        try:
            return self._start(call, asynchronous, sure)
        finally:
            self.one_thread.leave()

    def _start(self, call: Call, asynchronous: bool, sure: bool) -> Any:
        run = self._background if asynchronous else self._blocking
        order = run.order(call.touched)
        lane = self._lanes.asynchronous if asynchronous else self._lanes.blocking
        line = 0 if self._alone else lane.recorder.here()

        def work() -> Any:
            if self._alone:
                return carry_out(None)
            nbytes = call.nbytes or call.touched.nbytes
            if asynchronous and self._in_order:
                at = lane.begin_behind(self._lanes.blocking, call.description, nbytes, line)
            else:
                at = lane.begin(call.description, nbytes, line)
            run.last_algorithm = ""
            try:
                return carry_out(at)
            except Exception as error:
                if asynchronous or self._blocks:  # it is raised by the handle then, wherever
                    for group in self._groups:
                        settle(error, group)
                raise
            finally:
                lane.end(at, run.last_algorithm)

        def carry_out(at: int | None) -> Any:
            with run.in_order(order):
                if call.fill is not None:
                    call.fill()
                if call.agrees_itself:
                    return call.work(run, None)
                parts = run.agree(call.description, call.touched.first, call.items, sure)
                if at is not None:
                    lane.agreed(at)
                return call.work(run, parts)

        if lifeline() is not None:
            work = _surviving(work)
        if not asynchronous:
            ordered = self._in_order and not self._alone
            try:
                return self._worker.run_in_order(work, call.description) if ordered else work()
            finally:
                if order is not None:
                    order.wait()
        if self._alone:
            return finished(work(), order)
        return self._worker.submit(work, call.description, order)

    def agree(self, what: str) -> None:
        """All ranks have come to the same point. Collective."""
        if not self._alone:
            self.start(Call(what, lambda run, parts: None), False)

    def open_for(self, function: str) -> None:
        """Nothing: the world has not been closed."""

    @property
    def dispatches(self) -> tuple[Dispatch, ...]:
        """Who carries calls out."""
        both = self._blocking, self._background
        return both[:1] if self._in_order else both

    @property
    def plans(self) -> Plans | None:
        """What is known of blocking all-reduces that have come before, where that is kept."""
        return self._blocking.plans

    def plan(self, array: Any, op: Operation, algorithm: str, what: str) -> Plan | None:
        """Keep, and return, a plan for blocking all-reduces of arrays like this one."""
        return self._blocking.plan(array, op, algorithm, what)

    def algorithms(self, collective: str, on_device: bool) -> tuple[str, ...]:
        """The algorithms that offer ``collective``."""
        return self._blocking.able(collective, on_device)

    def ways_of_devices(self) -> dict[str, str]:
        """See ``World.device_ways``."""
        return self._blocking.ways_of_devices()

    def check_algorithm(self, name: str, collective: str, array: Any) -> None:
        """Raise ArgumentError unless ``name`` is an algorithm for ``collective`` of ``array``."""
        self._blocking.check(name, collective, array)

    def _refuse(self, error: Exception, asynchronous: bool) -> None:
        """Tell the others, who are in a call of theirs: it is a call of its own, to be counted."""
        if self._alone:
            return
        # The others refuse as well, or do something else; this rank's own ArgumentError, which the
        # caller raises, says more than the mismatch.
        with suppress(MismatchError):
            refusal = f"refused: {in_words(error)}"
            told = self.start(Call(refusal, lambda run, parts: None), asynchronous)
            if asynchronous:
                told.wait()
        self.settle(error)


def _surviving(work: Callable[[], Any]) -> Callable[[], Any]:
    """``work`` that raises RankDiedError for whatever MPI says where a rank has died."""

    def surviving() -> Any:
        try:
            return work()
        except Exception as error:
            found = translated(error)
            if found is error:
                raise
            raise found from error

    return surviving


class ClosedCaller:
    """Stands where the caller of a closed world stood, and refuses everything."""

    def __getattr__(self, name: str) -> NoReturn:
        raise LaunchError("This World has been closed: init() or split() makes another.")
