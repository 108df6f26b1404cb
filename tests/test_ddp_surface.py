"""All that torch's DistributedDataParallel takes and has: done as torch does it, or refused."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as Stock

import mpizero_torch as mz
from mpizero_torch import torch_surface
from mpizero_torch.process_group import ensure_process_group
from support.reference import seeded

two = pytest.mark.parallel([1, 2])
ranks = pytest.mark.parallel([1, 2, 3])
several_ranks = pytest.mark.parallel([2, 3])


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 3)


def batch(seed: int) -> torch.Tensor:
    return seeded(seed, 2, 3).float()


def same_everywhere(tensor: torch.Tensor) -> bool:
    world = mz.init()
    first = world.broadcast(tensor.detach().clone())
    return not world.allreduce(int(not torch.equal(first, tensor)), "max")


class Counting(nn.Module):
    """Counts its forwards in a buffer, each rank in steps of its own."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.layer, self.step = linear(), step
        self.register_buffer("count", torch.zeros(()))
        self.seen: list[float] = []

    def forward(self, x: torch.Tensor) -> Any:
        self.seen.append(float(self.count))
        self.count += self.step
        return self.layer(x)


# The table against torch's class.


@pytest.mark.once
def test_the_table_has_all_that_torch_has() -> None:
    taken = list(inspect.signature(Stock.__init__).parameters)[1:]
    assert [name for name in taken if name not in torch_surface.ARGUMENTS] == []
    own = inspect.signature(mz.DistributedDataParallel.__init__).parameters
    positional = [n for n, each in own.items() if each.kind is each.POSITIONAL_OR_KEYWORD][1:]
    assert positional == taken  # in torch's order
    known = {*torch_surface.MEMBERS, *torch_surface.REFUSED}
    of_class = {name for name in dir(Stock) if not name.startswith("_")} - set(dir(nn.Module))
    of_self = set(re.findall(r"self\.([a-z]\w*)(?:: [^=\n]+)? = ", inspect.getsource(Stock)))
    # These are there only where they were given.
    assert sorted((of_class | of_self) - known - {"device_mesh", "buffer_hook"}) == []


@pytest.mark.once
def test_the_documentation_has_the_table() -> None:
    page = Path(__file__).parents[1] / "docs" / "from-torch-ddp.md"
    assert torch_surface.table() in page.read_text()


@two
def test_each_member_is_there_or_refused_with_the_remedy() -> None:
    model = mz.DistributedDataParallel(linear())
    for name in torch_surface.MEMBERS:
        if name != "process_group":
            getattr(model, name)
    for name, remedy in torch_surface.REFUSED.items():
        assert not hasattr(model, name)
        with pytest.raises(AttributeError, match=re.escape(remedy.replace("`", ""))):
            getattr(model, name)
    with pytest.raises(AttributeError, match="private to torch"):
        model._sync_final_model  # noqa: B018
    with pytest.raises(AttributeError, match=r"neither DistributedDataParallel nor .* a Linear"):
        model.nothing  # noqa: B018
    assert model.dim == 0 and model.device == torch.device("cpu") and model.device_ids is None


# Arguments.


@two
def test_torchs_defaults_are_taken_also_by_position() -> None:
    stock = inspect.signature(Stock.__init__).parameters
    defaults = [each.default for each in stock.values()][2:]
    model = mz.DistributedDataParallel(linear(), *defaults)
    assert model.broadcast_buffers and not model.will_sync_module_buffers()  # it has none
    model(batch(model.world.rank)).sum().backward()
    assert same_everywhere(model.weight.grad)


@two
@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"dim": 1}, "mz.shard"),
        ({"delay_all_reduce_named_params": []}, "overlap="),
        ({"param_to_hook_all_reduce": nn.Parameter(torch.ones(1))}, "overlap="),
        ({"mixed_precision": object()}, "torch.autocast"),
        ({"bucket_cap_mb_list": [1, 2]}, "bucket_cap_mb"),
        ({"device_ids": [0, 1]}, "one rank for each GPU"),
        ({"process_group": object()}, "world="),
    ],
)
def test_what_is_not_done_is_refused(options: dict[str, Any], remedy: str) -> None:
    with pytest.raises(mz.ArgumentError, match=re.escape(remedy)) as error:
        mz.DistributedDataParallel(linear(), **options)
    assert error.value.argument == next(iter(options))


@several_ranks
def test_without_a_sync_at_the_start_each_rank_keeps_its_own() -> None:
    rank = mz.init().rank
    own = linear(seed=rank)
    before = own.weight.detach().clone()
    model = mz.DistributedDataParallel(own, init_sync=False)
    assert torch.equal(model.weight, before)
    model(batch(rank)).sum().backward()
    assert same_everywhere(model.weight.grad)


@several_ranks
@pytest.mark.parametrize(
    ("options", "starts_alike", "before_second_forward"),
    [
        ({}, True, [1.0] * 3),
        ({"broadcast_buffers": False}, False, [1.0, 12.0, 23.0]),
        ({"forward_sync_buffers": False}, True, [1.0, 2.0, 3.0]),
        ({"forward_sync_buffers": True, "broadcast_buffers": False}, True, [1.0] * 3),
    ],
)
def test_when_buffers_are_sent(
    options: dict[str, Any], starts_alike: bool, before_second_forward: list[float]
) -> None:
    rank = mz.init().rank
    net = Counting(rank + 1)
    net.count += 10 * rank
    model = mz.DistributedDataParallel(net, **options)
    assert net.count == (0 if starts_alike else 10 * rank)
    model(batch(0)).sum().backward()
    # Sent after the backward pass, or only before the next forward.
    after = rank + 1 if "forward_sync_buffers" in options else before_second_forward[rank]
    assert net.count == after
    model(batch(0))
    assert net.seen[1] == before_second_forward[rank]


@several_ranks
def test_buffers_before_a_forward_after_one_that_trains_only() -> None:
    model = mz.DistributedDataParallel(Counting(mz.init().rank + 1), forward_sync_buffers=True)
    rank, net = model.world.rank, model.module
    with torch.no_grad():
        for _ in range(3):
            model(batch(0))
    # The first asks, the next do not: as torch, which notes that the last one did not train.
    assert net.seen == [0, rank + 1, 2 * (rank + 1)]
    assert model.require_forward_param_sync is False
    model.require_forward_param_sync = True
    model(batch(0))
    assert net.seen[3] == 3
    with pytest.raises(mz.ArgumentError, match="forward_sync_buffers"), model.join():
        pass


@pytest.fixture
def process_group() -> Iterator[None]:
    ensure_process_group(mz.init())
    yield
    torch.distributed.destroy_process_group()


@ranks
def test_a_process_group_is_the_ranks_in_it(process_group: None) -> None:
    world = mz.init()
    group = torch.distributed.group.WORLD
    own = torch.distributed.new_group([world.rank], use_local_synchronization=True)
    together = mz.DistributedDataParallel(linear(), process_group=group)
    alone = mz.DistributedDataParallel(linear(), process_group=own)
    assert (together.world.size, alone.world.size) == (world.size, 1)
    assert together.process_group is group
    for model in (together, alone):
        model(batch(world.rank)).sum().backward()
    mean = sum(batch(r).sum(0) for r in range(world.size)) / world.size
    torch.testing.assert_close(together.weight.grad[0], mean)
    torch.testing.assert_close(alone.weight.grad[0], batch(world.rank).sum(0))
    with pytest.raises(mz.ArgumentError, match="given beside world"):
        mz.DistributedDataParallel(linear(), process_group=group, world=world)


# Attributes and methods.


@ranks
def test_require_backward_grad_sync_set_by_hand_is_no_sync() -> None:
    world = mz.init()
    model = mz.DistributedDataParallel(linear())
    assert model.require_backward_grad_sync is True
    model.require_backward_grad_sync = False
    model(batch(world.rank)).sum().backward()
    torch.testing.assert_close(model.weight.grad[0], batch(world.rank).sum(0))
    with model.no_sync():
        model.require_backward_grad_sync = True
        model(batch(world.rank)).sum().backward()
    mean = 2 * sum(batch(r).sum(0) for r in range(world.size)) / world.size
    torch.testing.assert_close(model.weight.grad[0], mean)
    assert model.require_backward_grad_sync is False  # as no_sync found it


@several_ranks
@pytest.mark.parametrize("over_all", [None, True])
def test_join_divides_by_those_that_train_or_by_all(over_all: bool | None) -> None:
    world = mz.init()
    model = mz.DistributedDataParallel(linear())
    found: list[torch.Tensor] = []
    with model.join(divide_by_initial_world_size=over_all):
        for step in range(2 - (world.rank == world.size - 1)):
            model.zero_grad()
            model(batch(10 * step + world.rank)).sum().backward()
            found.append(model.weight.grad[0].clone())
    active = world.size - 1
    total = sum(batch(10 + r).sum(0) for r in range(active))
    if world.rank < active:
        torch.testing.assert_close(found[1], total / (world.size if over_all else active))
    model.zero_grad()
    model(batch(world.rank)).sum().backward()  # and afterwards as ever
    torch.testing.assert_close(
        model.weight.grad[0], sum(batch(r).sum(0) for r in range(world.size)) / world.size
    )


@several_ranks
def test_join_may_be_off_and_may_end_with_the_first() -> None:
    world = mz.init()
    model = mz.DistributedDataParallel(linear())
    with model.join(enable=False, throw_on_early_termination=True):
        if world.rank == 0:  # no pass that others would have to answer, and no word at the end
            model(batch(0))
    with model.join(throw_on_early_termination=True):
        for _ in range(2):
            model(batch(0)).sum().backward()
    steps = 0
    with (
        pytest.raises(mz.MpizeroError, match=r"1 of . ranks have come to the end"),
        model.join(throw_on_early_termination=True),
    ):
        for _ in range(2 + 3 * (world.rank > 0)):
            model(batch(0)).sum().backward()
            steps += 1
    assert steps == 2
    model(batch(0)).sum().backward()
    with pytest.raises(mz.ArgumentError, match="by name"), model.join(True):  # type: ignore[arg-type]
        pass


@two
def test_parameters_to_ignore_are_left_to_each_rank() -> None:
    rank = mz.init().rank
    net = nn.Sequential(linear(), linear(seed=rank))
    ignored = ["1.weight", "1.bias"]
    mz.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ignored)
    own = net[1].weight.detach().clone()
    model = mz.DistributedDataParallel(net)
    assert model.parameters_to_ignore == set(ignored)
    model(batch(rank)).sum().backward()
    assert torch.equal(net[1].weight, own) and same_everywhere(net[0].weight.grad)
    assert model.world.size == 1 or not same_everywhere(net[1].weight.grad)


@ranks
def test_what_is_a_ranks_own_is_saved_for_each_rank(tmp_path: Path) -> None:
    world = mz.init()
    folder = Path(world.broadcast_object(str(tmp_path)))

    def make(seed: int) -> tuple[Any, Any]:
        # The first two are experts, one of them of another size on each rank; the last is shared.
        own = nn.Sequential(linear(seed), nn.Linear(3, 2 + world.rank), linear())
        own._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
            f"{at}.{kind}" for at in (0, 1) for kind in ("weight", "bias")
        ]
        return mz.DistributedDataParallel(own), torch.optim.AdamW(own.parameters())

    model, optimizer = make(world.rank)
    net = model.module
    (net[0](batch(world.rank)) + net[2](batch(5))).sum().backward()
    net[1](batch(world.rank)).sum().backward()
    optimizer.step()
    mz.assert_in_sync(model, optimizer)
    mz.save(folder / "one", model=model, optimizer=optimizer)
    again, its = make(100)
    mz.load(folder / "one", model=again, optimizer=its)
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for key, value in optimizer.state[mine].items():
            assert torch.equal(value, its.state[theirs][key])
    if world.size > 1:
        assert not same_everywhere(again.module[0].weight)
        alone = mz.DistributedDataParallel(net, world=world.split(world.rank))
        with pytest.raises(mz.ArgumentError, match=r"1 ranks.* each of which has saved its own"):
            mz.load(folder / "one", model=alone, world=alone.world)
        with torch.no_grad():
            net[2].weight.zero_()
        mz.load(folder / "one", model=alone, world=alone.world, strict=False)
        assert torch.equal(net[2].weight, again.module[2].weight)
        with pytest.raises(mz.ArgumentError, match="left to each rank"), model.join(optimizer):
            pass


@two
def test_modules_that_are_not_ready_are_refused_by_name() -> None:
    with pytest.raises(mz.ArgumentError, match=r"'1\.weight' is not initialised.*dummy batch"):
        mz.DistributedDataParallel(nn.Sequential(linear(), nn.LazyLinear(2)))
    net = linear()
    net.register_buffer("graph", torch.eye(3).to_sparse())
    with pytest.raises(mz.ArgumentError, match="'graph' is sparse"):
        mz.DistributedDataParallel(net)
    with pytest.raises(mz.ArgumentError, match="evaluate it as it is"):
        mz.DistributedDataParallel(linear().requires_grad_(False))


@ranks
def test_odd_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.number = nn.Parameter(torch.tensor(2.0))
            self.empty = nn.Parameter(torch.empty(0, 3))
            self.waves = nn.Parameter(torch.ones(2, dtype=torch.complex64))

        def forward(self, x: float) -> torch.Tensor:
            return self.number * x + self.empty.sum() + (self.waves * (1 + 2j) * x).real.sum()

    model = mz.DistributedDataParallel(Odd())
    model(float(model.world.rank)).backward()
    x = (model.world.size - 1) / 2
    assert model.number.grad.item() == x and model.empty.grad.shape == (0, 3)
    torch.testing.assert_close(model.waves.grad, torch.full((2,), x * (1 - 2j)).to(torch.complex64))


@ranks
def test_a_deep_copy_evaluates_and_is_not_trained() -> None:
    model = mz.DistributedDataParallel(nn.Sequential(linear(), nn.BatchNorm1d(3)))
    average = copy.deepcopy(model)
    assert list(average.state_dict()) == list(model.state_dict())
    x = batch(1)
    with torch.no_grad():
        torch.testing.assert_close(average.eval()(x), model.eval()(x))
        for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
            assert mine is not theirs
            mine.mul_(0.5).add_(theirs, alpha=0.5)
    with pytest.raises(mz.MpizeroError, match=r"DistributedDataParallel\(model\.module\)"):
        average(x).sum().backward()
    model.train()(batch(model.world.rank)).sum().backward()
    assert same_everywhere(model.module[0].weight.grad)
    again = mz.DistributedDataParallel(copy.deepcopy(model).module)
    again(batch(model.world.rank)).sum().backward()
    assert same_everywhere(again.module[0].weight.grad)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
