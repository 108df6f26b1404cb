"""The collectives that combine tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import Work

from mpizero_torch.distributed.arrays import (
    array_of,
    dealt_out,
    flat_array_of,
    one_behind_another,
    share_memory,
)
from mpizero_torch.distributed.c10d import (
    AllreduceOptions,
    ReduceOptions,
    ReduceScatterOptions,
)
from mpizero_torch.distributed.calls import GroupCalls, collective
from mpizero_torch.distributed.operations import reduction_of
from mpizero_torch.distributed.profiled import shown_as
from mpizero_torch.distributed.sparse import all_reduce_sparse
from mpizero_torch.distributed.works import DoneWork, PendingWork

_ALL_REDUCE, _REDUCE_SCATTER = AllreduceOptions(), ReduceScatterOptions()


class ReducingCalls(GroupCalls):
    """All-reduce, reduce and reduce-scatter."""

    @shown_as("all_reduce")
    @collective
    def allreduce(self, tensors: Sequence[torch.Tensor], opts: Any = _ALL_REDUCE) -> Work:
        """Combine one tensor over all ranks, in place."""
        (tensor,) = tensors
        reduction = reduction_of(opts, tensor)
        if tensor.layout is not torch.strided:
            return all_reduce_sparse(self.world, tensor, reduction)
        if reduction.factor is not None:
            tensor.detach().copy_(reduction.source(tensor))
        if not self._is_async(opts):
            self.world.allreduce(array_of(tensor), reduction.name)
            return DoneWork(tensors)
        handle = self.world.allreduce(array_of(tensor), reduction.name, asynchronous=True)
        return PendingWork([handle], tensors)

    @shown_as("all_reduce")
    @collective
    def allreduce_coalesced(self, tensors: Sequence[torch.Tensor], opts: Any = _ALL_REDUCE) -> Work:
        """Combine several tensors of one dtype over all ranks, in place, as if they were one."""
        if len(tensors) == 1:
            return self.allreduce(tensors, opts)
        if len({tensor.dtype for tensor in tensors}) > 1:
            raise ValueError("allreduce_coalesced: tensors must be all of one dtype")
        flat, handle = self._all_reduce_flat(one_behind_another(tensors), opts)
        return self._work(handle, tensors, dealt_out(flat, tensors))

    @shown_as("reduce")
    @collective
    def reduce(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> Work:
        """Combine one tensor over all ranks, for the root."""
        (tensor,) = tensors
        opts = opts or ReduceOptions()
        reduction = reduction_of(opts, tensor)
        source = reduction.source(tensor)
        if source is not tensor and self.rank() == opts.rootRank:
            source = tensor.detach().copy_(source)
        array = array_of(source)
        handle = self._start(
            opts, lambda **how: self.world.reduce(array, opts.rootRank, reduction.name, **how)
        )
        return self._work(handle, tensors)

    @shown_as("reduce_scatter_tensor", inputs=1)
    @collective
    def reduce_scatter_single(
        self, output: torch.Tensor, input: torch.Tensor, opts: Any = _REDUCE_SCATTER
    ) -> Work:
        """Combine one tensor over all ranks; each gets its part of the elements."""
        if input.numel() != output.numel() * self.size():
            raise ValueError(
                f"reduce_scatter: input has {input.numel()} elements; allowed: as many as output "
                f"({output.numel()}) times the {self.size()} ranks"
            )
        return self._reduce_scatter(output, input, opts)

    @shown_as("reduce_scatter", inputs=1)
    @collective
    def reduce_scatter(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[Sequence[torch.Tensor]],
        opts: Any = _REDUCE_SCATTER,
    ) -> Work:
        """Combine lists of tensors over all ranks; rank r gets the r-th."""
        (output,), (listed,) = outputs, inputs
        if len(listed) != self.size():
            raise ValueError(f"reduce_scatter: {len(listed)} tensors for {self.size()} ranks")
        if len({tensor.numel() for tensor in listed}) > 1:
            return self._reduce_scatter_uneven(output, listed, opts)
        return self._reduce_scatter(output, one_behind_another(listed), opts)

    @shown_as("reduce_scatter_tensor", inputs=1)
    @collective
    def reduce_scatter_single_coalesced(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        opts: Any = _REDUCE_SCATTER,
    ) -> Work:
        """``reduce_scatter_single`` of several tensors."""
        works = [
            self.reduce_scatter_single(output, input, opts)
            for output, input in zip(outputs, inputs, strict=True)
        ]
        return self._together(works, outputs)

    # What torch has called them.
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def _reduce_scatter(self, output: torch.Tensor, input: torch.Tensor, opts: Any) -> Work:
        reduction = reduction_of(opts, input)
        source = flat_array_of(reduction.source(input))
        direct = output.is_contiguous() and not share_memory(output, input)
        into = output if direct else torch.empty_like(output, memory_format=torch.contiguous_format)
        target = flat_array_of(into)
        handle = self._start(
            opts,
            lambda **how: self.world.reduce_scatter(source, reduction.name, out=target, **how),
        )
        return self._work(handle, [output], None if direct else dealt_out(into.view(-1), [output]))

    def _reduce_scatter_uneven(
        self, output: torch.Tensor, listed: Sequence[torch.Tensor], opts: Any
    ) -> Work:
        """By an all-reduce of all: the parts are of different lengths."""
        flat, handle = self._all_reduce_flat(one_behind_another(listed), opts)
        start = sum(tensor.numel() for tensor in listed[: self.rank()])
        own = flat[start : start + output.numel()]
        return self._work(handle, [output], dealt_out(own, [output]))

    def _all_reduce_flat(self, flat: torch.Tensor, opts: Any) -> tuple[torch.Tensor, Any]:
        """Combine a tensor of our own; returns what has, or will have, the result."""
        reduction = reduction_of(opts, flat)
        flat = reduction.source(flat)
        handle = self._start(
            opts, lambda **how: self.world.allreduce(array_of(flat), reduction.name, **how)
        )
        return flat, handle
