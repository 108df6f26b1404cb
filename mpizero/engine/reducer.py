"""``GradientReducer``: averages gradients over the ranks, every rank keeps all (ZeRO's stage 0)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpizero.api import World
from mpizero.engine.buckets import Allocate, Bucket, cut_into_buckets, make_bucket
from mpizero.engine.passes import Piece, ReducedPasses
from mpizero.engine.specs import ParameterSpec
from mpizero.errors import MismatchError
from mpizero.reduction.operation import mean_over

FIRST_BUCKET_BYTES = 1 << 20


class GradientReducer(ReducedPasses):
    """Buckets for the gradients of ``specs``, and their all-reduction over ``world``.

    ``allocate(count, dtype)`` gives zeroed flat memory where gradients shall lie. ``stream()`` is
    the raw CUDA stream on which device gradients have been computed. ``fill(members)`` puts what
    gradients there are of these parameters into their views, just before they are reduced.
    ``divisor``: what sums are divided by, in place of the weights that ranks bring. Making a
    reducer is collective: parameters that differ between the ranks raise MismatchError, naming the
    first.
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
        divisor: float | None = None,
    ) -> None:
        super().__init__(world, specs, stream)
        self._allocate = allocate
        self._bucket_bytes = bucket_bytes or world.tuning.bucket_bytes
        self._overlap = overlap
        self._fill = fill
        self._mean = mean_over(self._divisor if divisor is None else lambda: divisor)
        # The first pass learns in which order gradients come, and reduces at its end.
        self._order_is_final = world.size == 1
        self.generation = 0  # grows when gradients get new places
        self._build(range(len(self._specs) - 1, -1, -1))

    def view(self, index: int) -> Any:
        """Where the gradient of parameter ``index`` lies, in the parameter's shape."""
        return self._bucket_of[index].views[index]

    @property
    def pieces(self) -> Sequence[Bucket]:
        return self._buckets

    def _scale_kept(self, factor: float, weight: float) -> None:
        if factor != 1.0:
            for bucket in self._buckets:
                bucket.flat *= factor

    def _came_again(self, index: int) -> None:
        if self._bucket_of[index].handle is not None and self._expected is not None:
            raise MismatchError(
                f"parameter '{self._specs[index].name}' received a gradient "
                f"{self._came[index]} times in this backward pass, "
                f"{self._expected[index]} times before, and was being averaged already. "
                "Use overlap=False for models whose use of a parameter changes from step to step."
            )

    def _announce(self, *mine: float) -> None:
        self._arrivals = None if self._order_is_final else []
        super()._announce(*mine)

    def _launch(self, piece: Piece, has_gradient: Sequence[bool] | None) -> None:
        bucket = self._buckets[self._launched - 1]
        if has_gradient is None:
            bucket.used[...] = 1
        else:
            used = [has_gradient[index] for index in bucket.members]
            bucket.used[...] = np.asarray(used, bucket.layout.dtype)
            for index, has in zip(bucket.members, used, strict=True):
                if not has:
                    bucket.views[index][...] = 0
        self._fill(bucket.members)
        flat, mean = bucket.flat, self._mean
        bucket.handle = self._world.submit(
            f"the gradients from '{self._specs[bucket.members[0]].name}' on",
            lambda run, parts: run.all_reduce(flat, mean, parts=parts),
            (flat,),
            self._stream(),
        )

    def _collect(self, has_gradient: Sequence[bool]) -> list[bool]:
        self._wait_for_opening()
        anywhere = [False] * len(self._specs)
        for bucket in self._buckets:
            if bucket.handle is not None:
                bucket.handle.wait()
                bucket.handle = None
            for index, used in zip(bucket.members, bucket.used.tolist(), strict=True):
                anywhere[index] = used != 0
        return anywhere

    def _learn(self) -> None:
        """After the first pass also in which order gradients come (rank 0's)."""
        if self._overlap:
            super()._learn()
        if self._order_is_final:
            return
        self._order_is_final = True
        first_arrivals = list(dict.fromkeys(self._arrivals or []))
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
        self._waiting = [(bucket,) for bucket in self._bucket_of]
        self._launched = 0
        self.generation += 1
