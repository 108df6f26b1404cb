"""Horovod's operations on tensors: against what numpy makes of all ranks' tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import mpizero_torch as mz
import mpizero_torch.horovod as hvd
from support.placements import HERE, Placement, placed

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])

FOLDS: dict[Any, Callable[[np.ndarray], np.ndarray]] = {
    hvd.Average: lambda x: x.mean(0),
    hvd.Sum: lambda x: x.sum(0),
    hvd.Min: lambda x: x.min(0),
    hvd.Max: lambda x: x.max(0),
    hvd.Product: lambda x: x.prod(0),
}


@pytest.fixture(autouse=True)
def _initialized() -> Iterator[None]:
    hvd.init()
    yield
    hvd.shutdown()


def of_rank(rank: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """What a rank brings: any rank can tell it of any other."""
    numbers = torch.Generator().manual_seed(100 + rank)
    return (torch.randn(shape, generator=numbers, dtype=torch.float64) * 4).to(dtype)


def of_all(*shape: int, dtype: torch.dtype = torch.float64) -> np.ndarray:
    return np.stack([of_rank(r, *shape, dtype=dtype).double().numpy() for r in range(hvd.size())])


@ranks
def test_where_a_rank_is() -> None:
    world = mz.init()
    assert hvd.is_initialized()
    assert (hvd.rank(), hvd.size()) == (world.rank, world.size)
    assert (hvd.local_rank(), hvd.local_size()) == (world.local_rank, world.local_size)
    assert (hvd.cross_rank(), hvd.cross_size()) == (world.node_index, world.node_count)
    assert hvd.is_homogeneous()
    assert hvd.mpi_built() and hvd.mpi_enabled() and not hvd.nccl_built()
    assert hvd.mpi_threads_supported() == (world.thread_level == "multiple")
    assert not any((hvd.gloo_built(), hvd.gloo_enabled(), hvd.ddl_built(), hvd.ccl_built()))
    assert not hvd.rocm_built() and isinstance(hvd.cuda_built(), bool)
    hvd.shutdown()
    assert not hvd.is_initialized()
    with pytest.raises(mz.LaunchError, match=r"hvd\.init"):
        hvd.rank()


@several_ranks
@pytest.mark.parametrize("placement", HERE, ids=str)
def test_where_a_rank_is_among_those_of_other_nodes(placement: Placement) -> None:
    """As Horovod counts: the ranks with the same local rank are numbered in their order."""
    names = placement.node_of
    locals_ = [names[:rank].count(name) for rank, name in enumerate(names)]
    hvd.shutdown()
    with placed(placement) as world:
        own = world.comm.Dup()
        hvd.init(own)
        rank = hvd.rank()
        alike = [other for other in range(hvd.size()) if locals_[other] == locals_[rank]]
        assert (rank, hvd.local_rank()) == (world.rank, locals_[rank])
        assert hvd.local_size() == names.count(names[rank])
        assert (hvd.cross_rank(), hvd.cross_size()) == (alike.index(rank), len(alike))
        assert hvd.is_homogeneous() == (len({names.count(name) for name in names}) == 1)
        assert hvd.allreduce(torch.tensor(1.0), op=hvd.Sum) == hvd.size()
        hvd.shutdown()
        mz.init(own).close()
        own.Free()


@ranks
@pytest.mark.parametrize("op", FOLDS, ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0, 2)])
def test_allreduce(op: Any, shape: tuple[int, ...]) -> None:
    x = of_rank(hvd.rank(), *shape)
    expected = torch.from_numpy(np.asarray(FOLDS[op](of_all(*shape))))
    before = x.clone()
    torch.testing.assert_close(hvd.allreduce(x, op=op), expected)
    torch.testing.assert_close(hvd.synchronize(hvd.allreduce_async(x, op=op)), expected)
    assert torch.equal(x, before)
    assert hvd.allreduce_(x, op=op) is x
    torch.testing.assert_close(x, expected)
    x.copy_(before)
    handle = hvd.allreduce_async_(x, op=op)
    assert hvd.synchronize(handle) is x
    assert hvd.poll(handle)
    torch.testing.assert_close(x, expected)


@ranks
def test_allreduce_of_other_dtypes() -> None:
    size = hvd.size()
    integers = of_rank(hvd.rank(), 6, dtype=torch.int32)
    every = np.stack([of_rank(r, 6, dtype=torch.int32).numpy() for r in range(size)])
    assert hvd.allreduce(integers, op=hvd.Sum).tolist() == every.sum(0).tolist()
    # As Horovod's: the sum times 1 / size in double precision, cut towards zero.
    average = (every.sum(0) * (1 / size)).astype(np.int32)
    assert hvd.allreduce(integers).tolist() == average.tolist()
    negative = hvd.allreduce(torch.full((5,), -1 if hvd.rank() == 0 else 0))
    assert negative.tolist() == [-1 if size == 1 else 0] * 5
    third = hvd.allreduce(integers, postscale_factor=0.3)
    assert third.tolist() == (every.sum(0) * (0.3 / size)).astype(np.int32).tolist()
    both = hvd.allreduce(integers, op=hvd.Sum, prescale_factor=0.7, postscale_factor=1 / 3)
    cut = (every * 0.7).astype(np.int32).sum(0)
    assert both.tolist() == (cut * (1 / 3)).astype(np.int32).tolist()
    rows = hvd.reducescatter(integers[:, None] - 3, postscale_factor=0.3)
    own = np.array_split(every.sum(0) - 3 * size, size)[hvd.rank()]
    assert rows[:, 0].tolist() == (own * (0.3 / size)).astype(np.int32).tolist()
    for dtype in (torch.float16, torch.bfloat16):  # in float32, rounded once
        mine = of_rank(hvd.rank(), 50).to(dtype)
        scaled = hvd.allreduce(mine, op=hvd.Max, prescale_factor=1 / 3)
        each = [(of_rank(r, 50).to(dtype).float() * (1 / 3)).to(dtype) for r in range(size)]
        assert torch.equal(scaled, torch.stack(each).amax(0))
    half = of_rank(hvd.rank(), 50, dtype=torch.bfloat16)
    expected = torch.from_numpy(of_all(50, dtype=torch.bfloat16).astype(np.float32)).sum(0)
    assert torch.equal(hvd.allreduce(half, op=hvd.Sum), expected.bfloat16())
    strided = of_rank(hvd.rank(), 4, 3).t()
    hvd.allreduce_(strided, op=hvd.Sum)
    torch.testing.assert_close(strided, torch.from_numpy(of_all(4, 3).sum(0).T))


@ranks
def test_average_as_an_argument_and_factors() -> None:
    x, every = of_rank(hvd.rank(), 7), of_all(7)
    torch.testing.assert_close(hvd.allreduce(x, average=False), torch.from_numpy(every.sum(0)))
    torch.testing.assert_close(hvd.allreduce(x, True), torch.from_numpy(every.mean(0)))
    scaled = hvd.allreduce(x, op=hvd.Sum, prescale_factor=0.5, postscale_factor=3)
    torch.testing.assert_close(scaled, torch.from_numpy(every.sum(0) * 1.5))
    largest = hvd.allreduce(x, op=hvd.Max, prescale_factor=-1.0, postscale_factor=-1.0)
    torch.testing.assert_close(largest, torch.from_numpy(every.min(0)))
    whole = hvd.allreduce(torch.tensor([3, 5]), op=hvd.Sum, prescale_factor=2, postscale_factor=0.5)
    assert whole.tolist() == [3 * hvd.size(), 5 * hvd.size()]
    with pytest.raises(ValueError, match="average"):
        hvd.allreduce(x, average=True, op=hvd.Sum)
    with pytest.raises(ValueError, match=r"hvd\.Average"):
        hvd.allreduce(x, op="sum")  # type: ignore[arg-type]


@ranks
@pytest.mark.parametrize("compression", ["none", "fp16", "bf16"])
def test_compression(compression: str) -> None:
    kind = getattr(hvd.Compression, compression)
    x = of_rank(hvd.rank(), 40, dtype=torch.float32)
    small, context = kind.compress(x)
    assert kind.decompress(small, context).dtype == torch.float32
    rounded = np.stack([
        kind.compress(of_rank(r, 40, dtype=torch.float32))[0].float().numpy()
        for r in range(hvd.size())
    ])  # fmt: skip
    expected = torch.from_numpy(rounded.mean(0)).to(small.dtype).float()
    torch.testing.assert_close(hvd.allreduce(x, compression=kind), expected, rtol=1e-6, atol=1e-6)
    whole = torch.arange(3)
    assert kind.compress(whole)[0].dtype == torch.int64


@ranks
def test_groups() -> None:
    shapes = [(3,), (), (2, 5), (1000,), (0,)]
    mine = [of_rank(hvd.rank(), *shape) for shape in shapes]
    mine.append(torch.tensor([hvd.rank()]))
    sums = [torch.from_numpy(np.asarray(of_all(*shape).sum(0))) for shape in shapes]
    sums.append(torch.tensor([sum(range(hvd.size()))]))
    for got, expected in zip(hvd.grouped_allreduce(mine, op=hvd.Sum), sums, strict=True):
        torch.testing.assert_close(got, expected)
    handle = hvd.grouped_allreduce_async(mine, op=hvd.Sum, name="group")
    for got, expected in zip(hvd.synchronize(handle), sums, strict=True):
        torch.testing.assert_close(got, expected)
    copies = [each.clone() for each in mine]
    handle = hvd.grouped_allreduce_async_(copies, op=hvd.Sum)
    assert all(a is b for a, b in zip(hvd.synchronize(handle), copies, strict=True))
    for got, expected in zip(copies, sums, strict=True):
        torch.testing.assert_close(got, expected)
    hvd.grouped_allreduce_(mine, op=hvd.Sum)
    for got, expected in zip(mine, sums, strict=True):
        torch.testing.assert_close(got, expected)


@ranks
def test_allgather_of_uneven_rows() -> None:
    rank, size = hvd.rank(), hvd.size()
    every = [of_rank(r, (r * 2) % 3, 2) for r in range(size)]
    assert torch.equal(hvd.allgather(every[rank]), torch.cat(every))
    assert torch.equal(hvd.synchronize(hvd.allgather_async(every[rank])), torch.cat(every))
    assert hvd.allgather(torch.tensor(rank)).tolist() == list(range(size))
    flags = [torch.tensor([r % 2 == 0] * (r + 1)) for r in range(size)]
    got, got_flags = hvd.grouped_allgather([every[rank], flags[rank]])
    assert torch.equal(got, torch.cat(every)) and torch.equal(got_flags, torch.cat(flags))
    handle = hvd.grouped_allgather_async([every[rank].half()])
    assert torch.equal(hvd.synchronize(handle)[0], torch.cat(every).half())


@ranks
def test_broadcast() -> None:
    root = hvd.size() - 1
    x, expected = of_rank(hvd.rank(), 3, 4), of_rank(root, 3, 4)
    assert torch.equal(hvd.broadcast(x, root), expected)
    assert torch.equal(hvd.synchronize(hvd.broadcast_async(x, root_rank=root)), expected)
    assert torch.equal(x, of_rank(hvd.rank(), 3, 4))
    assert hvd.broadcast_(x, root) is x
    assert torch.equal(x, expected)
    y = of_rank(hvd.rank(), 3, 4)
    hvd.synchronize(hvd.broadcast_async_(y, root, name="y"))
    assert torch.equal(y, expected)
    assert hvd.broadcast(torch.tensor(hvd.rank() + 4), root_rank=0).item() == 4
    with pytest.raises(ValueError, match="root_rank"):
        hvd.broadcast(x, hvd.size())


@ranks
def test_alltoall() -> None:
    rank, size = hvd.rank(), hvd.size()
    parts = [[of_rank(10 * s + r, 2, 3) for r in range(size)] for s in range(size)]
    got = hvd.alltoall(torch.cat(parts[rank]))
    assert torch.equal(got, torch.cat([parts[s][rank] for s in range(size)]))
    uneven = [[of_rank(10 * s + r, (s + 2 * r) % 3, 2) for r in range(size)] for s in range(size)]
    splits = torch.tensor([len(each) for each in uneven[rank]], dtype=torch.int32)
    for result in (
        hvd.alltoall(torch.cat(uneven[rank]), splits),
        hvd.synchronize(hvd.alltoall_async(torch.cat(uneven[rank]), splits=splits, name="a")),
    ):
        got, received = result
        assert torch.equal(got, torch.cat([uneven[s][rank] for s in range(size)]))
        assert received.dtype == torch.int32
        assert received.tolist() == [len(uneven[s][rank]) for s in range(size)]
    with pytest.raises(ValueError, match="splits"):
        hvd.alltoall(torch.zeros(4), splits=[5] * size)


@ranks
@pytest.mark.parametrize("rows", [4, 7, 1, 12])
def test_reducescatter(rows: int) -> None:
    rank, size = hvd.rank(), hvd.size()
    shares = [rows // size + (r < rows % size) for r in range(size)]
    mine = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    x, every = of_rank(rank, rows, 3), of_all(rows, 3)
    for op, fold in FOLDS.items():
        got = hvd.reducescatter(x, op=op)
        torch.testing.assert_close(got, torch.from_numpy(fold(every)[mine]))
    handle = hvd.reducescatter_async(x, op=hvd.Sum, postscale_factor=2.0)
    torch.testing.assert_close(hvd.synchronize(handle), torch.from_numpy(2 * every.sum(0)[mine]))
    pair = hvd.grouped_reducescatter([x, x.float()])
    torch.testing.assert_close(pair[0], torch.from_numpy(every.mean(0)[mine]))
    assert pair[1].dtype == torch.float32
    handle = hvd.grouped_reducescatter_async([x], op=hvd.Max)
    torch.testing.assert_close(hvd.synchronize(handle)[0], torch.from_numpy(every.max(0)[mine]))
    whole = hvd.allreduce(x, op=hvd.Adasum)
    torch.testing.assert_close(hvd.reducescatter(x, op=hvd.Adasum), whole[mine])
    with pytest.raises(ValueError, match="dimensions"):
        hvd.reducescatter(torch.tensor(1.0))


@ranks
def test_objects_and_barrier() -> None:
    rank, size = hvd.rank(), hvd.size()
    assert hvd.broadcast_object({"of": rank}, root_rank=size - 1) == {"of": size - 1}
    assert hvd.allgather_object(("r", rank)) == [("r", r) for r in range(size)]
    hvd.barrier()


@ranks
def test_gradients_flow_back_through_operations() -> None:
    """With the loss w.y on each rank, w of this rank: what comes to x, of all ranks' w."""
    rank, size = hvd.rank(), hvd.size()

    def gradient(operation: Callable[[torch.Tensor], torch.Tensor], *shape: int) -> torch.Tensor:
        x = of_rank(rank, *shape).requires_grad_()
        y = operation(x)
        (y * of_rank(50 + rank, *y.shape)).sum().backward()
        assert x.grad is not None
        return x.grad

    def weights(*shape: int) -> torch.Tensor:
        return torch.stack([of_rank(50 + r, *shape) for r in range(size)])

    close = torch.testing.assert_close
    close(gradient(hvd.allreduce, 4), weights(4).mean(0))
    close(gradient(lambda x: hvd.allreduce(x, op=hvd.Sum), 4), weights(4).sum(0))
    scaled = gradient(lambda x: hvd.allreduce(x, op=hvd.Sum, prescale_factor=3.0), 4)
    close(scaled, 3 * weights(4).sum(0))
    close(gradient(lambda x: sum(hvd.grouped_allreduce([x, 2 * x])), 4), 3 * weights(4).mean(0))
    half = gradient(lambda x: hvd.allreduce(x, compression=hvd.Compression.bf16), 4)
    close(half, weights(4).mean(0), rtol=1e-2, atol=1e-1)

    rows = [r + 1 for r in range(size)]
    first = sum(rows[:rank])
    gathered = weights(sum(rows), 2).mean(0)[first : first + rows[rank]]
    close(gradient(hvd.allgather, rows[rank], 2), gathered)
    close(gradient(hvd.allgather), weights(size).mean(0)[rank])

    expected = weights(3).mean(0) if rank == 0 else torch.zeros(3, dtype=torch.float64)
    close(gradient(lambda x: hvd.broadcast(x, 0), 3), expected)

    sent = torch.cat([weights(2 * size, 3)[r, 2 * rank : 2 * rank + 2] for r in range(size)])
    close(gradient(hvd.alltoall, 2 * size, 3), sent)
    splits = [rank] * size  # rank r gets sum(range(size)) rows, those of rank s from sum(range(s))
    pieces = weights(sum(range(size)), 2)[:, sum(range(rank)) : sum(range(rank + 1))].flatten(0, 1)
    close(gradient(lambda x: hvd.alltoall(x, splits)[0], rank * size, 2), pieces)

    shares = [5 // size + (r < 5 % size) for r in range(size)]
    parts = torch.cat([of_rank(50 + r, shares[r], 2) for r in range(size)])
    close(gradient(lambda x: hvd.reducescatter(x, op=hvd.Sum), 5, 2), parts * size)
    close(gradient(hvd.reducescatter, 5, 2), parts)  # as Horovod scales them, both

    if size > 1:
        with pytest.raises(ValueError, match="Average or Sum"):
            gradient(lambda x: hvd.allreduce(x, op=hvd.Max), 3)


def adasum(gradients: list[np.ndarray]) -> np.ndarray:
    """The formula of arXiv 2006.02924, over pairs of pairs."""
    if len(gradients) == 1:
        return gradients[0]
    power = 1 << (len(gradients).bit_length() - 1)
    if power < len(gradients):  # what is beyond a power of two goes to the first ones
        extra = len(gradients) - power
        folded = [adasum([gradients[i], gradients[power + i]]) for i in range(extra)]
        return adasum(folded + gradients[extra:power])
    if len(gradients) > 2:
        middle = len(gradients) // 2
        gradients = [adasum(gradients[:middle]), adasum(gradients[middle:])]
    a, b = gradients
    dot, of_a, of_b = (a * b).sum(), (a * a).sum(), (b * b).sum()
    return (1 - dot / (2 * of_a) if of_a else 1) * a + (1 - dot / (2 * of_b) if of_b else 1) * b


@ranks
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_adasum(dtype: torch.dtype) -> None:
    size = hvd.size()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 1e-2)
    shapes = [(1,), (33, 3), (7,), (0,), (256,)]

    def tensors(rank: int) -> list[torch.Tensor]:
        # Alike on the ranks, but not the same; the last one is zero on some.
        common = [of_rank(77, *shape) for shape in shapes]
        own = [c + of_rank(rank, *s) / 2 for c, s in zip(common, shapes, strict=True)]
        return [each.to(dtype) for each in [*own[:-1], own[-1] * (rank % 2)]]

    every = [[each.double().numpy() for each in tensors(r)] for r in range(size)]
    expected = [torch.from_numpy(adasum(list(each))).to(dtype) for each in zip(*every, strict=True)]
    got = hvd.grouped_allreduce(tensors(hvd.rank()), op=hvd.Adasum)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    alone = hvd.allreduce(tensors(hvd.rank())[1], op=hvd.Adasum)
    torch.testing.assert_close(alone, got[1])
    assert len(set(hvd.allgather_object([each.tolist() for each in got].__repr__()))) == 1


@ranks
def test_adasum_is_a_mean_of_equals_and_a_sum_of_what_is_orthogonal() -> None:
    rank, size = hvd.rank(), hvd.size()
    same = torch.arange(5.0)
    torch.testing.assert_close(hvd.allreduce(same, op=hvd.Adasum), same)
    own = torch.zeros(size)
    own[rank] = rank + 1.0
    torch.testing.assert_close(hvd.allreduce(own, op=hvd.Adasum), torch.arange(1.0, size + 1))
    with pytest.raises(ValueError, match="floating-point"):
        hvd.allreduce(torch.arange(4), op=hvd.Adasum)


@ranks
def test_sparse_allreduce() -> None:
    rank, size = hvd.rank(), hvd.size()

    def sparse(r: int) -> torch.Tensor:
        dense = of_rank(r, 6, 2)
        dense[torch.arange(6) % (r + 2) != 0] = 0
        return dense.to_sparse(1)

    dense = torch.stack([sparse(r).to_dense() for r in range(size)])
    got = hvd.synchronize(hvd.sparse_allreduce_async(sparse(rank), name="s", op=hvd.Sum))
    assert got.is_sparse
    torch.testing.assert_close(got.to_dense(), dense.sum(0))
    got = hvd.synchronize(hvd.sparse_allreduce_async(sparse(rank)))
    torch.testing.assert_close(got.to_dense(), dense.mean(0))
    with pytest.raises(ValueError, match="dense torch tensors"):
        hvd.allreduce(sparse(rank))


@several_ranks
def test_process_sets() -> None:
    rank, size = hvd.rank(), hvd.size()
    assert hvd.global_process_set.ranks == list(range(size))
    assert str(hvd.global_process_set).startswith("ProcessSet(process_set_id=0, ranks=[0, 1")
    hvd.shutdown()
    even, last = hvd.ProcessSet(range(0, size, 2)), hvd.ProcessSet([size - 1])
    hvd.init(process_sets=[even, last])
    assert hvd.get_process_set_ids_and_ranks() == {
        0: list(range(size)), 1: list(range(0, size, 2)), 2: [size - 1]
    }  # fmt: skip
    assert last.included() == (rank == size - 1) == hvd.process_set_included(2)
    assert even.size() == (size + 1) // 2
    if even.included():
        assert even.rank() == rank // 2
        x = of_rank(rank, 3)
        expected = of_all(3)[::2]
        got = hvd.allreduce(x, process_set=even)
        torch.testing.assert_close(got, torch.from_numpy(expected.mean(0)))
        root = even.ranks[-1]  # counted among all
        assert hvd.broadcast_object(rank, root, process_set=even) == root
        assert hvd.allgather(torch.tensor([rank]), process_set=even).tolist() == even.ranks
        hvd.barrier(process_set=even)
    else:
        with pytest.raises(ValueError, match="this rank is none"):
            hvd.allreduce(of_rank(rank, 3), process_set=even)
    added = hvd.add_process_set([0, 1])
    assert added.process_set_id == 3
    if rank < 2:
        assert hvd.alltoall(torch.tensor([rank, rank]), process_set=added).tolist() == [0, 1]
        with pytest.raises(ValueError, match="root_rank"):
            hvd.broadcast(torch.zeros(1), 2, process_set=added)
    assert hvd.remove_process_set(added)
    assert not hvd.remove_process_set(added)
    assert not hvd.remove_process_set(hvd.global_process_set)
    with pytest.raises(mz.LaunchError, match="not registered"):
        added.size()
    with pytest.raises(ValueError, match="registered already"):
        hvd.add_process_set(even)
    with pytest.raises(ValueError, match=rf"ranks \[{size - 1}\], of which set 2 is already"):
        hvd.add_process_set([size - 1])
    with pytest.raises(ValueError, match=f"ranks from 0 to {size - 1}"):
        hvd.add_process_set([size])


@several_ranks
def test_process_sets_from_communicators() -> None:
    from mpi4py import MPI

    whole = MPI.COMM_WORLD
    part = whole.Split(whole.rank % 2, whole.rank)
    hvd.shutdown()
    mine = hvd.ProcessSet(part)
    hvd.init(whole, process_sets=[mine])
    members = [r for r in range(hvd.size()) if r % 2 == hvd.rank() % 2]
    assert mine.ranks == members and mine.included()
    assert hvd.allreduce(torch.tensor(hvd.rank()), op=hvd.Sum, process_set=mine) == sum(members)
    assert hvd.remove_process_set(mine)


@several_ranks
def test_a_list_of_ranks_in_place_of_all() -> None:
    rank, size = hvd.rank(), hvd.size()
    hvd.shutdown()
    if rank < size - 1:
        hvd.init(list(range(size - 1)))
        assert (hvd.rank(), hvd.size()) == (rank, size - 1)
        assert hvd.allreduce(torch.tensor(1), op=hvd.Sum).item() == size - 1
    else:
        with pytest.raises(ValueError, match="this one among them"):
            hvd.init(list(range(size - 1)))


@ranks
def test_a_model_and_an_optimizer_from_one_rank() -> None:
    torch.manual_seed(hvd.rank())
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1 * (1 + hvd.rank()))
    if hvd.rank() == 0:  # the others have no state yet
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    states = hvd.allgather_object([
        {n: t.tolist() for n, t in model.state_dict().items()},
        optimizer.state_dict()["param_groups"],
        {
            number: {name: torch.as_tensor(value).tolist() for name, value in of.items()}
            for number, of in optimizer.state_dict()["state"].items()
        },
    ])  # fmt: skip
    assert all(each == states[0] for each in states)
    assert len(states[0][2]) == 6
    root = hvd.size() - 1
    for way in (dict(model.named_parameters()), model.named_parameters(), list(model.parameters())):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(hvd.rank())
        hvd.broadcast_parameters(way, root_rank=root)
        assert all((parameter == root).all() for parameter in model.parameters())
    with pytest.raises(ValueError, match="tensors"):
        hvd.broadcast_parameters({"a": 3}, root_rank=0)


@ranks
def test_sync_batch_norm() -> None:
    rank, size = hvd.rank(), hvd.size()
    norm = hvd.SyncBatchNorm(3, eps=1e-4, momentum=0.2).double()
    alone = torch.nn.BatchNorm1d(3, eps=1e-4, momentum=0.2).double()
    every = [of_rank(r, 4, 3) for r in range(size)]
    torch.testing.assert_close(norm(every[rank]), alone(torch.cat(every))[4 * rank : 4 * rank + 4])
    torch.testing.assert_close(norm.running_var, alone.running_var)
