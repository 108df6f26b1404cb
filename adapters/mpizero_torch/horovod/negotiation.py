"""Operations by name: ranks may submit them in different orders, and carry them out in one.

Nothing happens when an operation is submitted. When a rank waits for one, it enters a *round*: the
ranks tell each other what they have submitted, and carry out all that everybody has, in one order.
Where all have submitted the same in the same order, which is the rule, that costs one all-reduce of
three numbers. A rank whose operation was not among those enters the next round; where every rank
waits and there is nothing that all have, waiting would be for ever, and is an error that names who
has submitted what.

Several threads of a rank may submit operations and wait for them. One of those that wait takes part
in the rounds for all. A rank with a thread that does something else may submit more, so that nobody
says then that there is nothing which all have, before the time is up that a call may wait.

A rank that has joined takes part in the others' rounds, and in their reductions with what changes
nothing.
"""

from __future__ import annotations

import hashlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from mpizero import ArgumentError, LaunchError, MismatchError, World
from mpizero.diagnostics import in_order, waits_for_at_most
from mpizero.diagnostics.threads import of_program
from mpizero.errors import in_words

# What a rank that has joined does for an operation of the others': by kind; given the operation's
# name, and what the others tell of its form.
Stand_in = Callable[[World, str, Any], None]
_stand_ins: dict[str, Stand_in] = {}

_REFUSED = "refused: "  # how the form of what a rank could not submit begins


def stand_in(kind: str, work: Stand_in) -> None:
    """Let ranks that have joined do ``work`` for operations of this ``kind``."""
    _stand_ins[kind] = work


class Handle:
    """An operation that this rank has submitted, and its result-to-be.

    ``work(world)`` carries it out, on all ranks at a time. ``form`` says in words what must be
    equal on all ranks. ``told`` is what ranks that have joined must know to take part.
    """

    def __init__(
        self, kind: str, name: str, form: str, work: Callable[[World], Any], told: Any = None
    ) -> None:
        self.kind, self.name, self.form, self.told = kind, name, form, told
        self._work: Callable[[World], Any] | None = work
        self._result: Any = None
        self._error: Exception | None = None
        self._negotiation: Negotiation | None = None
        self._asked = False
        self._make: Callable[[Any], Any] = lambda result: result

    @property
    def key(self) -> tuple[str, str]:
        return self.kind, self.name

    @property
    def done(self) -> bool:
        """Has it been carried out, or failed?"""
        return self._work is None

    def carry_out(self, world: World) -> None:
        """Do it; an error is raised where the handle is waited for."""
        try:
            self._result = self._work(world) if self._work is not None else None
        except Exception as error:
            self._error = error
        self._work = None  # last: other threads look whether it is done

    def fail(self, error: Exception) -> None:
        """It is not carried out, on any rank."""
        self._error = error
        self._work = None

    def wait(self) -> Any:
        """Wait until it has been carried out; its result, or what it raised."""
        if self._negotiation is not None:
            self._negotiation.wait(self)
        if self._error is not None:
            raise self._error
        return self._make(self._result)

    __call__ = wait  # as what Horovod's sparse_allreduce_async returns

    def poll(self) -> bool:
        """True once it has been carried out: False at first, later done here with the others."""
        if not self.done and self._negotiation is not None:
            if self._asked:
                self._negotiation.take_part(self)
            else:  # just submitted: it is under way, and the program has something else to do
                self._asked = True
                return False
        return self.done

    def then(self, make: Callable[[Any], Any]) -> Handle:
        """This handle, whose result shall be ``make(result)``."""
        before = self._make
        self._make = lambda result: make(before(result))
        return self

    def __str__(self) -> str:
        return f"hvd.{self.kind} '{self.name}' of {self.form}"


class Negotiation:
    """What this rank has submitted among the ranks of ``world``, and has not been carried out."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._funneled = world.size > 1 and world.thread_level in ("single", "funneled")
        self._timeout = waits_for_at_most()
        self._pending: dict[tuple[str, str], Handle] = {}
        self._unnamed: dict[str, int] = {}
        self._rounds = 0  # of all ranks the same
        self._joined_at: int | None = None
        self._free = threading.Condition()  # guards all of this, and tells who waits of a round
        self._taken = False  # a thread takes part in a round
        self._waits: set[int] = set()  # the threads that do nothing else
        self._namers: dict[str, weakref.ref[threading.Thread]] = {}

    def name(self, kind: str, name: str | None) -> str:
        """The name, or one made of the kind and how many had none before.

        ArgumentError where two threads submit operations of a kind without names.
        """
        if name is not None:
            return str(name)
        me = threading.current_thread()
        with self._free:
            before = self._namers.setdefault(kind, weakref.ref(me))()
            if before is not me and before is not None and before.is_alive():
                raise ArgumentError(
                    f"hvd.{kind}()", "name",
                    f"None, in the thread {me.name!r}, beside the thread {before.name!r}",
                    "a name of its own for each operation",
                    "Without one, ranks could take one thread's operation for the other's.",
                )  # fmt: skip
            self._namers[kind] = weakref.ref(me)
            self._unnamed[kind] = number = self._unnamed.get(kind, 0) + 1
        return f"{kind}.noname.{number}"

    @contextmanager
    def refusing(self, kind: str, name: str | None) -> Iterator[None]:
        """What precedes the submission of an operation: if it fails here, that fails everywhere.

        The others, who have submitted it, find this rank's error in the place of its form.
        """
        try:
            yield
        except Exception as error:
            own = self.name(kind, name)
            if (kind, own) not in self._pending:
                # They may refuse as well, each for its own reason.
                with suppress(MismatchError):
                    refused = Handle(kind, own, f"{_REFUSED}{in_words(error)}", lambda world: None)
                    self.submit(refused).wait()
            raise

    def submit(self, handle: Handle) -> Handle:
        """Add an operation. ArgumentError if one of its name waits to be carried out."""
        with self._free:
            if handle.key in self._pending:
                raise ArgumentError(
                    f"hvd.{handle.kind}()", "name", f"{handle.name!r}, which is under way already",
                    "another name, or the same after synchronize()",
                )  # fmt: skip
            if self._world.size > 1:
                self._pending[handle.key] = handle
                handle._negotiation = self
                return handle
        handle.carry_out(self._world)
        return handle

    def wait(self, handle: Handle) -> None:
        """Take part in rounds until ``handle`` has been carried out.

        LaunchError where MPI allows this thread no calls.
        """
        if self._funneled and threading.current_thread() is not threading.main_thread():
            raise LaunchError(
                f"hvd.{handle.kind}(): MPI has granted the thread level "
                f"'{self._world.thread_level}', with which the main thread alone may wait."
            )
        me = threading.get_ident()
        self._waits.add(me)
        try:
            begun, naps = time.monotonic(), 0
            while not handle.done:
                late = self._timeout is not None and time.monotonic() - begun > self._timeout
                moved = self.take_part(handle, all_wait=late)
                # Nothing has come of it: a thread, here or elsewhere, has to submit something.
                naps = 0 if moved else naps + 1
                if naps > 1:
                    time.sleep(min(0.0005 * naps, 0.02))
        finally:
            self._waits.discard(me)

    def take_part(self, handle: Handle, all_wait: bool | None = None) -> bool:
        """In one round, or wait while another thread does; has anything been carried out?

        ``all_wait``: no thread of this rank's will submit more before something is carried out;
        None: it will.
        """
        with self._free:
            while self._taken and not handle.done:
                self._free.wait()
            if handle.done:
                return True
            self._taken = True
        try:
            with in_order():
                before = len(self._pending)
                self.round(waiting=all_wait is not None and (all_wait or self._all_wait()))
                return handle.done or len(self._pending) < before
        finally:
            with self._free:
                self._taken = False
                self._free.notify_all()

    def _all_wait(self) -> bool:
        return self._waits.issuperset(of_program())

    def join(self) -> int:
        """Take part in what the others do until all have joined; the rank that joined last."""
        while self._pending:
            self.wait(next(iter(self._pending.values())))
        if self._world.size == 1:
            return 0
        with self._free:
            while self._taken:
                self._free.wait()
            self._taken = True
        self._joined_at = self._rounds
        try:
            with in_order():
                while (last := self.round()) is None:
                    pass
        finally:
            self._joined_at = None
            with self._free:
                self._taken = False
                self._free.notify_all()
        self._unnamed.clear()  # who joined early has submitted less: numbers begin anew
        return last

    def round(self, waiting: bool = True) -> int | None:
        """Carry out what all have submitted. Collective; who waits, comes here.

        Returns None; where all have joined, who was the last to. Without ``waiting`` the rank goes
        on to submit more, whatever comes of it.
        """
        self._rounds += 1
        with self._free:
            mine = list(self._pending.values())
        number = _fingerprint(mine)
        extremes = np.array((number, -number, self._joined_at is not None), np.int64)
        try:
            self._world.allreduce(extremes, "max")
        except MismatchError as error:
            own = not error.reported_elsewhere
            raise MismatchError(f"{error}\n{self._say(mine)}").told_by(own) from error
        if extremes[0] == -extremes[1] and not extremes[2]:
            self._carry_out(mine)
            return None
        return self._compare(mine, waiting)

    def _compare(self, mine: Sequence[Handle], waiting: bool) -> int | None:
        """The ranks differ: find what all have, but for those who have joined."""
        told = [(each.key, each.form, each.told) for each in mine]
        everyone = self._world.gather_objects((self._joined_at, waiting, told))
        joined = {rank: at for rank, (at, *_) in enumerate(everyone) if at is not None}
        if len(joined) == len(everyone):
            return max(joined, key=lambda rank: (joined[rank], rank))
        lists = {r: theirs for r, (_, _, theirs) in enumerate(everyone) if r not in joined}
        first = next(iter(lists.values()))
        of_all = set.intersection(*({key for key, *_ in theirs} for theirs in lists.values()))
        if not of_all and all(waits for _, waits, _ in everyone):
            raise self._stalled(lists, joined)
        for key, _, telling in first:
            if key in of_all:
                forms = {r: form for r, each in lists.items() for k, form, _ in each if k == key}
                self._carry_out_one(key, forms, telling, sorted(joined))
        return None

    def _carry_out(self, handles: Sequence[Handle]) -> None:
        for each in handles:
            with self._free:
                del self._pending[each.key]
            each.carry_out(self._world)

    def _carry_out_one(
        self, key: tuple[str, str], forms: dict[int, str], told: Any, joined: Sequence[int]
    ) -> None:
        kind, name = key
        with self._free:
            mine = self._pending.pop(key, None)
        error: Exception | None = None
        if len(set(forms.values())) > 1 or any(map(_is_refusal, forms.values())):
            lines = "".join(f"\n  rank {rank}: {form}" for rank, form in forms.items())
            error = MismatchError(f"hvd.{kind} '{name}' differs between the ranks:{lines}")
            error.reported_elsewhere = self._world.rank != min(forms)
        elif joined and kind not in _stand_ins:
            error = MismatchError(
                f"hvd.{kind} '{name}': {kind.capitalize()} is not supported with Join at this "
                f"time. Ranks {list(joined)} have joined (hvd.join()), and can take part only in "
                f"{', '.join(sorted(_stand_ins))}."
            )
        if mine is None:
            if error is None:
                _stand_ins[kind](self._world, name, told)
        elif error is not None:
            mine.fail(error)
        else:
            mine.carry_out(self._world)

    def _stalled(
        self, lists: dict[int, list[tuple[tuple[str, str], str, Any]]], joined: dict[int, int]
    ) -> MismatchError:
        lines = [
            f"  rank {rank}: " + (", ".join(f"{k} '{n}'" for (k, n), *_ in theirs[:8]) or "nothing")
            for rank, theirs in lists.items()
        ]
        lines += [f"  rank {rank}: has joined" for rank in joined]
        return MismatchError(
            "hvd: every rank waits, and there is no operation that all have submitted:\n"
            + "\n".join(lines)
        ).told_by(self._world.rank == 0)

    def _say(self, mine: Sequence[Handle]) -> str:
        if self._joined_at is not None:
            return "This rank is in hvd.join()."
        return f"This rank waits for {'; '.join(map(str, mine[:8]))}."


def _is_refusal(form: str) -> bool:
    return form.startswith(_REFUSED)


def _fingerprint(handles: Sequence[Handle]) -> int:
    """62 bits that tell one list of operations from another."""
    text = "\n".join(f"{each.kind}\t{each.name}\t{each.form}" for each in handles)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2
