"""The gradients of an optimizer: which have come, and their reduction over the ranks.

Dense ones lie in the engine's buckets, which all ranks reduce in one order, whichever gradients
come first: a bucket that is full is reduced while backward computes the next. The others (sparse
ones, and what a compression of the user's own makes) are reduced when they are waited for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mpizero import MpizeroError, World
from mpizero.engine import GradientReducer, ParameterSpec, Weight, take_lane
from mpizero.engine.buckets import Bucket
from mpizero_torch import tensors
from mpizero_torch.bucket_gradients import BucketGradients
from mpizero_torch.bucket_places import layout
from mpizero_torch.horovod.allgather import gather_rows
from mpizero_torch.horovod.compression import Compressor
from mpizero_torch.horovod.negotiation import Handle, stand_in
from mpizero_torch.horovod.process_set import ProcessSet
from mpizero_torch.horovod.sparse import sparse

GRADIENTS = "gradients"

# By their number, which is the same on all ranks: those whose optimizers are still there.
_living: weakref.WeakValueDictionary[str, Gradients] = weakref.WeakValueDictionary()


class Gradients:
    """Reduces the gradients of ``named`` parameters, once each has come ``passes`` times.

    They are multiplied by ``prescale`` before they are summed, and the sum is divided by
    ``divisor``. ``sparse_as_dense``: make sparse ones dense first.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        process_set: ProcessSet,
        *,
        compression: type[Compressor],
        passes: int,
        prescale: float,
        divisor: float,
        sparse_as_dense: bool,
    ) -> None:
        self._process_set = process_set
        self._compression = compression
        self.passes = passes
        self._prescale, self._divisor = prescale, divisor
        self._sparse_as_dense = sparse_as_dense
        # Does the compression do anything but convert to another dtype?
        own = getattr(compression.compress, "__func__", None)
        self._converts = own is getattr(Compressor.compress, "__func__", None)
        self._hooks: list[Any] = []
        # Of gradients that were sparse and have been made dense: how many dimensions were.
        self._sparse_dims: dict[int, int] = {}
        self._named: list[tuple[str, nn.Parameter]] = []
        self._lane = take_lane(process_set.world)
        self._world = self._lane.world
        self.name = f"optimizer {self._lane.number} of set {process_set.process_set_id}"
        _living[self.name] = self
        self.watch(named)

    def watch(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Watch these parameters from now on, and no others."""
        self.remove()
        self._named = list(named)
        self._came = [0] * len(self._named)
        self._arrivals: list[int] = []
        self._loose: set[int] | None = None
        self._reducer: GradientReducer | None = None
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._on_accumulated(index))
            for index, (_, parameter) in enumerate(self._named)
        ]

    def remove(self) -> None:
        """Watch none any more."""
        while self._hooks:
            self._hooks.pop().remove()

    def unwatched(
        self, named: Sequence[tuple[str, nn.Parameter]]
    ) -> list[tuple[str, nn.Parameter]]:
        """Those of the parameters that are not watched."""
        known = {id(each) for _, each in self._named}
        return [pair for pair in named if id(pair[1]) not in known]

    def add(self, late: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Reduce these parameters' gradients, too, the next time, though nobody watched them."""
        first = len(self._named)
        self._named += late
        self._came += [0] * len(late)
        if self._loose is not None:
            self._loose |= set(range(first, len(self._named)))

    @property
    def under_way(self) -> bool:
        """Have gradients come that have not been waited for, and are being reduced already?"""
        return bool(self._arrivals)

    def synchronize(self) -> None:
        """Wait until every gradient that has come is the reduced one. Collective.

        Where no rank has a gradient for a parameter it has none afterwards.
        """
        form = f"{len(self._named)} parameters"
        handle = Handle(GRADIENTS, self.name, form, lambda world: self._reduce(), told=form)
        self._process_set.negotiation.submit(handle).wait()

    def stand_in(self) -> None:
        """Take part in one reduction of the others', with zeros."""
        if self.under_way:
            raise MpizeroError(
                "hvd.join(): this rank has gradients that it has not waited for. Call step() or "
                "synchronize() after the last backward()."
            )
        mine = [parameter.grad for _, parameter in self._named]
        for _, parameter in self._named:
            parameter.grad = None
        try:
            self._reduce(joined=True)
        finally:
            for (_, parameter), gradient in zip(self._named, mine, strict=True):
                parameter.grad = gradient

    def _on_accumulated(self, index: int) -> Callable[[torch.Tensor], None]:
        # torch keeps hooks where Python's collector does not see them, hence the weak reference.
        found = weakref.ref(self)

        def accumulated(parameter: torch.Tensor) -> None:
            gradients = found()
            if gradients is not None:
                gradients._arrived(index)

        return accumulated

    def _arrived(self, index: int) -> None:
        self._came[index] += 1
        if self._came[index] < self.passes:
            return
        if self._came[index] > self.passes:
            raise MpizeroError(
                f"The gradient of '{self._named[index][0]}' has come {self._came[index]} times "
                f"since the last step(), with backward_passes_per_step={self.passes}. Let there be "
                "a step() (or synchronize()) after that many backward passes, or make "
                "backward_passes_per_step as large as their number."
            )
        self._arrivals.append(index)
        if self._reducer is not None:
            self._tell(index)

    def _tell(self, index: int) -> None:
        """A gradient is ready to be reduced: let the reducer know."""
        reducer = self._reducer
        if reducer is None or index not in self._position:
            return
        if not reducer.is_open:
            reducer.open(reducer.plan(Weight(), kept=False))
        reducer.ready(self._position[index])

    def _reduce(self, joined: bool = False) -> None:
        if self._loose is None:
            self._sort_out()
        loose = sorted(self._loose or ())
        reducer = self._reducer
        if reducer is not None:
            if joined:
                anywhere = reducer.shadow() or []
            else:
                if not reducer.is_open:
                    reducer.open(reducer.plan(Weight(), kept=False))
                    for index in self._arrivals:
                        if index in self._position:
                            reducer.ready(self._position[index])
                anywhere = reducer.close()
            if not joined:
                self._buckets.take_over(anywhere)
        if loose:
            self._reduce_loose(loose)
        if not joined:
            self._give_back_sparse()
        self._came = [0] * len(self._named)
        self._arrivals = []

    def _sort_out(self) -> None:
        """The first time: which gradients are sparse on any rank? The others get buckets."""
        mine = {
            index: parameter.grad.sparse_dim()
            for index, (_, parameter) in enumerate(self._named)
            if parameter.grad is not None and parameter.grad.is_sparse
        }
        everyones: list[dict[int, int]] = self._world.gather_objects(mine)
        dims = {index: each[index] for each in everyones for index in each}
        self._loose = set() if self._sparse_as_dense else set(dims)
        if self._sparse_as_dense:
            self._sparse_dims = {id(self._named[index][1]): dim for index, dim in dims.items()}
        if not self._converts:
            self._loose = set(range(len(self._named)))
        self._dense = [i for i in range(len(self._named)) if i not in self._loose]
        self._position = {index: at for at, index in enumerate(self._dense)}
        if self._dense:
            named = [self._named[index] for index in self._dense]
            layouts = self._world.broadcast_object([layout(each) for _, each in named])
            self._buckets = BucketGradients(named, layouts, own=False, prescale=self._prescale)
            self._reducer = self._make_reducer()
            self._buckets.serve(self._reducer)

    def _make_reducer(self) -> GradientReducer:
        parameters = [self._named[index] for index in self._dense]
        devices = {parameter.device for _, parameter in parameters}
        if len(devices) > 1:
            raise MpizeroError(
                f"hvd.DistributedOptimizer: the parameters lie on {sorted(map(str, devices))}; all "
                "must be on one device."
            )
        device = next(iter(devices))
        specs = [
            ParameterSpec(
                name,
                tuple(each.shape),
                tensors.numpy_dtype(self._compression.travels_as(each.dtype)),
            )
            for name, each in parameters
        ]
        return GradientReducer(
            self._lane,
            specs,
            lambda count, dtype: tensors.zeros(self._world, count, dtype, device),
            stream=lambda: tensors.current_stream(device),
            fill=self._fill,
            divisor=self._divisor,
        )

    @torch.no_grad()
    def _fill(self, bucket: Bucket, members: Sequence[int]) -> list[bool]:
        """Put the gradients of a bucket's parameters into it, in the dtype they travel in."""
        for at in members:
            self._gradient(self._dense[at])  # dense from here on
        return self._buckets.fill(bucket, members)

    @torch.no_grad()
    def _reduce_loose(self, loose: Sequence[int]) -> None:
        """Those outside the buckets, one by one: dense, sparse, or on no rank at all."""
        kinds = torch.zeros(len(loose), dtype=torch.int32)
        for at, index in enumerate(loose):
            gradient = self._gradient(index)
            if gradient is not None:
                kinds[at] = 2 if gradient.is_sparse else 1
        self._world.allreduce(kinds, "max")
        for index, kind in zip(loose, kinds.tolist(), strict=True):
            if kind == 2:
                self._reduce_sparse(index)
            elif kind == 1:
                self._reduce_one(index)

    def _reduce_one(self, index: int) -> None:
        parameter = self._named[index][1]
        gradient = self._gradient(index)
        mine = torch.zeros_like(parameter) if gradient is None else gradient.clone()
        small, context = self._compression.compress(mine.mul_(self._prescale))
        small = small.contiguous()
        self._world.allreduce(small)
        parameter.grad = self._compression.decompress(small, context) / self._divisor

    def _reduce_sparse(self, index: int) -> None:
        """The ranks' rows behind one another; those that several have are added up."""
        parameter = self._named[index][1]
        gradient = self._gradient(index)
        if gradient is not None and not gradient.is_sparse:
            raise MpizeroError(
                f"hvd.DistributedOptimizer: the gradient of '{self._named[index][0]}' is dense "
                "here, and sparse on another rank, or was. sparse_as_dense=True makes all dense."
            )
        if gradient is None:
            indices = torch.zeros((0, 1), dtype=torch.int64, device=parameter.device)
            values = parameter.new_zeros((0, *parameter.shape[1:]))
        else:
            gradient = gradient.coalesce()
            indices, values = gradient.indices().t().contiguous(), gradient.values()
        small, context = self._compression.compress(values * self._prescale)
        every = gather_rows(self._world, indices)
        rows = self._compression.decompress(gather_rows(self._world, small.contiguous()), context)
        parameter.grad = sparse(every, rows / self._divisor, parameter.shape)

    def _gradient(self, index: int) -> torch.Tensor | None:
        parameter = self._named[index][1]
        if self._sparse_as_dense and parameter.grad is not None and parameter.grad.is_sparse:
            self._sparse_dims[id(parameter)] = parameter.grad.sparse_dim()
            parameter.grad = parameter.grad.to_dense()
        return parameter.grad

    @torch.no_grad()
    def _give_back_sparse(self) -> None:
        """Optimizers of sparse gradients want those that were made dense as they were."""
        for _, parameter in self._named:
            dims = self._sparse_dims.get(id(parameter))
            if dims is not None and parameter.grad is not None and not parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_sparse(dims)


def _stand_in(world: World, name: str, told: Any) -> None:
    """A rank that has joined takes part in the reduction of the optimizer that it has, too."""
    found = _living.get(name)
    if found is None:
        raise MpizeroError(
            f"hvd.join(): the other ranks reduce the {told} of an optimizer ({name}) that this "
            "rank has not, or not any more. Keep it until join() returns."
        )
    found.stand_in()


stand_in(GRADIENTS, _stand_in)
