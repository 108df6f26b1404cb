"""The protocol of a backward pass whose gradients are reduced:  open, ready ... ready, close.

The schedule of data parallelism (Li et al. 2020, arXiv 2006.15704): gradients lie in *pieces* of
flat memory, in the order in which backward produces them; a piece whose gradients have all come is
reduced while backward computes the next ones. All ranks reduce the pieces in the same order,
whichever fills first, and in a lane of their own, so that their operations match. What a piece is,
and what becomes of it, is the business of those who derive from here: a bucket that is all-reduced,
a segment whose blocks go to the ranks that keep them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from mpizero.engine.lanes import Lane
from mpizero.engine.opening import News, Opening
from mpizero.engine.specs import ParameterSpec
from mpizero.engine.weights import Merge, Weight, WeightLedger
from mpizero.progress import Handle
from mpizero.reduction.scaling import scale


@dataclass
class Piece:
    """Gradients that are reduced together, and how far that is."""

    members: tuple[int, ...]  # the parameters whose gradients must have come
    missing: int = 0  # those of them that have not, in this pass
    handle: Handle | None = field(default=None, repr=False)


class ReducedPasses(ABC):
    """Counts gradients in, launches full pieces in order, and keeps the books of weights.

    An adapter asks for the ``plan`` of a pass before its first gradient is computed, which says how
    to add them to those that are kept. Then it has them ``accumulate`` on this rank, or ``open``s a
    pass that averages, says of each gradient that it is ``ready``, and ``close``s.
    """

    def __init__(
        self,
        lane: Lane,
        specs: Sequence[ParameterSpec],
        stream: Callable[[], int | None],
        *,
        apart: bool,
    ) -> None:
        self.lane = lane
        self._world = lane.world
        self._world.agree([str(spec) for spec in specs], "parameters")
        self._specs = list(specs)
        self._stream = stream
        self._ledger = WeightLedger(self._world.size, apart)
        self._opening: Opening | None = None
        self.over_all = False  # is the mean over all ranks, or those with a pass of their own?
        self._told = News()  # what the last opening has said
        # How often a gradient comes in one backward (more than once if checkpointed segments share
        # the parameter), as far as is known; None: pieces wait for the end of backward.
        self._expected: list[int] | None = None
        self._came = [0] * len(self._specs)
        self._arrivals: list[int] | None = None  # in which order gradients come, if that matters
        self._waiting: list[tuple[Piece, ...]] = []  # for each parameter the pieces it is part of
        self._launched = 0

    def _using(self) -> AbstractContextManager[None]:
        """Inside, kernels on device gradients run on the stream on which they are computed."""
        return self._world.device.using(self._stream())

    @property
    @abstractmethod
    def pieces(self) -> Sequence[Piece]:
        """In the order in which all ranks reduce them."""

    @abstractmethod
    def _launch(self, piece: Piece) -> None:
        """Submit the reduction of one of the pieces."""

    @abstractmethod
    def _collect(self) -> list[bool]:
        """Wait for all reductions; return for which parameters any rank has a gradient."""

    @property
    def is_open(self) -> bool:
        """True between ``open`` and ``close``."""
        return self._opening is not None

    @property
    def told(self) -> News:
        """What the ranks have told each other in the last reduced pass, summed."""
        return self._told

    @property
    def is_plain(self) -> bool:
        """Is what lies here neither weighed nor scaled, so that ``kept`` need not be known?"""
        return self._ledger.is_plain

    def plan(self, weight: Weight, kept: bool) -> Merge:
        """How a pass of ``weight`` adds its gradients to those that lie here (``kept``)."""
        return self._ledger.plan(weight, kept)

    def accumulate(self, merge: Merge) -> None:
        """A backward pass takes place whose gradients stay on this rank for now."""
        self._ledger.commit(merge)

    def open(self, merge: Merge, *, changed: bool = False) -> None:
        """A backward pass takes place whose gradients are averaged, and kept ones with them.

        ``changed``: have the module's buffers changed on this rank?
        """
        self._ledger.commit(merge)
        news = News(
            active=1.0,
            stated=float(merge.stated),
            weight=merge.announced,
            uneven=float(merge.factor != 1.0),
            changed=float(changed),
            over_all=float(self.over_all),
            **self._own_news(),
        )
        self._announce(news, merge)

    def open_kept(self, *, changed: bool = False) -> None:
        """Gradients kept from earlier passes are averaged, without a pass of their own."""
        self.open(self._ledger.plan_kept(), changed=changed)

    def ready(self, index: int) -> None:
        """The gradient of parameter ``index`` is there to be filled in.

        Outside ``open`` and ``close``: nothing to do, it stays on this rank.
        """
        if self._opening is None:
            self._stays(index)
            return
        came = self._came
        came[index] += 1
        if self._arrivals is not None:
            self._arrivals.append(index)
        if self._expected is None:
            return
        if came[index] == self._expected[index]:
            for piece in self._waiting[index]:
                piece.missing -= 1
                if piece.missing == 0:
                    self._launch_full_ones()
        elif came[index] > self._expected[index]:
            self._came_again(index)

    def _stays(self, index: int) -> None:  # noqa: B027  (nothing, for most)
        """A gradient has come in a pass that is not reduced."""

    def close(self) -> list[bool]:
        """Backward is over. Returns for which parameters any rank has a gradient.

        When this returns, the gradients are the mean over the ranks; those of no rank are to be
        ignored.
        """
        opening = self._opening
        if opening is None:
            raise RuntimeError("no pass is open")
        pieces = self.pieces
        while self._launched < len(pieces):
            self._launch_next()
        anywhere = self._collect()
        self._told = told = opening.wait()
        self._opening = None
        self._ledger.close(bool(told.stated), told.weight)
        self._learn()
        return anywhere

    def shadow(self) -> list[bool] | None:
        """Take part in the other ranks' pass with nothing of this rank's own.

        For a rank that has run out of data. Returns what ``close`` does, or None if no rank had a
        pass of its own: then all have run out, or the others announce an update (``told``).
        """
        opening = self._announce(News(), Merge())
        self._told = told = opening.wait()
        if not told.active:
            self._opening = None
            return None
        self._follow(told)
        return self.close()

    def _follow(self, told: News) -> None:  # noqa: B027  (nothing, for most)
        """Shadowing: do as the others have told."""

    def _own_news(self) -> dict[str, float]:
        """What else this rank tells the others when a pass opens."""
        return {}

    def _trained(self) -> Sequence[bool]:
        """For each piece: does this rank train something in it? Told to the others."""
        return ()

    def _announce(self, news: News, merge: Merge) -> Opening:
        """Send this rank's news ahead of the pieces."""
        self._count_in()
        self._launched = 0
        self._came = [0] * len(self._specs)
        self._opening = opening = Opening(self._world, news, self._trained(), merge)
        return opening

    def _count_in(self) -> None:
        """Before a pass: how many gradients each piece waits for."""
        for piece in self.pieces:
            piece.missing = len(piece.members)

    def _launch_full_ones(self) -> None:
        """Reduce the pieces that are full, but none before those in front of it."""
        pieces = self.pieces
        while self._launched < len(pieces) and pieces[self._launched].missing <= 0:
            self._launch_next()

    def _launch_next(self) -> None:
        piece = self.pieces[self._launched]
        self._launched += 1
        self._launch(piece)

    def _scaled(self, memory: Any) -> Callable[[], None]:
        """What brings gradients to this rank's weight, once all ranks' weights are known."""
        opening = self._opening

        def apply() -> None:
            if opening is not None and opening.scale != 1.0:
                scale(memory, opening.scale)

        return apply

    @abstractmethod
    def _came_again(self, index: int) -> None:
        """A gradient has come more often than was expected."""

    def _learn(self) -> None:
        """After a pass: how often each gradient comes."""
        came = self._came
        if self._expected is None:
            self._expected = [max(1, times) for times in came]
        else:
            self._expected = [max(pair) for pair in zip(came, self._expected, strict=True)]
