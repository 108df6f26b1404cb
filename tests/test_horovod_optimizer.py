"""``hvd.DistributedOptimizer``: n ranks train what one process trains on all their samples."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import mpizero_torch as mz
import mpizero_torch.horovod as hvd
from support.reference import seeded

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])

Make = Callable[[Any], torch.optim.Optimizer]
SGD: Make = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01)  # noqa: E731


@pytest.fixture(autouse=True)
def _initialized() -> Iterator[None]:
    hvd.init()
    yield
    hvd.shutdown()


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 5), nn.Tanh(), nn.Linear(5, 2)
    )


def loss_of(model: nn.Module, sample: int) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    return model(seeded(sample, 3, 4).to(dtype)).square().mean()


def trained_alone(
    model: nn.Module, make: Make, steps: int, passes: int = 1, total: str = "mean"
) -> nn.Module:
    """What one process makes of the samples of all ranks."""
    optimizer = make(model.parameters())
    size = hvd.size()
    for step in range(steps):
        optimizer.zero_grad()
        for each in range(size * passes):
            loss = loss_of(model, step * size * passes + each)
            (loss / size if total == "mean" else loss).backward()
        optimizer.step()
    return model


def train(model: nn.Module, optimizer: Any, steps: int, passes: int = 1) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        for each in range(passes):
            loss_of(model, (step * passes + each) * hvd.size() + hvd.rank()).backward()
        optimizer.step()


def assert_same_parameters(ours: nn.Module, theirs: nn.Module, rtol: float = 1e-9) -> None:
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol, msg=name)
        assert len(set(hvd.allgather_object(str(mine.tolist())))) == 1


MAKES: dict[str, Make] = {
    "SGD": SGD,
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


@ranks
@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("passes", [1, 3])
def test_it_trains_what_one_process_trains(name: str, passes: int) -> None:
    model = net().double()
    optimizer = hvd.DistributedOptimizer(
        MAKES[name](model.parameters()),
        named_parameters=model.named_parameters(),
        backward_passes_per_step=passes,
    )
    assert isinstance(optimizer, getattr(torch.optim, name))
    train(model, optimizer, 5, passes)
    assert_same_parameters(model, trained_alone(net().double(), MAKES[name], 5, passes))


@ranks
@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"op": hvd.Sum}, "sum"),
        ({"gradient_predivide_factor": 2.0}, "mean"),
        ({"groups": 2, "num_groups": 2, "sparse_as_dense": True}, "mean"),
    ],
)
def test_options(options: dict[str, Any], total: str) -> None:
    model = net().double()
    optimizer = hvd.DistributedOptimizer(SGD(model.parameters()), **options)
    train(model, optimizer, 4)
    assert_same_parameters(model, trained_alone(net().double(), SGD, 4, total=total))


@ranks
@pytest.mark.parametrize("compression", ["fp16", "bf16"])
def test_gradients_may_travel_in_16_bits(compression: str) -> None:
    model = net()
    kind = getattr(hvd.Compression, compression)
    optimizer = hvd.DistributedOptimizer(SGD(model.parameters()), compression=kind)
    train(model, optimizer, 3)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    # Twice rounded to 8 or 11 bits, a few steps of rate 0.1.
    tolerance = 1e-3 if compression == "fp16" else 1e-2
    assert_same_parameters(model, trained_alone(net(), SGD, 3), rtol=tolerance)
    if hvd.size() > 1:
        loss_of(model, hvd.rank()).backward()
        optimizer.synchronize()
        wire = kind.wire_dtype
        assert all(torch.equal(p.grad, p.grad.to(wire).float()) for p in model.parameters())


class Tenfold(hvd.Compression.none):  # type: ignore[name-defined, misc]
    """A compression of the user's own."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return tensor * 10, 10

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        return tensor / ctx


@ranks
def test_a_compression_of_ones_own() -> None:
    model = net().double()
    optimizer = hvd.DistributedOptimizer(SGD(model.parameters()), compression=Tenfold)
    train(model, optimizer, 3)
    assert_same_parameters(model, trained_alone(net().double(), SGD, 3))


@ranks
def test_clipping_between_synchronize_and_step() -> None:
    def clipped(model: nn.Module) -> float:
        return float(nn.utils.clip_grad_norm_(model.parameters(), 0.01))

    model, alone = net().double(), net().double()
    optimizer = hvd.DistributedOptimizer(SGD(model.parameters()), model.named_parameters())
    plain = SGD(alone.parameters())
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step * hvd.size() + hvd.rank()).backward()
        optimizer.synchronize()
        norm = clipped(model)
        if step % 2:
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            with pytest.warns(UserWarning, match="without optimizer.skip_synchronize"):
                optimizer.step()  # has been reduced: is not again
        plain.zero_grad()
        for each in range(hvd.size()):
            (loss_of(alone, step * hvd.size() + each) / hvd.size()).backward()
        assert norm == pytest.approx(clipped(alone), rel=1e-9)
        plain.step()
    assert_same_parameters(model, alone)


@ranks
def test_a_closure_is_reduced_too() -> None:
    model, alone = net().double(), net().double()
    optimizer = hvd.DistributedOptimizer(torch.optim.LBFGS(model.parameters(), max_iter=3))
    plain = torch.optim.LBFGS(alone.parameters(), max_iter=3)

    def ours() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, hvd.rank())
        loss.backward()
        return hvd.allreduce(loss.detach())

    def theirs() -> torch.Tensor:
        plain.zero_grad()
        loss = sum(loss_of(alone, each) for each in range(hvd.size())) / hvd.size()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(ours)
        plain.step(theirs)
    assert_same_parameters(model, alone, rtol=1e-7)


class Branches(nn.Module):
    """Uses its parts in the order, and as far, as it is told."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))

    def forward(self, x: torch.Tensor, order: list[int]) -> torch.Tensor:
        for part in order:
            x = torch.tanh(self.parts[part](x))
        return x.square().mean()


@several_ranks
def test_gradients_come_in_another_order_on_each_rank() -> None:
    """Buckets are reduced in one order, whichever fill first; of unused parts too."""
    size, rank = hvd.size(), hvd.rank()
    model, alone = Branches(5).double(), Branches(5).double()
    optimizer = hvd.DistributedOptimizer(SGD(model.parameters()))
    plain = SGD(alone.parameters())

    def order(step: int, of: int) -> list[int]:  # part 4 is used by nobody, and others not by all
        return [(3 * of + step + i) % 4 for i in range(4 if of else 3)]

    for step in range(6):
        optimizer.zero_grad()
        model(seeded(step * size + rank, 3, 4), order(step, rank)).backward()
        optimizer.step()
        plain.zero_grad()
        for each in range(size):
            x = seeded(step * size + each, 3, 4)
            (alone(x, order(step, each)) / size).backward()
        plain.step()
    assert model.parts[4].weight.grad is None
    assert_same_parameters(model, alone)


@several_ranks
def test_two_optimizers_whose_gradients_mix() -> None:
    size, rank = hvd.size(), hvd.rank()
    model, alone = Branches(4).double(), Branches(4).double()

    def parts(of: Branches, first: int) -> list[nn.Parameter]:
        return [p for at in (first, first + 1) for p in of.parts[at].parameters()]

    both = [hvd.DistributedOptimizer(SGD(parts(model, first))) for first in (0, 2)]
    plain = SGD(alone.parameters())
    orders = [[0, 2, 1, 3], [3, 0, 1, 2], [2, 1, 3, 0], [1, 3, 2, 0]]
    for step in range(5):
        for each in both:
            each.zero_grad()
        model(seeded(step * size + rank, 3, 4), orders[rank]).backward()
        for each in both:
            each.step()
        plain.zero_grad()
        for each in range(size):
            (alone(seeded(step * size + each, 3, 4), orders[each]) / size).backward()
        plain.step()
    assert_same_parameters(model, alone)


@ranks
def test_parameters_that_are_frozen_unfrozen_and_added() -> None:
    model, alone = net().double(), net().double()

    def change(of: nn.Module, optimizer: Any, step: int) -> None:
        if step == 0:
            of[0].requires_grad_(False)
        if step == 2:
            of[0].requires_grad_(True)
            of[2].requires_grad_(False)
        if step == 4:
            of[2].requires_grad_(True)
            of.extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
            optimizer.add_param_group({"params": [of.extra], "lr": 0.05})

    def loss(of: nn.Module, sample: int) -> torch.Tensor:
        y = of(seeded(sample, 3, 4))
        return (y * getattr(of, "extra", 1.0)).square().mean()

    optimizer = hvd.DistributedOptimizer(SGD(model.parameters()), model.named_parameters())
    plain = SGD(alone.parameters())
    for step in range(7):
        change(model, optimizer, step)
        change(alone, plain, step)
        optimizer.zero_grad()
        loss(model, step * hvd.size() + hvd.rank()).backward()
        optimizer.step()
        plain.zero_grad()
        for each in range(hvd.size()):
            (loss(alone, step * hvd.size() + each) / hvd.size()).backward()
        plain.step()
    assert_same_parameters(model, alone)


@ranks
@pytest.mark.parametrize("as_dense", [False, True])
@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum], ids=str)
def test_sparse_gradients(as_dense: bool, op: Any) -> None:
    size, rank = hvd.size(), hvd.rank()

    def build() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Embedding(20, 3, sparse=True), nn.Linear(3, 2)).double()

    def words(sample: int) -> torch.Tensor:
        numbers = torch.Generator().manual_seed(sample)
        return torch.randint(0, 20, (2 + sample % 4,), generator=numbers)

    def loss(of: nn.Module, sample: int) -> torch.Tensor:
        return of(words(sample)).square().mean()

    model, alone = build(), build()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), sparse_as_dense=as_dense, op=op
    )
    plain = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        loss(model, step * size + rank).backward()
        optimizer.synchronize()
        assert model[0].weight.grad.is_sparse
        with optimizer.skip_synchronize():
            optimizer.step()
        plain.zero_grad()
        for each in range(size):
            part = loss(alone, step * size + each)
            (part / size if op is hvd.Average else part).backward()
        plain.step()
    assert_same_parameters(model, alone)


@ranks
@pytest.mark.parametrize("as_dense", [False, True])
def test_an_optimizer_of_sparse_gradients(as_dense: bool) -> None:
    """SparseAdam takes no others; a rank without a gradient of its own gets a sparse one, too."""
    size, rank = hvd.size(), hvd.rank()
    torch.manual_seed(0)
    table, alone = (nn.Embedding(9, 2, sparse=True) for _ in range(2))
    alone.load_state_dict(table.state_dict())
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SparseAdam(list(table.parameters())), sparse_as_dense=as_dense
    )
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)  # which has none yet
    plain = torch.optim.SparseAdam(list(alone.parameters()))
    for step in range(3):
        optimizer.zero_grad()
        plain.zero_grad()
        for each in range(size):
            words = torch.tensor([step, step + each, 8])
            if size == 1 or each != step % size:  # one rank has nothing to say
                (alone(words).square().sum() / size).backward()
                if each == rank:
                    table(words).square().sum().backward()
        optimizer.step()
        plain.step()
    assert_same_parameters(table, alone)
    handle = hvd.sparse_allreduce_async(torch.eye(3).to_sparse() * (rank + 1), op=hvd.Sum)
    assert handle().to_dense().diagonal().tolist() == [sum(range(1, size + 1))] * 3


@ranks
def test_adasum() -> None:
    """Each rank's own step, and then the Adasum of the steps."""
    size = hvd.size()
    model = net().double()
    optimizer = hvd.DistributedOptimizer(SGD(model.parameters()), op=hvd.Adasum)
    copies = [net().double() for _ in range(size)]
    plain = [SGD(each.parameters()) for each in copies]
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step * size + hvd.rank()).backward()
        optimizer.step()
        starts = [p.detach().clone() for p in copies[0].parameters()]
        for rank, (copy_, its) in enumerate(zip(copies, plain, strict=True)):
            its.zero_grad()
            loss_of(copy_, step * size + rank).backward()
            its.step()
        for at, start in enumerate(starts):
            everyones = [list(each.parameters())[at].detach() for each in copies]
            mine = everyones[hvd.rank()] - start
            combined = start + hvd.allreduce(mine, op=hvd.Adasum)
            for each in everyones:
                each.copy_(combined)
    assert_same_parameters(model, copies[0])
    with pytest.raises(ValueError, match="Adasum"), optimizer.skip_synchronize():
        pass
    optimizer.synchronize()


@ranks
def test_ranks_that_run_out_of_data_join() -> None:
    rank, size = hvd.rank(), hvd.size()
    model, alone = net().double(), net().double()
    optimizer = hvd.DistributedOptimizer(SGD(model.parameters()), model.named_parameters())
    plain = SGD(alone.parameters())
    for step in range(2 + rank):
        optimizer.zero_grad()
        loss_of(model, step * size + rank).backward()
        optimizer.step()
        hvd.allreduce(torch.tensor(1.0), name="metric")
    assert hvd.join() == size - 1
    hvd.broadcast_parameters(model.state_dict(), root_rank=size - 1)
    for step in range(2 + size - 1):
        plain.zero_grad()
        for each in range(size):
            if step < 2 + each:
                (loss_of(alone, step * size + each) / size).backward()
        plain.step()
    assert_same_parameters(model, alone)
    train(model, optimizer, 1)  # and all train on


@several_ranks
def test_who_joins_must_have_waited_for_its_gradients() -> None:
    model = net()
    optimizer = hvd.DistributedOptimizer(SGD(model.parameters()))
    loss_of(model, 0).backward()
    with pytest.raises(mz.MpizeroError, match="has not waited for"):
        optimizer._gradients.stand_in()  # what join() does for the others' optimizer
    optimizer.step()


@several_ranks
def test_a_process_set_trains_by_itself() -> None:
    pair = hvd.add_process_set([0, 1])
    model = net().double()
    optimizer = hvd.DistributedOptimizer(SGD(model.parameters()), process_set=pair)
    hvd.broadcast_parameters(model.state_dict(), 0)
    if pair.included():
        alone = net().double()
        plain = SGD(alone.parameters())
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, 2 * step + hvd.rank()).backward()
            optimizer.step()
            plain.zero_grad()
            for each in range(2):
                (loss_of(alone, 2 * step + each) / 2).backward()
            plain.step()
        for mine, other in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(mine, other)
    else:  # a plain optimizer
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        optimizer.step()


@several_ranks
def test_gradients_that_come_too_often_or_are_cleared_too_early() -> None:
    model = net()
    optimizer = hvd.DistributedOptimizer(SGD(model.parameters()), model.named_parameters())
    loss_of(model, 0).backward()
    with pytest.raises(mz.MpizeroError, match=r"zero_grad\(\) was called"):
        optimizer.zero_grad()
    with pytest.raises(mz.MpizeroError, match=r"'4.bias' has come 2 times.*per_step=1"):
        loss_of(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.set_backward_passes_per_step(2)
    for _ in range(2):
        loss_of(model, 0).backward()
    optimizer.step()


@ranks
def test_what_is_refused() -> None:
    model = net()
    named = list(model.named_parameters())

    def make(**options: Any) -> None:
        hvd.DistributedOptimizer(SGD(model.parameters()), **options)

    for options, match in [
        ({"named_parameters": named[:-1]}, "without a name for parameter 5 of group 0"),
        ({"named_parameters": [*named, named[0]]}, r"several \['0.weight'\]"),
        ({"named_parameters": [p for _, p in named]}, "pairs of name and parameter"),
        ({"op": hvd.Max}, "Average, Sum or Adasum"),
        ({"op": hvd.Sum, "gradient_predivide_factor": 2.0}, "Average only"),
        ({"backward_passes_per_step": 0}, ">= 1"),
        ({"groups": -1}, ">= 0"),
        ({"groups": [[named[0][1]], [named[0][1]]]}, "several groups"),
    ]:
        with pytest.raises(ValueError, match=match):
            make(**options)


@ranks
def test_state_and_schedulers_are_those_of_the_plain_optimizer() -> None:
    model = net()
    plain = SGD(model.parameters())
    loss_of(model, 0).backward()
    plain.step()
    before = torch.optim.lr_scheduler.StepLR(plain, 1, gamma=0.5)
    optimizer = hvd.DistributedOptimizer(plain, model.named_parameters())
    after = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    assert optimizer.state is plain.state
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, hvd.rank()).backward()
        optimizer.step()
        before.step()
        after.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**4)
    state = copy.deepcopy(optimizer.state_dict())
    again = hvd.DistributedOptimizer(SGD(net().parameters()))
    again.load_state_dict(state)
    assert again.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**4)
    assert len(set(hvd.allgather_object(str(state)))) == 1
    assert type(optimizer).__name__ == "SGD"
    steps: list[Any] = []
    again.register_step_post_hook(lambda *_: steps.append(1))
    again.step()
    assert steps == [1]


@several_ranks
def test_an_optimizer_that_is_gone_leaves_nothing_behind() -> None:
    """Not its gradients, and not its number, which the next one has."""
    gc.collect()
    names = set()
    for _ in range(3):
        model = net()
        optimizer = hvd.DistributedOptimizer(SGD(model.parameters()))
        train(model, optimizer, 2)
        names.add(optimizer._gradients.name)
        assert len(names) == 1
        del optimizer, model
        gc.collect()
