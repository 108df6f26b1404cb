"""The protocol of a backward pass whose gradients are reduced:  open, ready ... ready, close.

The schedule of data parallelism (Li et al. 2020, arXiv 2006.15704): gradients lie in *pieces* of
flat memory, in the order in which backward produces them; a piece whose gradients have all come is
reduced while backward computes the next ones. All ranks reduce the pieces in the same order,
whichever fills first, so that their operations match. What a piece is, and what becomes of it, is
the business of those who derive from here: a bucket that is all-reduced, a segment whose blocks go
to the ranks that keep them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mpizero.api import World
from mpizero.engine.specs import ParameterSpec
from mpizero.engine.weights import Weight, WeightLedger
from mpizero.progress import Handle
from mpizero.reduction.operation import SUM

# What each rank tells the others when a reduced backward pass begins, summed over the ranks.
_ACTIVE, STATES, _WEIGHT, _BUFFERS_CHANGED = range(4)


@dataclass
class Piece:
    """Gradients that are reduced together, and how far that is."""

    members: tuple[int, ...]  # the parameters whose gradients must have come
    missing: int = 0  # those of them that have not, in this pass
    handle: Handle | None = field(default=None, repr=False)


class ReducedPasses(ABC):
    """Counts gradients in, launches full pieces in order, and keeps the books of weights."""

    def __init__(
        self,
        world: World,
        specs: Sequence[ParameterSpec],
        stream: Callable[[], int | None],
    ) -> None:
        world.agree([str(spec) for spec in specs], "parameters")
        self._world = world
        self._specs = list(specs)
        self._stream = stream
        self._ledger = WeightLedger(world.size)
        self._opening = np.zeros(4)
        self._opening_handle: Handle | None = None
        # How often a gradient comes in one backward (more than once if checkpointed segments share
        # the parameter), as far as is known; None: pieces wait for the end of backward.
        self._expected: list[int] | None = None
        self._came = [0] * len(self._specs)
        self._arrivals: list[int] | None = None  # in which order gradients come, if that matters
        self._waiting: list[tuple[Piece, ...]] = []  # for each parameter the pieces it is part of
        self._stated = False
        self._launched = 0

    @property
    @abstractmethod
    def pieces(self) -> Sequence[Piece]:
        """In the order in which all ranks reduce them."""

    @abstractmethod
    def _launch(self, piece: Piece, has_gradient: Sequence[bool] | None) -> None:
        """Submit the reduction. ``has_gradient`` says which parameters have one; None: all do."""

    @abstractmethod
    def _collect(self, has_gradient: Sequence[bool]) -> list[bool]:
        """Wait for all reductions; return for which parameters any rank has a gradient."""

    @abstractmethod
    def _scale_kept(self, factor: float, weight: float) -> None:
        """Multiply the gradients kept from a finished mean, of total ``weight``, by ``factor``."""

    @property
    def is_open(self) -> bool:
        """True between ``open`` and ``close``."""
        return self._opening_handle is not None

    @property
    def all_active(self) -> bool:
        """Was the last pass a real one on every rank?"""
        return bool(self._opening[_ACTIVE] == self._world.size)

    @property
    def buffers_changed(self) -> bool:
        """Has any rank, in the last reduced pass, said that its module's buffers changed?"""
        return bool(self._opening[_BUFFERS_CHANGED])

    @property
    def anyone_active(self) -> bool:
        """Was the last pass a real one on any rank (see ``shadow``)?"""
        return bool(self._opening[_ACTIVE])

    def accumulate(self, weight: Weight, gradients_kept: bool) -> None:
        """A backward pass begins whose gradients stay on this rank for now.

        ``gradients_kept``: there are gradients, not all zero, from earlier passes, to which this
        one adds.
        """
        reduced = self._ledger.reduced if gradients_kept else 0.0
        factor = self._ledger.open(weight, gradients_kept)
        self._stated = weight.stated
        if reduced:
            self._scale_kept(factor, reduced)

    def open(self, weight: Weight, gradients_kept: bool, buffers_changed: bool = False) -> None:
        """A backward pass begins whose gradients will be averaged, and kept ones with them."""
        self.accumulate(weight, gradients_kept)
        self._announce(1.0, float(weight.stated), self._ledger.local, float(buffers_changed))

    def open_kept(self, buffers_changed: bool = False) -> None:
        """Gradients kept from earlier passes will be averaged, without a pass of their own."""
        counted = self._ledger.local > 0  # their weights were stated, and are all there are
        weight = Weight(0.0, stated=True) if counted else Weight()
        self.open(weight, gradients_kept=True, buffers_changed=buffers_changed)

    def ready(self, index: int) -> None:
        """The gradient of parameter ``index``, times this rank's weight, is there to be filled in.

        Outside ``open`` and ``close``: nothing to do, it stays on this rank.
        """
        if self._opening_handle is None:
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

    def close(self, has_gradient: Sequence[bool]) -> list[bool]:
        """Backward is over. Returns for which parameters any rank has a gradient.

        ``has_gradient[i]``: does this rank hold one, of this pass or an earlier one? When this
        returns, the gradients are the mean over the ranks; those of no rank are to be ignored.
        """
        pieces = self.pieces
        while self._launched < len(pieces):
            self._launch_next(has_gradient)
        anywhere = self._collect(has_gradient)
        self._opening_handle = None
        self._ledger.close(float(self._opening[_WEIGHT]))
        self._learn()
        return anywhere

    def shadow(self) -> list[bool] | None:
        """Take part in the other ranks' pass with nothing of this rank's own.

        For a rank that has run out of data. Returns what ``close`` does, or None if no rank had a
        pass of its own: then all have run out.
        """
        self._stated = False
        self._announce(0.0, 0.0, 0.0, 0.0)
        self._wait_for_opening()
        if not self.anyone_active:
            self._opening_handle = None
            return None
        return self.close([False] * len(self._specs))

    def _announce(self, *mine: float) -> None:
        """Send the sum of all ranks' announcements ahead of the pieces."""
        for piece in self.pieces:
            piece.missing = len(piece.members)
        self._launched = 0
        self._came = [0] * len(self._specs)
        opening = self._opening = np.array(mine)
        self._opening_handle = self._world.submit(
            "the opening of a backward pass",
            lambda run, parts: run.all_reduce(opening, SUM),
            nbytes=opening.nbytes,
        )

    def _launch_full_ones(self) -> None:
        """Reduce the pieces that are full, but none before those in front of it."""
        pieces = self.pieces
        while self._launched < len(pieces) and pieces[self._launched].missing <= 0:
            self._launch_next(None)

    def _launch_next(self, has_gradient: Sequence[bool] | None) -> None:
        piece = self.pieces[self._launched]
        self._launched += 1
        self._launch(piece, has_gradient)

    @abstractmethod
    def _came_again(self, index: int) -> None:
        """A gradient has come more often than was expected."""

    def _divisor(self) -> float:
        stated = self._opening[STATES] > 0
        return float(self._opening[_WEIGHT] if stated else self._opening[_ACTIVE]) or 1.0

    def _wait_for_opening(self) -> None:
        if self._opening_handle is not None:
            self._opening_handle.wait()
        stating = self._opening[STATES]
        if stating and stating != self._opening[_ACTIVE]:
            mine = "stated a weight with weigh()" if self._stated else "stated no weight"
            self._world.agree([mine], "the weights of this step")

    def _learn(self) -> None:
        """After a pass: how often each gradient comes."""
        came = self._came
        if self._expected is None:
            self._expected = [max(1, times) for times in came]
        else:
            self._expected = [max(pair) for pair in zip(came, self._expected, strict=True)]
