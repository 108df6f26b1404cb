"""All-reduce of sparse tensors: the sum of what all ranks have, which is what gradients need."""

from __future__ import annotations

import torch
from torch.distributed import Work

from mpizero import World
from mpizero_torch.distributed.arrays import array_of
from mpizero_torch.distributed.c10d import ReduceOp
from mpizero_torch.distributed.operations import Reduction, reduction_of
from mpizero_torch.distributed.works import DoneWork
from mpizero_torch.tensors import as_tensor

_SUM = ReduceOp(ReduceOp.SUM)


def all_reduce_sparse(world: World, tensor: torch.Tensor, reduction: Reduction) -> Work:
    """Sum a COO tensor over all ranks; the work's result is the sum, and so is ``tensor``."""
    if tensor.layout is not torch.sparse_coo:
        raise ValueError(f"all_reduce: a tensor of {tensor.layout}; allowed: strided, sparse_coo")
    if reduction != reduction_of(_SUM, tensor):
        raise ValueError("all_reduce: sparse tensors can only be summed")
    own = tensor.detach().coalesce()
    # Every rank's entries, rank by rank; those in one place are added up in that order.
    places = as_tensor(world.allgather_uneven(array_of(own.indices().t().contiguous())))
    values = as_tensor(world.allgather_uneven(array_of(own.values().contiguous())))
    total = torch.sparse_coo_tensor(places.t(), values, own.shape, check_invariants=False)
    total = total.coalesce()
    with torch.no_grad():
        tensor.copy_(total)  # not its detach(), which has entries of its own
    return DoneWork([total])
