"""``GradientReducer``: averages gradients over the ranks while backward still runs.

The schedule of data parallelism (Li et al. 2020, arXiv 2006.15704): gradients lie in buckets, in
the order in which backward produces them; a bucket whose gradients have all come is reduced while
backward computes the next ones. All ranks reduce the buckets in the same order, whichever fills
first, so that their operations match.

One backward pass that is reduced goes:  open, ready ... ready, close.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpizero.api import World
from mpizero.engine.buckets import Allocate, Bucket, ParameterSpec, cut_into_buckets, make_bucket
from mpizero.engine.weights import Weight, WeightLedger
from mpizero.errors import MismatchError
from mpizero.progress import Handle
from mpizero.reduction.operation import SUM, mean_over

FIRST_BUCKET_BYTES = 1 << 20

# What each rank tells the others when a reduced backward pass begins, summed over the ranks.
_ACTIVE, _STATES, _WEIGHT, _BUFFERS_CHANGED = range(4)


class GradientReducer:
    """Buckets for the gradients of ``specs``, and their reduction over ``world``.

    ``allocate(count, dtype)`` gives zeroed flat memory where gradients shall lie. ``stream()`` is
    the raw CUDA stream on which device gradients have been computed. ``fill(members)`` puts what
    gradients there are of these parameters into their views, just before they are reduced. Making
    a reducer is collective: parameters that differ between the ranks raise MismatchError, naming
    the first.
    """

    def __init__(
        self,
        world: World,
        specs: Sequence[ParameterSpec],
        allocate: Allocate,
        *,
        bucket_bytes: int | None = None,
        overlap: bool = True,
        stream: Callable[[], int | None] = lambda: None,
        fill: Callable[[Sequence[int]], None] = lambda members: None,
    ) -> None:
        world.agree([str(spec) for spec in specs], "parameters")
        self._world = world
        self._specs = list(specs)
        self._allocate = allocate
        self._bucket_bytes = bucket_bytes or world.tuning.bucket_bytes
        self._overlap = overlap
        self._stream = stream
        self._fill = fill
        self._ledger = WeightLedger(world.size)
        self._mean = mean_over(self._divisor)
        self._opening = np.zeros(4)
        self._opening_handle: Handle | None = None
        # How often a gradient comes in one backward: more than once if checkpointed segments
        # share the parameter. Learned in the first pass, which therefore reduces at its end.
        self._expected: list[int] | None = None
        self._came = [0] * len(self._specs)
        self._arrivals: list[int] = []
        self._order_is_final = world.size == 1
        self._stated = False
        self.generation = 0  # grows when gradients get new places
        self._build(range(len(self._specs) - 1, -1, -1))

    def view(self, index: int) -> Any:
        """Where the gradient of parameter ``index`` lies, in the parameter's shape."""
        return self._bucket_of[index].views[index]

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
        factor = self._ledger.open(weight, gradients_kept)
        self._stated = weight.stated
        if factor != 1.0:
            for bucket in self._buckets:
                bucket.flat *= factor

    def open(self, weight: Weight, gradients_kept: bool, buffers_changed: bool = False) -> None:
        """A backward pass begins whose gradients will be averaged, and kept ones with them."""
        self.accumulate(weight, gradients_kept)
        self._announce(1.0, float(weight.stated), self._ledger.local, float(buffers_changed))

    def ready(self, index: int) -> None:
        """The gradient of parameter ``index``, times this rank's weight, is there to be filled in.

        Outside ``open`` and ``close``: nothing to do, it stays on this rank.
        """
        if self._opening_handle is None:
            return
        came = self._came
        came[index] += 1
        if not self._order_is_final:
            self._arrivals.append(index)
        if not self._overlap or self._expected is None:
            return
        bucket = self._bucket_of[index]
        if bucket.handle is not None:
            raise MismatchError(
                f"parameter '{self._specs[index].name}' received a gradient "
                f"{came[index]} times in this backward pass, "
                f"{self._expected[index]} times before, and was being averaged already. "
                "Use overlap=False for models whose use of a parameter changes from step to step."
            )
        if came[index] == self._expected[index]:
            bucket.missing -= 1
            if bucket.missing == 0:
                self._launch_full_ones()

    def close(self, has_gradient: Sequence[bool]) -> list[bool]:
        """Backward is over. Returns for which parameters any rank has a gradient.

        ``has_gradient[i]``: does this rank's view hold one, of this pass or an earlier one? When
        this returns, the views hold the mean over the ranks; the others are to be ignored.
        """
        for bucket in self._buckets[self._launched :]:
            used = [has_gradient[index] for index in bucket.members]
            bucket.used[...] = np.asarray(used, bucket.layout.dtype)
            for index, has in zip(bucket.members, used, strict=True):
                if not has:
                    bucket.views[index][...] = 0
            self._launch(bucket)
        anywhere = self._collect()
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
        """Send the sum of all ranks' announcements ahead of the buckets."""
        for bucket in self._buckets:
            bucket.missing = len(bucket.members)
        self._launched = 0
        self._came = [0] * len(self._specs)
        self._arrivals = []
        opening = self._opening = np.array(mine)
        self._opening_handle = self._world.submit(
            "the opening of a backward pass", lambda run, parts: run.all_reduce(opening, SUM)
        )

    def _launch_full_ones(self) -> None:
        """Reduce the buckets that are full, but none before those in front of it."""
        while self._launched < len(self._buckets):
            bucket = self._buckets[self._launched]
            if bucket.missing > 0:
                return
            bucket.used[...] = 1
            self._launch(bucket)

    def _launch(self, bucket: Bucket) -> None:
        self._fill(bucket.members)
        flat, mean = bucket.flat, self._mean
        bucket.handle = self._world.submit(
            f"the gradients from '{self._specs[bucket.members[0]].name}' on",
            lambda run, parts: run.all_reduce(flat, mean, parts=parts),
            (flat,),
            self._stream(),
        )
        self._launched += 1

    def _divisor(self) -> float:
        stated = self._opening[_STATES] > 0
        return float(self._opening[_WEIGHT] if stated else self._opening[_ACTIVE]) or 1.0

    def _collect(self) -> list[bool]:
        """Wait for everything; read off which parameters have a gradient on some rank."""
        self._wait_for_opening()
        self._opening_handle = None
        anywhere = [False] * len(self._specs)
        for bucket in self._buckets:
            if bucket.handle is not None:
                bucket.handle.wait()
                bucket.handle = None
            for index, used in zip(bucket.members, bucket.used.tolist(), strict=True):
                anywhere[index] = used != 0
        self._ledger.close(float(self._opening[_WEIGHT]))
        return anywhere

    def _wait_for_opening(self) -> None:
        if self._opening_handle is not None:
            self._opening_handle.wait()
        stating = self._opening[_STATES]
        if stating and stating != self._opening[_ACTIVE]:
            mine = "stated a weight with weigh()" if self._stated else "stated no weight"
            self._world.agree([mine], "the weights of this step")

    def _learn(self) -> None:
        """After the first pass: how often each gradient comes, and in which order (rank 0's)."""
        came = self._came
        if self._expected is None:
            self._expected = [max(1, times) for times in came]
        else:
            self._expected = [max(pair) for pair in zip(came, self._expected, strict=True)]
        if self._order_is_final:
            return
        self._order_is_final = True
        first_arrivals = list(dict.fromkeys(self._arrivals))
        order = self._world.broadcast_object(first_arrivals)
        rest = [i for i in range(len(self._specs) - 1, -1, -1) if i not in set(order)]
        old_views = [self.view(index) for index in range(len(self._specs))]
        self._build([*order, *rest])
        for index, old in enumerate(old_views):
            self.view(index)[...] = old

    def _build(self, order: Sequence[int]) -> None:
        groups = cut_into_buckets(self._specs, order, FIRST_BUCKET_BYTES, self._bucket_bytes)
        self._buckets = [make_bucket(self._specs, members, self._allocate) for members in groups]
        of = {index: bucket for bucket in self._buckets for index in bucket.members}
        self._bucket_of = [of[index] for index in range(len(self._specs))]
        self._launched = 0
        self.generation += 1
