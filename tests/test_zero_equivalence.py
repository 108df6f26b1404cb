"""Sharded over n ranks, a model trains what one process trains on the concatenated batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mpizero_torch as mz
from support.models import KINDS, Kind, loss
from support.placements import Placement, placed

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])

MICRO_BATCH = 4
SMALL_SEGMENTS = {"segment_mb": 0.002}  # so that small models have several, and several units

# As for replicas: sums over ranks are rounded in another order than sums within one batch.
RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-12}

WAYS = [
    pytest.param({"stage": stage, "share_parameters": share, "partition": partition}, id=name)
    for name, stage, share, partition in (
        ("1 shared flat", 1, True, "flat"),
        ("1 private parameter", 1, False, "parameter"),
        ("2 shared flat", 2, True, "flat"),
        ("2 shared parameter", 2, True, "parameter"),
        ("2 private flat", 2, False, "flat"),
        ("3 shared flat", 3, True, "flat"),
        ("3 private flat", 3, False, "flat"),
        ("3 private parameter", 3, False, "parameter"),
    )
]
STAGES = [
    pytest.param({"stage": 1}, id="1"),
    pytest.param({"stage": 2}, id="2"),
    pytest.param({"stage": 3, "share_parameters": False}, id="3"),
]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def sharded(
    kind: Kind, dtype: torch.dtype, make: Callable[[Any], Any] = adamw, **options: Any
) -> tuple[Any, Any]:
    model = mz.SyncBatchNorm.convert_sync_batchnorm(kind.build(dtype))
    return mz.zero(model, make(model.parameters()), **{**SMALL_SEGMENTS, **options})


def own(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of a batch."""
    world = mz.init()
    part = slice(world.rank * MICRO_BATCH, (world.rank + 1) * MICRO_BATCH)
    return batch[0][part], batch[1][part]


def assert_same_training(
    kind: Kind,
    dtype: torch.dtype,
    steps: int,
    make: Callable[[Any], Any] = adamw,
    **options: Any,
) -> None:
    """Losses of all steps, and the optimizer's state after the last."""
    world = mz.init()
    alone = kind.build(dtype)
    its = make(alone.parameters())
    model, optimizer = sharded(kind, dtype, make, **options)
    for step in range(steps):
        batch = kind.batch(world.size * MICRO_BATCH, step)
        expected, found = loss(alone, *batch), loss(model, *own(batch))
        assert mz.mean(found) == pytest.approx(expected.item(), rel=RELATIVE[dtype])
        for each, optim in ((expected, its), (found, optimizer)):
            optim.zero_grad()
            each.backward()
            optim.step()
    assert_same_state(optimizer.state_dict(), its.state_dict(), dtype)


def assert_same_state(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, values in theirs["state"].items():
        assert ours["state"][number].keys() == values.keys()
        for key, value in values.items():
            mine = ours["state"][number][key]
            if isinstance(value, torch.Tensor):
                assert mine.shape == value.shape and mine.dtype == value.dtype, key
                if dtype == torch.float64:
                    torch.testing.assert_close(mine, value, rtol=1e-7, atol=1e-12)
            else:
                assert mine == value


@ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("way", STAGES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_losses_are_those_of_one_process(
    kind: Kind, way: dict[str, Any], dtype: torch.dtype
) -> None:
    assert_same_training(kind, dtype, 20, **way)


@ranks
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_all_ways_to_share_and_cut(kind: Kind, way: dict[str, Any]) -> None:
    assert_same_training(kind, torch.float64, 4, **way)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
}
BRANCHED = next(kind for kind in KINDS if kind.name == "branched")
TRANSFORMER = next(kind for kind in KINDS if kind.name == "transformer")
TIED = next(kind for kind in KINDS if kind.name == "tied")


@ranks
@pytest.mark.parametrize("partition", ["flat", "parameter"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_element_wise_optimizers(name: str, partition: str) -> None:
    """The model has parameters that nobody uses, and some that not every rank does."""
    options = {"stage": 2, "partition": partition}
    assert_same_training(BRANCHED, torch.float64, 5, OPTIMIZERS[name], **options)


class TrustRatio(torch.optim.Optimizer):
    """Looks at a parameter as a whole, in the manner of LAMB."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state.setdefault("rows", torch.zeros(p.shape[:1], dtype=p.dtype))
                    state["rows"] += p.grad.reshape(*p.shape[:1], -1).sum(1) if p.dim() else 0
                    ratio = p.norm() / (p.grad.norm() + 1e-6)
                    p.add_(p.grad, alpha=-group["lr"] * float(ratio))


@ranks
def test_optimizers_that_look_at_parameters_get_whole_ones() -> None:
    for stage in (1, 2, 3):
        assert_same_training(
            TRANSFORMER, torch.float64, 5, TrustRatio, stage=stage, partition="parameter"
        )
        assert_same_training(TRANSFORMER, torch.float64, 5, torch.optim.Adafactor, stage=stage)


@ranks
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon() -> None:
    world = mz.init()

    def build() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 9, bias=False), nn.Tanh(), nn.Linear(9, 5, bias=False))

    alone, plain = build(), build()
    its = torch.optim.Muon(alone.parameters(), lr=0.01)
    model, optimizer = mz.zero(plain, torch.optim.Muon(plain.parameters(), lr=0.01), stage=2)
    for step in range(4):
        x, y = BRANCHED.batch(world.size * MICRO_BATCH, step)
        for each, optim, batch in ((alone, its, (x, y)), (model, optimizer, own((x, y)))):
            optim.zero_grad()
            loss(each, *batch).backward()
            optim.step()
    for ours, theirs in zip(model.state_dict().values(), alone.parameters(), strict=True):
        # Muon computes in bfloat16: one rounding there is 4e-3 of an update of 0.01.
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-3, atol=1e-3)


@ranks
@pytest.mark.parametrize(
    "make", [TrustRatio, torch.optim.LBFGS, torch.optim.SparseAdam], ids=lambda m: m.__name__
)
def test_optimizers_that_might_go_wrong_are_refused(make: Any) -> None:
    with pytest.raises(mz.ArgumentError, match=r"partition|optimizer"):
        sharded(TRANSFORMER, torch.float64, make, stage=2)


@ranks
def test_groups_with_settings_and_schedules_of_their_own() -> None:
    def make(parameters: Any) -> Any:
        every = list(parameters)
        return torch.optim.AdamW(
            [{"params": every[::2], "weight_decay": 0.3}, {"params": every[1::2], "lr": 1e-2}]
        )

    for way in ({"stage": 2}, {"stage": 3, "share_parameters": False, "partition": "parameter"}):
        assert_same_training(TRANSFORMER, torch.float64, 6, make, **way)


@ranks
def test_stages_and_partitions_agree_bit_for_bit() -> None:
    def result(**options: Any) -> bytes:
        world = mz.init()
        model, optimizer = sharded(TRANSFORMER, torch.float32, **options)
        for step in range(4):
            optimizer.zero_grad()
            loss(model, *own(TRANSFORMER.batch(world.size * MICRO_BATCH, step))).backward()
            optimizer.step()
        return b"".join(value.numpy().tobytes() for value in model.state_dict().values())

    first = result(stage=1)
    assert result(stage=1) == first
    for way in WAYS:
        assert result(**way.values[0]) == first


@several_ranks
@pytest.mark.parametrize("way", STAGES)
def test_more_ranks_than_elements_and_odd_shapes(way: dict[str, Any]) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
            self.nothing = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * x + self.nothing.sum()

    world, alone, plain = mz.init(), Odd(), Odd()
    its = adamw(alone.parameters())
    model, optimizer = mz.zero(plain, adamw(plain.parameters()), **way)
    for step in range(3):
        x = torch.arange(float(world.size), dtype=torch.float64) + step
        alone(x).mean().backward()
        model(x[world.rank]).backward()
        for each in (its, optimizer):
            each.step()
            each.zero_grad()
    with mz.gathered(model) as inner:
        assert inner.scale.item() == pytest.approx(alone.scale.item(), rel=1e-12)


@ranks
@pytest.mark.parametrize("way", STAGES)
@pytest.mark.parametrize("held", [True, False], ids=["no_sync", "in the shard"])
def test_accumulating_micro_batches(way: dict[str, Any], held: bool) -> None:
    world, alone = mz.init(), TRANSFORMER.build(torch.float64)
    its = adamw(alone.parameters())
    model, optimizer = sharded(TRANSFORMER, torch.float64, **way)
    for step in range(4):
        its.zero_grad()
        optimizer.zero_grad()
        for micro in range(3):
            batch = TRANSFORMER.batch(world.size * MICRO_BATCH, 10 * step + micro)
            loss(alone, *batch).backward()
            if held and micro < 2:
                with model.no_sync():
                    loss(model, *own(batch)).backward()
            else:
                loss(model, *own(batch)).backward()
        its.step()
        optimizer.step()
    assert_same_state(optimizer.state_dict(), its.state_dict(), torch.float64)


@several_ranks
@pytest.mark.parametrize("way", STAGES)
def test_stated_weights(way: dict[str, Any]) -> None:
    """Ranks have batches of different sizes, over accumulated passes."""
    world, alone = mz.init(), TRANSFORMER.build(torch.float64)
    its = adamw(alone.parameters())
    model, optimizer = sharded(TRANSFORMER, torch.float64, **way)
    counts = [[rank + 1 + micro for rank in range(world.size)] for micro in range(2)]
    total = sum(map(sum, counts))
    for step in range(3):
        its.zero_grad()
        optimizer.zero_grad()
        for micro, sizes in enumerate(counts):
            for rank, size in enumerate(sizes):
                batch = TRANSFORMER.batch(size, 100 * step + 10 * micro + rank)
                (loss(alone, *batch) * size / total).backward()
                if rank == world.rank:
                    model.weigh(size)
                    loss(model, *batch).backward()
        its.step()
        optimizer.step()
    assert_same_state(optimizer.state_dict(), its.state_dict(), torch.float64)


@several_ranks
@pytest.mark.parametrize("way", STAGES)
def test_loops_that_end_earlier_on_some_ranks(way: dict[str, Any]) -> None:
    world, alone = mz.init(), TRANSFORMER.build(torch.float64)
    its = adamw(alone.parameters())
    model, optimizer = sharded(TRANSFORMER, torch.float64, **way)
    steps = [rank + 1 for rank in range(world.size)]
    with model.join(optimizer):
        for step in range(steps[world.rank]):
            optimizer.zero_grad()
            loss(model, *TRANSFORMER.batch(2, 10 * step + world.rank)).backward()
            optimizer.step()
    for step in range(max(steps)):
        its.zero_grad()
        active = [rank for rank in range(world.size) if step < steps[rank]]
        for rank in active:
            (loss(alone, *TRANSFORMER.batch(2, 10 * step + rank)) / len(active)).backward()
        its.step()
    assert_same_state(optimizer.state_dict(), its.state_dict(), torch.float64)


@ranks
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("way", STAGES)
def test_clipping_is_that_of_whole_gradients(way: dict[str, Any], norm_type: float) -> None:
    world, alone = mz.init(), TIED.build(torch.float64)
    its = adamw(alone.parameters())
    model, optimizer = sharded(TIED, torch.float64, **way)
    for step in range(3):
        batch = TIED.batch(world.size * MICRO_BATCH, step)
        its.zero_grad()
        optimizer.zero_grad()
        loss(alone, *batch).backward()
        loss(model, *own(batch)).backward()
        expected = nn.utils.clip_grad_norm_(alone.parameters(), 0.05, norm_type)
        found = mz.clip_grad_norm_(model, 0.05, norm_type)
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(model.gradient(name), parameter.grad, rtol=1e-5, atol=1e-12)
        # A second time it is the norm of what has been clipped.
        again = mz.clip_grad_norm_(model, 1e9, norm_type)
        assert again.item() == pytest.approx(min(0.05, expected.item()), rel=1e-4)
        nn.utils.clip_grad_value_(alone.parameters(), 1e-3)
        mz.clip_grad_value_(model, 1e-3)
        its.step()
        optimizer.step()
    for ours, theirs in zip(model.state_dict().values(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@ranks
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@pytest.mark.parametrize("way", [{"stage": 0}, *STAGES])
def test_a_norm_that_is_not_finite_is_an_error_if_wished(
    way: dict[str, Any], norm_type: float
) -> None:
    """On all ranks, wherever the gradient is that is not; and none is changed."""
    world = mz.init()
    net = nn.Linear(4, 4)
    model, _ = mz.zero(net, torch.optim.SGD(net.parameters(), lr=0.1), **way)
    x = torch.ones(2, 4)
    if world.rank == world.size - 1:
        x[0, 0] = torch.inf
    model(x).sum().backward()
    before = mz.full_gradient(net.bias)
    with pytest.raises(RuntimeError, match="error_if_nonfinite") as caught:
        mz.clip_grad_norm_(model, 1e-3, norm_type, error_if_nonfinite=True)
    assert isinstance(caught.value, mz.MpizeroError) or way["stage"] == 0
    after = mz.full_gradient(net.bias)
    assert before is not None and after is not None and torch.equal(before, after)
    model.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    found = mz.clip_grad_norm_(model, 1e9, norm_type, error_if_nonfinite=True, foreach=False)
    assert torch.isfinite(found)


@pytest.mark.parallel([4])
@pytest.mark.parametrize("shard_group", [1, 2, 4, "node"])
@pytest.mark.parametrize("way", STAGES)
def test_groups_of_shards(way: dict[str, Any], shard_group: Any) -> None:
    assert_same_training(TRANSFORMER, torch.float64, 6, shard_group=shard_group, **way)


@pytest.mark.parallel([4])
@pytest.mark.parametrize("shard_group", ["world", "node"])
@pytest.mark.parametrize("way", [*STAGES, pytest.param({"stage": 3}, id="3 shared")])
def test_several_nodes(way: dict[str, Any], shard_group: str) -> None:
    """Two ranks each: what travels between them goes through messages."""
    kind, its = TRANSFORMER, TRANSFORMER.build(torch.float64)
    theirs = adamw(its.parameters())
    with placed(Placement("ABBA", (0, 1, 2, 3))) as world:
        model, optimizer = sharded(kind, torch.float64, world=world, shard_group=shard_group, **way)
        for step in range(5):
            batch = kind.batch(world.size * MICRO_BATCH, step)
            for each, optim, part in ((its, theirs, batch), (model, optimizer, own(batch))):
                optim.zero_grad()
                loss(each, *part).backward()
                optim.step()
        assert_same_state(optimizer.state_dict(), theirs.state_dict(), torch.float64)
