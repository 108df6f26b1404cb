"""Every collective of torch.distributed on the backend "mpizero" gives what it gives on gloo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

from support.process_groups import Pair, pair

__all__ = ["pair"]

several_ranks = pytest.mark.parallel([2, 3, 4])

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int8, torch.uint8,
)  # fmt: skip
MOVED = (*DTYPES, torch.bool, torch.complex64)
# gloo moves some dtypes with some collectives only, so it is given what it can move everywhere.
PARTS: dict[Any, tuple[Callable[[torch.Tensor], torch.Tensor], ...]] = {
    torch.bool: (lambda x: x.to(torch.uint8),),
    torch.complex64: (lambda x: x.real.contiguous(), lambda x: x.imag.contiguous()),
    None: (lambda x: x,),
}
BITS = (ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR)
OPERATIONS = (ReduceOp.SUM, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX, *BITS)


def numbers_of(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Others on each rank, small enough for no sum or product to overflow."""
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(0, 4, shape, generator=generator).to(dtype)
    return torch.randn(
        shape, dtype=dtype if dtype.is_complex else torch.float32, generator=generator
    ).to(dtype)


numbers = numbers_of


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the rounding of a few numbers in another order; gloo rounds after each sum."""
    if got.is_floating_point() or got.is_complex():
        unit = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, expected, rtol=8 * unit, atol=8 * unit)
    else:
        assert torch.equal(got, expected)


def compare(pair: Pair, call: Callable[[Any], Any], exactly: bool = True) -> None:
    """``call(group)`` gives the same tensors for both groups."""
    ours, theirs = (call(group) for group in pair)
    ours, theirs = ((x,) if isinstance(x, torch.Tensor) else x for x in (ours, theirs))
    for got, expected in zip(ours, theirs, strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        if exactly:
            assert torch.equal(got, expected)
        else:
            close(got, expected)


@several_ranks
@pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: str(op).rpartition(".")[2])
def test_all_reduce_and_reduce(pair: Pair, op: Any) -> None:
    for dtype in DTYPES:
        if op in BITS and dtype.is_floating_point:
            with pytest.raises((RuntimeError, ValueError)):
                dist.all_reduce(numbers((3,), dtype), op)
            continue
        for shape in ((), (1,), (0,), (7, 3), (5000,)):

            def all_reduce(group: Any, dtype: Any = dtype, shape: Any = shape) -> torch.Tensor:
                tensor = numbers(shape, dtype)
                dist.all_reduce(tensor, op, group)
                return tensor

            def reduce(group: Any, dtype: Any = dtype, shape: Any = shape) -> torch.Tensor:
                tensor = numbers(shape, dtype, 1)
                dist.reduce(tensor, dist.get_world_size() - 1, op, group)
                is_root = dist.get_rank() == dist.get_world_size() - 1
                return tensor if is_root else tensor.new_zeros(0)

            compare(pair, all_reduce, exactly=False)
            compare(pair, reduce, exactly=False)


@several_ranks
def test_operations_that_gloo_does_not_have(pair: Pair) -> None:
    size = dist.get_world_size()
    for dtype in (torch.float32, torch.bfloat16):
        mean = numbers((9,), dtype)
        everyones = [torch.empty_like(mean) for _ in range(size)]
        dist.all_gather(everyones, mean)
        dist.all_reduce(mean, ReduceOp.AVG)
        total = torch.stack(everyones).double().mean(0)
        close(mean, total.to(dtype))
    tensor = torch.full((4,), 3.0)
    dist.all_reduce(tensor, torch.distributed._make_nccl_premul_sum(0.5))
    assert torch.equal(tensor, torch.full((4,), 1.5 * size))
    for op, expected in (
        (ReduceOp.SUM, True), (ReduceOp.PRODUCT, False), (ReduceOp.MAX, True),
        (ReduceOp.MIN, False), (ReduceOp.BOR, True), (ReduceOp.BAND, False),
        (ReduceOp.BXOR, True),
    ):  # fmt: skip
        flag = torch.tensor([dist.get_rank() == 0, False])
        dist.all_reduce(flag, op)
        assert flag.tolist() == [expected, False], op
    complex_sum = torch.full((3,), 1 + 2j)
    dist.all_reduce(complex_sum)
    assert torch.equal(complex_sum, torch.full((3,), size * (1 + 2j)))


@several_ranks
@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_collectives_that_move(pair: Pair, dtype: torch.dtype) -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    root = size - 1
    seen = PARTS[None][0]  # what the call under way is made with

    def numbers(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
        return seen(numbers_of(shape, dtype, seed))

    def broadcast(group: Any) -> torch.Tensor:
        tensor = numbers((4, 3), dtype)
        dist.broadcast(tensor, root, group)
        return tensor

    def all_gather(group: Any) -> list[torch.Tensor]:
        listed = [numbers((2, 3), dtype) for _ in range(size)]
        dist.all_gather(listed, numbers((2, 3), dtype, 1), group)
        return listed

    def gather(group: Any) -> list[torch.Tensor]:
        listed = [numbers((5,), dtype) for _ in range(size)] if rank == root else None
        dist.gather(numbers((5,), dtype, 2), listed, root, group)
        return listed or []

    def scatter(group: Any) -> torch.Tensor:
        listed = [numbers((2, 2), dtype, 3 + r) for r in range(size)] if rank == root else None
        tensor = numbers((2, 2), dtype)
        dist.scatter(tensor, listed, root, group)
        return tensor

    def all_gather_into_tensor(group: Any) -> torch.Tensor:
        out = numbers((size * 2, 3), dtype)
        dist.all_gather_single(out, numbers((2, 3), dtype, 4), group)
        return out

    def all_to_all_single(group: Any) -> torch.Tensor:
        out = numbers((size * 2, 3), dtype)
        dist.all_to_all_single(out, numbers((size * 2, 3), dtype, 5), group=group)
        return out

    def all_to_all_with_sizes(group: Any) -> torch.Tensor:
        sent = [r + 1 for r in range(size)]
        out = numbers((size * (rank + 1), 2), dtype)
        x = numbers((sum(sent), 2), dtype, 6)
        dist.all_to_all_single(out, x, [rank + 1] * size, sent, group=group)
        return out

    calls = [broadcast, all_gather, gather, scatter, all_gather_into_tensor, all_to_all_single]
    for call in (*calls, all_to_all_with_sizes):
        seen = PARTS[None][0]
        ours = call(pair.ours)
        for seen in PARTS.get(dtype, PARTS[None]):
            for got, expected in zip(ours, call(pair.gloo), strict=True):
                assert got.dtype == dtype and torch.equal(seen(got), expected)


@several_ranks
def test_lists_of_tensors_to_each_rank(pair: Pair) -> None:
    """gloo has no all_to_all of lists."""
    size, rank = dist.get_world_size(), dist.get_rank()
    sent = [torch.full((rank + 1, to + 1), float(10 * rank + to)) for to in range(size)]
    got = [torch.zeros(source + 1, rank + 1) for source in range(size)]
    dist.all_to_all(got, sent)
    for source, tensor in enumerate(got):
        assert torch.equal(tensor, torch.full((source + 1, rank + 1), float(10 * source + rank)))
    uneven = [torch.zeros(source + 1) for source in range(size)]
    dist.all_gather(uneven, torch.full((rank + 1,), float(rank)))
    for source, tensor in enumerate(uneven):
        assert torch.equal(tensor, torch.full((source + 1,), float(source)))


@several_ranks
@pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.MAX], ids=["SUM", "MAX"])
def test_reduce_scatter(pair: Pair, op: Any) -> None:
    size = dist.get_world_size()
    for dtype in DTYPES:

        def of_lists(group: Any, dtype: Any = dtype) -> torch.Tensor:
            out = numbers((3, 2), dtype)
            dist.reduce_scatter(out, [numbers((3, 2), dtype, r) for r in range(size)], op, group)
            return out

        def of_tensors(group: Any, dtype: Any = dtype) -> torch.Tensor:
            out = numbers((3, 2), dtype)
            dist.reduce_scatter_single(out, numbers((3 * size, 2), dtype, 1), op, group)
            return out

        compare(pair, of_lists, exactly=False)
        compare(pair, of_tensors, exactly=False)
    parts = [torch.full((r + 1,), float(r)) for r in range(size)]
    own = torch.zeros(dist.get_rank() + 1)
    dist.reduce_scatter(own, parts)
    assert torch.equal(own, torch.full_like(own, float(size * dist.get_rank())))


@several_ranks
def test_coalesced(pair: Pair) -> None:
    size = dist.get_world_size()

    def all_reduce(group: Any) -> list[torch.Tensor]:
        tensors = [numbers((3,), torch.float32, 1), numbers((2, 2), torch.float32, 2)]
        with dist.distributed_c10d._coalescing_manager(group, async_ops=True) as works:
            for tensor in tensors:
                dist.all_reduce(tensor, group=group)
        works.wait()
        return tensors

    compare(pair, all_reduce, exactly=False)
    inputs = [numbers((3,), torch.float32, 1), numbers((2, 2), torch.float64, 2)]
    outputs = [torch.zeros(3 * size), torch.zeros(2 * size, 2, dtype=torch.float64)]
    with dist.distributed_c10d._coalescing_manager():
        for output, input in zip(outputs, inputs, strict=True):
            dist.all_gather_single(output, input)
    parts = [torch.zeros(3), torch.zeros(2, 2, dtype=torch.float64)]
    with dist.distributed_c10d._coalescing_manager():
        for part, output in zip(parts, outputs, strict=True):
            dist.reduce_scatter_single(part, output)
    for part, input in zip(parts, inputs, strict=True):
        torch.testing.assert_close(part, input * size)


@several_ranks
def test_memory_of_any_layout(pair: Pair) -> None:
    size = dist.get_world_size()
    strided = torch.arange(12.0).reshape(3, 4).t()
    dist.all_reduce(strided)
    assert torch.equal(strided, size * torch.arange(12.0).reshape(3, 4).t())
    with torch.no_grad():
        weight = torch.nn.Parameter(torch.ones(3))
        dist.all_reduce(weight)
    assert weight.tolist() == [size] * 3
    whole = torch.zeros(size, 4)
    own = whole[dist.get_rank()]
    own += dist.get_rank()
    dist.all_gather_single(whole, own)  # FSDP gathers in place
    assert torch.equal(whole, torch.arange(float(size))[:, None].expand(size, 4))


@several_ranks
def test_objects(pair: Pair) -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, {"rank": rank, "text": "x" * rank})
    assert gathered == [{"rank": r, "text": "x" * r} for r in range(size)]
    listed: list[Any] = ["a", {1: 2}] if rank == 1 else [None, None]
    dist.broadcast_object_list(listed, src=1)
    assert listed == ["a", {1: 2}]
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, [f"for {r}" for r in range(size)] if rank == 0 else None, src=0)
    assert mine == [f"for {rank}"]
    at_root: list[Any] | None = [None] * size if rank == 0 else None
    dist.gather_object(rank, at_root, dst=0)
    assert at_root in (None, list(range(size)))
    if rank == 0:
        dist.send_object_list([1, "two"], dst=1)
    if rank == 1:
        received: list[Any] = [None, None]
        assert dist.recv_object_list(received, src=0) == 0 and received == [1, "two"]


@several_ranks
def test_sparse_all_reduce(pair: Pair) -> None:
    def call(group: Any) -> list[torch.Tensor]:
        rank = dist.get_rank()
        places = torch.tensor([[rank, rank + 1]])
        tensor = torch.sparse_coo_tensor(places, torch.ones(2) * 2, (6,), check_invariants=True)
        work = dist.all_reduce(tensor, group=group, async_op=True)
        work.wait()
        return [work.result()[0].to_dense(), tensor.to_dense()]  # and in place

    compare(pair, call)


@several_ranks
def test_sparse_tensors_can_only_be_summed(pair: Pair) -> None:
    """For booleans that is a logical or."""
    rank, size = dist.get_rank(), dist.get_world_size()
    places = torch.tensor([[rank]])
    tensor = torch.sparse_coo_tensor(places, torch.ones(1), (size,), check_invariants=True)
    with pytest.raises(ValueError, match="only be summed"):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    tensor = tensor.bool()
    dist.all_reduce(tensor)
    assert tensor.to_dense().all()
