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
from mpizero_torch.distributed.calls import GroupCalls
from mpizero_torch.distributed.operations import operation_name, premultiplied
from mpizero_torch.distributed.sparse import all_reduce_sparse
from mpizero_torch.distributed.works import DoneWork, PendingWork

_ALL_REDUCE, _REDUCE_SCATTER = AllreduceOptions(), ReduceScatterOptions()


class ReducingCalls(GroupCalls):
    """All-reduce, reduce and reduce-scatter."""

    def allreduce(self, tensors: Sequence[torch.Tensor], opts: Any = _ALL_REDUCE) -> Work:
        """Combine one tensor over all ranks, in place."""
        (tensor,) = tensors
        op, is_async = _op_of(opts), self._is_async(opts)
        if tensor.layout is not torch.strided:
            return all_reduce_sparse(self.world, tensor, op)
        if (product := premultiplied(op, tensor)) is not None:
            tensor.detach().copy_(product)
        array, name = array_of(tensor), operation_name(op, tensor)
        if not is_async:
            self.world.allreduce(array, name)
            return DoneWork(tensors)
        return PendingWork([self.world.allreduce(array, name, asynchronous=True)], tensors)

    def allreduce_coalesced(self, tensors: Sequence[torch.Tensor], opts: Any = _ALL_REDUCE) -> Work:
        """Combine several tensors of one dtype over all ranks, in place, as if they were one."""
        if len(tensors) == 1:
            return self.allreduce(tensors, opts)
        if len({tensor.dtype for tensor in tensors}) > 1:
            raise ValueError("allreduce_coalesced: tensors must be all of one dtype")
        op = _op_of(opts)
        flat = one_behind_another(tensors)
        if (product := premultiplied(op, flat)) is not None:
            flat = product
        handle = self._start(
            opts,
            lambda **how: self.world.allreduce(array_of(flat), operation_name(op, flat), **how),
        )
        return self._work(handle, tensors, dealt_out(flat, tensors))

    def reduce(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> Work:
        """Combine one tensor over all ranks, for the root."""
        (tensor,) = tensors
        opts = opts or ReduceOptions()
        op = _op_of(opts)
        source = premultiplied(op, tensor)
        if source is not None and self.rank() == opts.rootRank:
            source = tensor.detach().copy_(source)
        source = tensor if source is None else source
        array, name = array_of(source), operation_name(op, tensor)
        handle = self._start(
            opts, lambda **how: self.world.reduce(array, opts.rootRank, name, **how)
        )
        return self._work(handle, tensors)

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
        op = _op_of(opts)
        product = premultiplied(op, input)
        source = flat_array_of(input if product is None else product)
        name = operation_name(op, input)
        direct = output.is_contiguous() and not share_memory(output, input)
        into = output if direct else torch.empty_like(output, memory_format=torch.contiguous_format)
        target = flat_array_of(into)
        handle = self._start(
            opts, lambda **how: self.world.reduce_scatter(source, name, out=target, **how)
        )
        return self._work(handle, [output], None if direct else dealt_out(into.view(-1), [output]))

    def _reduce_scatter_uneven(
        self, output: torch.Tensor, listed: Sequence[torch.Tensor], opts: Any
    ) -> Work:
        """By an all-reduce of all: the parts are of different lengths."""
        op = _op_of(opts)
        flat = one_behind_another(listed)
        if (product := premultiplied(op, flat)) is not None:
            flat = product
        start = sum(tensor.numel() for tensor in listed[: self.rank()])
        own = flat[start : start + output.numel()]
        handle = self._start(
            opts,
            lambda **how: self.world.allreduce(array_of(flat), operation_name(op, flat), **how),
        )
        return self._work(handle, [output], dealt_out(own, [output]))


def _op_of(opts: Any) -> Any:
    """The operation of an options object, or the operation itself."""
    return getattr(opts, "reduceOp", opts)
