"""``GradientReducer``: averages gradients over the ranks, every rank keeps all (ZeRO's stage 0)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mpizero.collectives.dispatch import Dispatch, Parts
from mpizero.engine.buckets import Allocate, Bucket, cut_into_buckets, make_bucket
from mpizero.engine.lanes import Lane
from mpizero.engine.opening import News, Opening
from mpizero.engine.passes import Piece, ReducedPasses
from mpizero.engine.specs import ParameterSpec
from mpizero.engine.weights import Merge
from mpizero.errors import MismatchError
from mpizero.memory.order import on_host, on_stream
from mpizero.reduction.operation import SUM, mean_over

FIRST_BUCKET_BYTES = 1 << 20


class GradientReducer(ReducedPasses):
    """Buckets for the gradients of ``specs``, and their all-reduction over the lane's ranks.

    ``allocate(count, dtype)`` gives zeroed flat memory where gradients shall lie. ``stream()`` is
    the raw CUDA stream on which device gradients have been computed. ``fill(bucket, members)``
    puts what gradients there are of these members into their views, just before they are reduced,
    and says of each whether there is one; by default those that were ``ready`` are there.
    ``divisor``: what sums are divided by, in place of the weights that ranks bring.

    ``trained()`` says of each parameter whether it has, or gets, a gradient of this rank's.
    Parameters that no rank trains have no place in a bucket, and a bucket in which no rank trains
    any is not sent. ``reformed()``: parameters whose gradients are of another dtype now. Both these
    and what is trained for the first time get a place at the end of the pass that finds them.
    ``mark()``: a number below ``MARKS`` for what was done since the last pass; where ranks' differ
    ``told.marks_differ`` says so.

    Making a reducer is collective: parameters that differ between the ranks raise MismatchError,
    naming the first.
    """

    def __init__(
        self,
        lane: Lane,
        specs: Sequence[ParameterSpec],
        allocate: Allocate,
        *,
        bucket_bytes: int | None = None,
        overlap: bool = True,
        stream: Callable[[], int | None] = lambda: None,
        fill: Callable[[Bucket, Sequence[int]], Sequence[bool]] | None = None,
        trained: Callable[[], Sequence[bool]] | None = None,
        reformed: Callable[[], Mapping[int, ParameterSpec]] = dict,
        mark: Callable[[], float] = float,
        divisor: float | None = None,
    ) -> None:
        super().__init__(lane, specs, stream, apart=False)
        self._allocate = allocate
        self._bucket_bytes = bucket_bytes or self._world.tuning.bucket_bytes
        self._overlap = overlap
        self._fill = fill
        self._trained_now = trained
        self._reformed_now = reformed
        self._mark = mark
        self._divisor = divisor
        # The first pass learns in which order gradients come, and reduces at its end.
        self._order_is_final = self._world.size == 1
        self.generation = 0  # grows when gradients get new places
        self._late: dict[int, ParameterSpec] = {}
        self._accumulated: set[int] = set()  # what has come in passes that were not reduced
        # In which parameters' means there is a gradient that has come since the last one.
        self.fresh: list[bool] = [False] * len(specs)
        self._shadows = False
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[int, Bucket] = {}
        self._is_trained = [True] * len(self._specs) if trained is None else list(trained())
        anywhere = self._world.gather_objects(self._is_trained)
        self._build([i for i in range(len(specs) - 1, -1, -1) if any(own[i] for own in anywhere)])

    def view(self, index: int) -> Any:
        """Where the gradient of parameter ``index`` lies, in the parameter's shape."""
        return self._bucket_of[index].views[index]

    def bucket_of(self, index: int) -> Bucket | None:
        """The bucket in which the gradient of a parameter has its place, if it has one."""
        return self._bucket_of.get(index)

    @property
    def late(self) -> Collection[int]:
        """In a pass: the parameters that get their place, or another one, at its end."""
        return self._late

    @property
    def pieces(self) -> Sequence[Bucket]:
        return self._buckets

    def open(self, merge: Merge, *, changed: bool = False) -> None:
        if self._trained_now is not None:
            self._is_trained = list(self._trained_now())
            trained = self._is_trained
            self._late = {i: s for i, s in self._reformed_now().items() if trained[i]}
            if len(self._bucket_of) < len(self._specs):
                for index in range(len(self._specs)):
                    if trained[index] and index not in self._bucket_of:
                        self._late.setdefault(index, self._specs[index])
        super().open(merge, changed=changed)

    def _stays(self, index: int) -> None:
        self._accumulated.add(index)

    def shadow(self) -> list[bool] | None:
        self._shadows, trained = True, self._is_trained
        self._is_trained, self._late = [False] * len(self._specs), {}
        try:
            return super().shadow()
        finally:
            self._shadows, self._is_trained = False, trained

    def _own_news(self) -> dict[str, float]:
        mark = self._mark()
        return {"late": float(len(self._late)), "marks": mark, "squared_marks": mark**2}

    def _trained(self) -> Sequence[bool]:
        trained = self._is_trained
        if not self._any_moved:
            return [any(trained[index] for index in bucket.members) for bucket in self._buckets]
        of = self._bucket_of
        return [any(trained[i] and of[i] is b for i in b.members) for b in self._buckets]

    def _announce(self, news: News, merge: Merge) -> Opening:
        self._arrivals = None if self._order_is_final else []
        opening = super()._announce(news, merge)
        own = self._divisor
        self._mean = mean_over(lambda: opening.divisor if own is None else own)
        return opening

    def _count_in(self) -> None:
        trained = self._is_trained
        for bucket in self._buckets:
            bucket.missing = sum(map(trained.__getitem__, bucket.members))

    def _came_again(self, index: int) -> None:
        bucket = self._bucket_of.get(index)
        if bucket is not None and bucket.handle is not None and self._expected is not None:
            raise MismatchError(
                f"parameter '{self._specs[index].name}' received a gradient "
                f"{self._came[index]} times in this backward pass, "
                f"{self._expected[index]} times before, and was being averaged already. "
                "Use overlap=False for models whose use of a parameter changes from step to step."
            )

    def _launch(self, piece: Piece) -> None:
        number = self._launched - 1
        bucket = self._buckets[number]
        opening = self._opening
        if opening is None:
            raise RuntimeError("a bucket is reduced outside of a pass")
        has = self._has_gradient(bucket)
        bucket.used[...] = has
        bucket.fresh[...] = self._are_fresh(bucket.members, has)
        if any(has) and not all(has):
            with self._using():
                for index, one in zip(bucket.members, has, strict=True):
                    if not one:
                        bucket.views[index][...] = 0
        flat, mean, scaled = bucket.flat, self._mean, self._scaled(bucket.gradients)

        def prepare() -> None:
            if any(has):
                scaled()
            elif opening.trained(number):
                flat[...] = 0

        def reduce(run: Dispatch, parts: Parts) -> None:
            if opening.trained(number):
                run.all_reduce(flat, mean, parts=parts)

        bucket.handle = self._world.submit(
            f"the gradients from '{self._specs[bucket.members[0]].name}' on",
            reduce,
            on_stream(self._stream, flat),
            prepare=prepare,
        )

    def _has_gradient(self, bucket: Bucket) -> Sequence[bool]:
        """Put gradients into a bucket; for each of its members: is there one on this rank?"""
        if self._shadows:
            return [False] * len(bucket.members)
        if not self._late and not self._any_moved:
            return self._filled(bucket, bucket.members)
        here = [i for i in bucket.members if self._bucket_of[i] is bucket and i not in self._late]
        has = dict(zip(here, self._filled(bucket, here), strict=True))
        return [has.get(index, False) for index in bucket.members]

    def _filled(self, bucket: Bucket, members: Sequence[int]) -> Sequence[bool]:
        if self._fill is None:
            return [self._came[index] > 0 for index in members]
        return self._fill(bucket, members)

    def _are_fresh(self, members: Sequence[int], has: Sequence[bool]) -> Sequence[bool]:
        """Which gradients have come since the last mean."""
        came, kept = self._came, self._accumulated
        if all(has) and all(map(came.__getitem__, members)):
            return has
        return [
            one and (came[index] > 0 or index in kept)
            for index, one in zip(members, has, strict=True)
        ]

    def _collect(self) -> list[bool]:
        opening = self._opening
        if opening is None:
            raise RuntimeError("no pass is open")
        if opening.check().late:
            self._find_places()
        anywhere, fresh = np.zeros((2, len(self._specs)), bool)
        self._sum_marks(opening)
        for number, bucket in enumerate(self._buckets):
            if bucket.handle is not None:
                bucket.handle.wait()
                bucket.handle = None
            if opening.trained(number):
                members = list(bucket.members)
                anywhere[members] |= np.array(bucket.used.tolist()) != 0
                fresh[members] |= np.array(bucket.fresh.tolist()) != 0
        self.fresh = fresh.tolist()
        self._accumulated.clear()
        found: list[bool] = anywhere.tolist()
        return found

    def _sum_marks(self, opening: Opening) -> None:
        """Where gradients are on a device, what the ranks say of them travels on the host."""
        apart = [
            each.marks
            for number, each in enumerate(self._buckets)
            if each.marks is not None and opening.trained(number)
        ]
        if not apart:
            return
        marks = np.concatenate(apart)
        self._world.submit(
            "the closing of a backward pass",
            lambda run, parts: run.all_reduce(marks, SUM),
            on_host(marks),
        ).wait()
        start = 0
        for own in apart:
            own[...] = marks[start : start + own.size]
            start += own.size

    def _find_places(self) -> None:
        """Give those that are late a place, the same on all ranks, and reduce them, too."""
        late: set[int] = set()
        for theirs in self._world.gather_objects(list(self._late)):
            late.update(theirs)
        members = sorted(late, reverse=True)
        for index in members:
            self._specs[index] = self._late.get(index) or self._reformed_now().get(
                index, self._specs[index]
            )
        self._world.agree([str(self._specs[index]) for index in members], "parameters")
        self._late = {}
        self._add(cut_into_buckets(self._specs, members, self._bucket_bytes, self._bucket_bytes))
        while self._launched < len(self._buckets):
            self._launch_next()

    def _learn(self) -> None:
        """After the first pass also in which order gradients come (rank 0's)."""
        if self._overlap:
            super()._learn()
        if self._order_is_final:
            return
        self._order_is_final = True
        first_arrivals = list(dict.fromkeys(self._arrivals or []))
        order = [i for i in self._world.broadcast_object(first_arrivals) if i in self._bucket_of]
        rest = [i for i in sorted(self._bucket_of, reverse=True) if i not in set(order)]
        old_views = {index: self.view(index) for index in self._bucket_of}
        self._build([*order, *rest])
        with self._using():
            for index, old in old_views.items():
                self.view(index)[...] = old

    def _build(self, order: Sequence[int]) -> None:
        self._buckets, self._bucket_of, self._any_moved = [], {}, False
        self._add(cut_into_buckets(self._specs, order, FIRST_BUCKET_BYTES, self._bucket_bytes))
        self._launched = 0

    def _add(self, groups: Sequence[tuple[int, ...]]) -> None:
        """Further buckets, behind those that there are. Collective."""
        for members in groups:
            bucket = make_bucket(self._specs, members, self._allocate)
            self._buckets.append(bucket)
            self._any_moved |= any(index in self._bucket_of for index in members)
            self._bucket_of.update(dict.fromkeys(members, bucket))
        of = self._bucket_of
        self._waiting = [(of[i],) if i in of else () for i in range(len(self._specs))]
        self.generation += 1
