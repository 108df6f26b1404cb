"""What scripts do with a DistributedDataParallel, beside the plain loop."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mpizero_torch as mz
from support.reference import assert_same_gradients, expected_gradients, gradients, seeded

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])


class Net(nn.Module):
    """Layers a, b, c; ``forward`` takes the names of those to use, and may checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.c = (nn.Linear(4, 4).double() for _ in range(3))

    def forward(self, x: torch.Tensor, use: str = "abc", reentrant: bool | None = None) -> Any:
        for name in use:
            layer = getattr(self, name)
            if reentrant is None:
                x = torch.tanh(layer(x))
            else:
                x = checkpoint(lambda y, f=layer: torch.tanh(f(y)), x, use_reentrant=reentrant)
        return x


def loss_of(model: nn.Module, seed: int, use: str = "abc", **options: Any) -> torch.Tensor:
    return model(seeded(seed, 3, 4), use, **options).square().mean()


def one_per_rank(size: int, use: list[str] | None = None) -> list[Any]:
    uses = use or ["abc"] * size
    return [lambda model, r=r: loss_of(model, r, uses[r]) for r in range(size)]


@ranks
def test_gradients_are_views_of_few_buckets() -> None:
    model = mz.DistributedDataParallel(Net())
    if model.world.size == 1:
        return
    for _ in range(2):
        model.zero_grad()
        loss_of(model, 0).backward()
    addresses = [p.grad.data_ptr() for p in model.parameters()]
    # 60 float64 numbers, each of 6 parameters aligned to 64 bytes: one bucket.
    assert max(addresses) - min(addresses) < (60 + 6 * 8) * 8


@ranks
@pytest.mark.parametrize("set_to_none", [True, False])
def test_step_after_step(set_to_none: bool) -> None:
    model = mz.DistributedDataParallel(Net())
    size = model.world.size
    for _ in range(3):
        loss_of(model, model.world.rank).backward()
        assert_same_gradients(
            gradients(model), expected_gradients(model, one_per_rank(size), [1] * size)
        )
        model.zero_grad(set_to_none=set_to_none)


@ranks
def test_accumulation_with_and_without_no_sync() -> None:
    model = mz.DistributedDataParallel(Net())
    size, rank = model.world.size, model.world.rank
    both = [lambda m, s=s: loss_of(m, s) for s in range(2 * size)]
    # Gradients add up over passes and average over ranks: the divisor is the number of ranks.
    expected = {
        name: None if g is None else g * 2
        for name, g in expected_gradients(model, both, [1] * 2 * size).items()
    }
    for _ in range(2):  # before and after the buckets have been put in order
        with model.no_sync():
            loss_of(model, rank).backward()
        loss_of(model, size + rank).backward()
        assert_same_gradients(gradients(model), expected)
        model.zero_grad()
    loss_of(model, rank).backward()
    loss_of(model, size + rank).backward()
    assert_same_gradients(gradients(model), expected)


@several_ranks
def test_no_sync_keeps_gradients_local() -> None:
    model = mz.DistributedDataParallel(Net())
    with model.no_sync():
        loss_of(model, model.world.rank).backward()
    alone = one_per_rank(model.world.size)[model.world.rank]
    assert_same_gradients(gradients(model), expected_gradients(model, [alone], [1]))


@ranks
def test_parameters_unused_on_some_ranks_and_on_all() -> None:
    model = mz.DistributedDataParallel(Net())
    size, rank = model.world.size, model.world.rank
    some = ["ab" if r % 2 else "a" for r in range(size)]
    for use in (some, ["abc"] * size, ["a"] * size, some):  # changes from step to step
        loss_of(model, rank, use[rank]).backward()
        expected = expected_gradients(model, one_per_rank(size, use), [1] * size)
        assert_same_gradients(gradients(model), expected)
        model.zero_grad()


@ranks
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("use", ["abc", "abab", "ccc"])
def test_activation_checkpointing(reentrant: bool, use: str) -> None:
    model = mz.DistributedDataParallel(Net())
    size, rank = model.world.size, model.world.rank
    for _ in range(3):
        x = seeded(rank, 3, 4).requires_grad_()  # reentrant checkpoints want an input with one
        model(x, use, reentrant=reentrant).square().mean().backward()
        expected = expected_gradients(model, one_per_rank(size, [use] * size), [1] * size)
        assert_same_gradients(gradients(model), expected)
        model.zero_grad()


@ranks
def test_several_forwards_before_one_backward() -> None:
    model = mz.DistributedDataParallel(Net())
    size, rank = model.world.size, model.world.rank
    for _ in range(2):
        (loss_of(model, rank) + loss_of(model, size + rank)).backward()
        both = [lambda m, r=r: loss_of(m, r) + loss_of(m, size + r) for r in range(size)]
        assert_same_gradients(gradients(model), expected_gradients(model, both, [1] * size))
        model.zero_grad()


@ranks
def test_several_inputs_and_nested_outputs() -> None:
    class Nested(Net):
        def forward(self, x: torch.Tensor, *, y: torch.Tensor) -> Any:  # type: ignore[override]
            return {"first": self.a(x), "rest": [(self.b(y),), self.c(x + y)]}

    def loss(model: nn.Module, seed: int) -> torch.Tensor:
        out = model(seeded(seed, 2, 4), y=seeded(seed + 50, 2, 4))
        return out["first"].sum() * 2 + out["rest"][0][0].square().sum() + out["rest"][1].sum()

    model = mz.DistributedDataParallel(Nested())
    size = model.world.size
    for _ in range(2):
        loss(model, model.world.rank).backward()
        each = [lambda m, r=r: loss(m, r) for r in range(size)]
        assert_same_gradients(gradients(model), expected_gradients(model, each, [1] * size))
        model.zero_grad()


@ranks
def test_freezing_and_unfreezing() -> None:
    net = Net()
    net.b.requires_grad_(False)
    model = mz.DistributedDataParallel(net)
    size, rank = model.world.size, model.world.rank
    for frozen in (True, False, True):
        net.b.requires_grad_(not frozen)
        model.zero_grad()
        for _ in range(2):
            model.zero_grad()
            loss_of(model, rank).backward()
            expected = expected_gradients(model, one_per_rank(size), [1] * size)
            assert_same_gradients(gradients(model), expected)


@ranks
def test_mixed_dtypes_in_one_model() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.a = nn.Linear(4, 4, dtype=torch.float64)
            self.b = nn.Linear(4, 4, dtype=torch.float32)
            self.c = nn.Linear(4, 4, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(self.a(x).float()).bfloat16())

    model = mz.DistributedDataParallel(Mixed())
    size, rank = model.world.size, model.world.rank
    bound = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2**-7}
    for _ in range(2):
        model.zero_grad()
        model(seeded(rank, 8, 4)).float().square().mean().backward()
        each = [lambda m, r=r: m(seeded(r, 8, 4)).float().square().mean() for r in range(size)]
        expected = expected_gradients(model, each, [1] * size)
        for name, ours in gradients(model).items():
            theirs = expected[name]
            assert ours is not None and theirs is not None and ours.dtype == theirs.dtype
            # Sums of the same gradients in another order; bfloat16 is rounded once in both.
            scale = theirs.abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=bound[ours.dtype] * scale)


@several_ranks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = mz.DistributedDataParallel(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            out = model(seeded(model.world.rank, 4, 8).float())
            loss = out.float().square().mean()
        loss.backward()
    for p in model.parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32
        same = p.grad.clone()
        model.world.broadcast(same)
        assert torch.equal(same, p.grad) and p.grad.abs().sum() > 0


@several_ranks
def test_replicas_start_as_rank_zeros() -> None:
    torch.manual_seed(mz.init().rank)
    model = mz.DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    for tensor in model.state_dict().values():
        first = tensor.clone()
        model.world.broadcast(first)
        assert torch.equal(first, tensor)


@several_ranks
def test_buffers_become_rank_zeros_and_evaluation_sends_nothing() -> None:
    torch.manual_seed(0)
    model = mz.DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    rank = model.world.rank
    model(seeded(rank, 5, 3).float()).sum().backward()
    own = model.module[1].running_mean.clone()
    first = model.world.broadcast(own.clone())
    assert torch.equal(own, first)
    model.eval()
    if rank == 0:  # alone: would hang if it sent something
        model(seeded(rank, 5, 3).float())


@several_ranks
def test_buffers_of_replaced_submodules_become_rank_zeros() -> None:
    def norm() -> nn.Module:
        return nn.BatchNorm1d(3, affine=False)

    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(norm()))
    model = mz.DistributedDataParallel(net)
    rank = model.world.rank
    same = []
    # A submodule's submodule, then the submodule itself, then one inside what took its place.
    for inside, new in ((True, norm()), (False, nn.Sequential(norm())), (True, norm())):
        (net[1] if inside else net)[-1] = new
        model(seeded(rank, 5, 3).float()).sum().backward()
        mean = net[1][0].running_mean
        same.append(mean.any() and torch.equal(mean, model.world.broadcast(mean.clone())))
    assert all(same)


@several_ranks
def test_unchanged_buffers_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(3, 3)
    net.register_buffer("mask", torch.ones(3))
    model = mz.DistributedDataParallel(net)
    monkeypatch.setattr(model.world, "broadcast", None)  # any call would raise
    monkeypatch.setattr(model.world, "broadcast_object", lambda value, root=0: value)
    model(torch.ones(2, 3)).sum().backward()


@ranks
def test_state_dict_has_plain_names_also_inside_another_module() -> None:
    plain = Net()
    model = mz.DistributedDataParallel(Net())
    assert list(model.state_dict()) == list(plain.state_dict())
    changed = {name: value + 1 for name, value in plain.state_dict().items()}
    model.load_state_dict(changed)
    plain.load_state_dict(model.state_dict())
    outer = nn.ModuleDict({"net": model, "head": nn.Linear(2, 2)})
    names = list(nn.ModuleDict({"net": plain, "head": nn.Linear(2, 2)}).state_dict())
    assert list(outer.state_dict()) == names
    outer.load_state_dict(outer.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})


@ranks
def test_copies_are_refused_with_the_remedy() -> None:
    model = mz.DistributedDataParallel(Net())
    net = Net()
    sharded, _ = mz.zero(net, torch.optim.SGD(net.parameters(), 0.1), stage=1)
    with pytest.raises(TypeError, match=r"model\.module"):
        copy.deepcopy(sharded)
    with pytest.raises(TypeError, match=r"model\.module"):
        pickle.dumps(model)
    assert copy.deepcopy(model.module) is not model.module


@ranks
def test_attributes_of_the_inner_module() -> None:
    model = mz.DistributedDataParallel(Net())
    assert model.a is model.module.a
    with pytest.raises(AttributeError, match="nothing"):
        model.nothing  # noqa: B018


@several_ranks
def test_models_that_differ_are_refused_by_name() -> None:
    world = mz.init()
    width = 3 if world.rank < world.size - 1 else 5
    with pytest.raises(mz.MismatchError, match=rf"rank {world.size - 1}: weight.*\({width}|5, 4\)"):
        mz.DistributedDataParallel(nn.Linear(4, width))
    world.barrier()


@ranks
def test_bad_arguments() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(mz.ArgumentError, match="requires_grad"):
        mz.DistributedDataParallel(frozen)
    with pytest.raises(mz.ArgumentError, match="bucket_cap_mb"):
        mz.DistributedDataParallel(nn.Linear(2, 2), bucket_cap_mb=0)
    model = mz.DistributedDataParallel(nn.Linear(2, 2))
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(mz.ArgumentError, match="weight"):
            model.weigh(weight)


@several_ranks
def test_sparse_gradients_are_refused() -> None:
    model = mz.DistributedDataParallel(nn.Embedding(5, 3, sparse=True))
    with pytest.raises(mz.ArgumentError, match="sparse for parameter 'weight'"):
        model(torch.tensor([1])).sum().backward()


@several_ranks
def test_clipping_gives_the_global_norm() -> None:
    model = mz.DistributedDataParallel(Net())
    size = model.world.size
    loss_of(model, model.world.rank).backward()
    expected = expected_gradients(model, one_per_rank(size), [1] * size)
    norm = torch.stack([g.norm() for g in expected.values() if g is not None]).norm()
    torch.testing.assert_close(mz.clip_grad_norm_(model, 1e-3), norm)
    clipped = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert clipped.item() == pytest.approx(1e-3, rel=1e-2)
    mz.clip_grad_value_(model, 1e-6)
    assert max(p.grad.abs().max() for p in model.parameters()) <= 1e-6


@several_ranks
def test_overlap_on_a_thread_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    world = mz.init()
    results = []
    for mode in ("thread", "inline"):
        monkeypatch.setenv("MPIZERO_PROGRESS", mode)
        part = world.split(0)
        assert part is not None and part.overlaps == (mode == "thread")
        model = mz.DistributedDataParallel(Net(), world=part, bucket_cap_mb=1e-4)
        for _ in range(3):
            model.zero_grad()
            loss_of(model, part.rank).backward()
        results.append(gradients(model))
        part.close()
    for name, first in results[0].items():
        assert torch.equal(first, results[1][name]), name


@several_ranks
def test_going_on_after_a_backward_that_failed_is_refused() -> None:
    model = mz.DistributedDataParallel(Net())

    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("out of memory, say")

    hook = model.module.a.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss_of(model, 0).backward()
    hook.remove()
    with pytest.raises(mz.MpizeroError, match="earlier backward"):
        loss_of(model, 0).backward()


@several_ranks
def test_a_failed_backward_that_kept_its_gradients_may_be_repeated() -> None:
    model = mz.DistributedDataParallel(Net())
    hook = model.module.a.weight.register_hook(lambda _: 1 / 0)
    with model.no_sync(), pytest.raises(ZeroDivisionError):
        loss_of(model, 0).backward()
    hook.remove()
    model.zero_grad()
    loss_of(model, model.world.rank).backward()
    size = model.world.size
    assert_same_gradients(
        gradients(model), expected_gradients(model, one_per_rank(size), [1] * size)
    )


@several_ranks
def test_more_gradients_than_before_are_an_error_not_a_race(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mz.DistributedDataParallel(Net(), bucket_cap_mb=1e-4)
    x = seeded(model.world.rank, 3, 4)
    for _ in range(2):
        model.zero_grad()
        model(x.requires_grad_(), "abc", reentrant=True).sum().backward()
    with pytest.raises(mz.MismatchError, match="overlap=False"):
        model(x.requires_grad_(), "abcabc", reentrant=True).sum().backward()


@ranks
def test_wrapped_modules_are_let_go() -> None:
    """torch keeps hooks where Python's collector does not see them."""
    model = mz.DistributedDataParallel(Net())
    loss_of(model, 1).backward()
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None
