"""``sparse_allreduce``: sparse tensors, whose rows are gathered and added up."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpizero import ArgumentError
from mpizero_torch.horovod.allgather import ALLGATHER, submit_allgather
from mpizero_torch.horovod.negotiation import Handle
from mpizero_torch.horovod.operations import Average, ReduceOp, Sum, chosen
from mpizero_torch.horovod.process_set import ProcessSet, global_process_set


def sparse_allreduce_async(
    tensor: torch.Tensor,
    name: str | None = None,
    op: ReduceOp | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Submit the Average (the default) or Sum of sparse COO tensors over the ranks.

    ``handle()``, or ``synchronize(handle)``, returns it, as a new sparse tensor. The ranks' tensors
    may have any number of elements in any places.
    """
    function = "hvd.sparse_allreduce_async()"
    with process_set.negotiation.refusing(ALLGATHER, name):
        chosen_op = chosen(function, op)
        if chosen_op not in (Average, Sum):
            raise ArgumentError(function, "op", str(op), "Average or Sum")
        if tensor.layout is not torch.sparse_coo:
            given = f"of layout {tensor.layout}"
            raise ArgumentError(function, "tensor", given, "a sparse COO tensor")
        own = tensor.detach().coalesce()
    size = process_set.size()

    def total(results: tuple[list[torch.Tensor], object]) -> torch.Tensor:
        (indices, values), _ = results
        found = sparse(indices, values, tensor.shape)
        return found / size if chosen_op is Average else found

    parts = [own.indices().t().contiguous(), own.values()]
    return submit_allgather(parts, name, process_set).then(total)


def sparse(indices: torch.Tensor, values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The sparse tensor with these ``values`` at the places that the rows of ``indices`` name.

    Values of the same place are added up.
    """
    # They come from sparse tensors, so that there is nothing to check.
    made = torch.sparse_coo_tensor(indices.t(), values, list(shape), check_invariants=False)
    return made.coalesce()
