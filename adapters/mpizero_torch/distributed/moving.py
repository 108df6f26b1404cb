"""The collectives that move tensors as they are."""

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
    room_for,
)
from mpizero_torch.distributed.c10d import (
    AllgatherOptions,
    AllToAllOptions,
    BroadcastOptions,
    GatherOptions,
    ScatterOptions,
)
from mpizero_torch.distributed.calls import GroupCalls, collective
from mpizero_torch.distributed.profiled import shown_as

_BROADCAST, _ALL_GATHER, _ALL_TO_ALL = BroadcastOptions(), AllgatherOptions(), AllToAllOptions()
_GATHER, _SCATTER = GatherOptions(), ScatterOptions()


class MovingCalls(GroupCalls):
    """Broadcast, gather, scatter, all-gather and all-to-all."""

    @shown_as("broadcast")
    @collective
    def broadcast(self, tensors: Sequence[torch.Tensor], opts: Any = _BROADCAST) -> Work:
        """Give every rank the root's tensor."""
        (tensor,) = tensors
        array, root = array_of(tensor), opts.rootRank
        handle = self._start(opts, lambda **how: self.world.broadcast(array, root, **how))
        return self._work(handle, tensors)

    @shown_as("all_gather_into_tensor", inputs=1)
    @collective
    def all_gather_single(
        self, output: torch.Tensor, input: torch.Tensor, opts: Any = _ALL_GATHER
    ) -> Work:
        """Put the elements of all ranks' tensors behind one another."""
        if output.numel() != input.numel() * self.size():
            raise ValueError(
                f"all_gather: output has {output.numel()} elements; allowed: as many as input "
                f"({input.numel()}) times the {self.size()} ranks"
            )
        if output.dtype != input.dtype:
            raise ValueError(
                f"all_gather: output is of {output.dtype}, input of {input.dtype}; allowed: one "
                "dtype"
            )
        direct = output.is_contiguous()
        into = output if direct else torch.empty_like(output, memory_format=torch.contiguous_format)
        source, target = flat_array_of(input), flat_array_of(into)
        handle = self._start(opts, lambda **how: self.world.allgather(source, out=target, **how))
        return self._work(handle, [output], None if direct else dealt_out(into.view(-1), [output]))

    @shown_as("all_gather", inputs=1)
    @collective
    def allgather(
        self,
        outputs: Sequence[Sequence[torch.Tensor]],
        inputs: Sequence[torch.Tensor],
        opts: Any = _ALL_GATHER,
    ) -> Work:
        """Give every rank all ranks' tensors, which may be of different sizes."""
        (listed,), (input,) = outputs, inputs
        self._check_list("all_gather", listed, input)
        flat = room_for(listed)
        source, target = flat_array_of(input), array_of(flat)
        even = len({tensor.numel() for tensor in listed}) == 1
        gather = self.world.allgather if even else self.world.allgather_uneven
        handle = self._start(opts, lambda **how: gather(source, out=target, **how))
        return self._work(handle, listed, dealt_out(flat, listed))

    @shown_as("all_gather", inputs=1)
    @collective
    def allgather_coalesced(
        self,
        outputs: Sequence[Sequence[torch.Tensor]],
        inputs: Sequence[torch.Tensor],
        opts: Any = _ALL_GATHER,
    ) -> Work:
        """``allgather`` of several tensors: ``outputs[r]`` are those of rank r."""
        works = [
            self.allgather([[of_rank[at] for of_rank in outputs]], [input], opts)
            for at, input in enumerate(inputs)
        ]
        return self._together(works, [tensor for listed in outputs for tensor in listed])

    @shown_as("all_gather_into_tensor", inputs=1)
    @collective
    def all_gather_single_coalesced(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        opts: Any = _ALL_GATHER,
    ) -> Work:
        """``all_gather_single`` of several tensors."""
        works = [
            self.all_gather_single(output, input, opts)
            for output, input in zip(outputs, inputs, strict=True)
        ]
        return self._together(works, outputs)

    @shown_as("gather", inputs=1)
    @collective
    def gather(
        self,
        outputs: Sequence[Sequence[torch.Tensor]],
        inputs: Sequence[torch.Tensor],
        opts: Any = _GATHER,
    ) -> Work:
        """Give the root all ranks' tensors."""
        (input,), root = inputs, opts.rootRank
        source = flat_array_of(input)
        if self.rank() != root:
            handle = self._start(opts, lambda **how: self.world.gather(source, root, **how))
            return self._work(handle, [])
        (listed,) = outputs
        self._check_list("gather", listed, input)
        flat = room_for(listed)
        target = array_of(flat)
        handle = self._start(opts, lambda **how: self.world.gather(source, root, out=target, **how))
        return self._work(handle, listed, dealt_out(flat, listed))

    @shown_as("scatter", inputs=1)
    @collective
    def scatter(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[Sequence[torch.Tensor]],
        opts: Any = _SCATTER,
    ) -> Work:
        """Give each rank its tensor of the root's."""
        (output,), root = outputs, opts.rootRank
        direct = output.is_contiguous()
        into = output if direct else torch.empty_like(output, memory_format=torch.contiguous_format)
        source = None
        if self.rank() == root:
            (listed,) = inputs
            self._check_list("scatter", listed, output)
            source = array_of(one_behind_another(listed))
        target = flat_array_of(into)
        handle = self._start(
            opts, lambda **how: self.world.scatter(source, root, out=target, **how)
        )
        return self._work(handle, [output], None if direct else dealt_out(into.view(-1), [output]))

    @shown_as("all_to_all", inputs=1)
    @collective
    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        opts: Any = _ALL_TO_ALL,
    ) -> Work:
        """Send each rank its rows of the first axis: equally many, or as the sizes say."""
        direct = output.is_contiguous()
        into = output if direct else torch.empty_like(output, memory_format=torch.contiguous_format)
        if output_split_sizes or input_split_sizes:
            sent = _rows(input, input_split_sizes, self.size())
            expected = _rows(into, output_split_sizes, self.size())
            source, target = _as_rows(input), _as_rows(into)
            handle = self._start(
                opts,
                lambda **how: self.world.all_to_all_uneven(
                    source, sent, out=target, out_counts=expected, **how
                ),
            )
        else:
            if input.numel() != output.numel() or input.numel() % self.size():
                raise ValueError(
                    f"all_to_all: input has {input.numel()} elements, output {output.numel()}; "
                    f"allowed: equally many, a multiple of the {self.size()} ranks, or split sizes"
                )
            source, target = flat_array_of(input), flat_array_of(into)
            handle = self._start(
                opts, lambda **how: self.world.all_to_all(source, out=target, **how)
            )
        return self._work(handle, [output], None if direct else dealt_out(into.view(-1), [output]))

    @shown_as("all_to_all", inputs=1)
    @collective
    def alltoall(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        opts: Any = _ALL_TO_ALL,
    ) -> Work:
        """Send rank r the r-th tensor; the s-th output comes from rank s. Of any sizes."""
        if len(outputs) != self.size() or len(inputs) != self.size():
            raise ValueError(
                f"all_to_all: {len(inputs)} tensors in, {len(outputs)} out; allowed: {self.size()}"
            )
        source, flat = array_of(one_behind_another(inputs)), room_for(outputs)
        target = array_of(flat)
        sent = [tensor.numel() for tensor in inputs]
        expected = [tensor.numel() for tensor in outputs]
        handle = self._start(
            opts,
            lambda **how: self.world.all_to_all_uneven(
                source, sent, out=target, out_counts=expected, **how
            ),
        )
        return self._work(handle, outputs, dealt_out(flat, outputs))

    # What torch has called them.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    alltoall_base = all_to_all_single

    def _check_list(self, function: str, listed: Sequence[torch.Tensor], one: torch.Tensor) -> None:
        if len(listed) != self.size():
            raise ValueError(f"{function}: {len(listed)} tensors; allowed: {self.size()}, by rank")
        if any(tensor.dtype != one.dtype for tensor in listed):
            raise ValueError(f"{function}: tensors of several dtypes; allowed: {one.dtype} alone")


def _rows(tensor: torch.Tensor, sizes: Sequence[int] | None, ranks: int) -> list[int]:
    if sizes:
        return [int(size) for size in sizes]
    if tensor.shape[0] % ranks:
        raise ValueError(
            f"all_to_all: {tensor.shape[0]} rows cannot be split evenly over {ranks} ranks"
        )
    return [tensor.shape[0] // ranks] * ranks


def _as_rows(tensor: torch.Tensor) -> Any:
    """An array of as many rows as the tensor has, each of one axis."""
    array = array_of(tensor)
    width = 1
    for extent in tensor.shape[1:]:
        width *= extent
    return array.reshape(tensor.shape[0], width)
