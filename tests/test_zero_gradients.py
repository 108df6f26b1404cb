"""What programs do to gradients after backward, beside one process that does the same."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import mpizero_torch as mz

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])

SHARDED = [
    pytest.param({"stage": 1}, id="1"),
    pytest.param({"stage": 2}, id="2"),
    pytest.param({"stage": 2, "partition": "parameter"}, id="2 by parameter"),
    pytest.param({"stage": 3}, id="3"),
    pytest.param({"stage": 3, "share_parameters": False}, id="3 private"),
]
STAGES = [pytest.param({"stage": 0}, id="0"), *SHARDED]
PER_RANK = 2


class Net(nn.Module):
    """Has a tied parameter, a frozen one, and one that is used only when it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.second.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.rare = nn.Parameter(torch.ones(8))
        self.last = nn.Linear(8, 3)
        self.double()

    def forward(self, x: torch.Tensor, rare: bool = False) -> torch.Tensor:
        hidden = torch.tanh(self.again(torch.tanh(self.second(torch.tanh(self.first(x))))))
        hidden = self.frozen(hidden) + hidden
        return self.last(hidden * self.rare if rare else hidden)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    # Momentum and decay tell a gradient that is zero from one that is not there.
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


class Both:
    """The same training in one process with all samples, and on all ranks."""

    def __init__(self, way: dict[str, Any]) -> None:
        self.world = mz.init()
        self.alone, self.inner = Net(), Net()
        self.its = sgd(self.alone)
        options = {} if not way["stage"] else {"segment_mb": 0.0005}
        self.model, self.optimizer = mz.zero(self.inner, sgd(self.inner), **way, **options)
        self.passes = 0

    def backward(self, rare: bool = False) -> None:
        generator = torch.Generator().manual_seed(self.passes)
        self.passes += 1
        count = self.world.size * PER_RANK
        x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
        y = torch.randn(count, 3, generator=generator, dtype=torch.float64)
        own = slice(self.world.rank * PER_RANK, (self.world.rank + 1) * PER_RANK)
        functional.mse_loss(self.alone(x, rare), y).backward()
        functional.mse_loss(self.model(x[own], rare), y[own]).backward()

    def step(self) -> None:
        self.its.step()
        self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.its.zero_grad(set_to_none)
        self.optimizer.zero_grad(set_to_none)

    def parameters(self, *names: str) -> Iterator[nn.Parameter]:
        """Of one process's model, and of the sharded one."""
        for module in (self.alone, self.inner):
            for name, parameter in module.named_parameters():
                if not names or name in names:
                    yield parameter

    def compare(self) -> None:
        ours = self.model.state_dict()
        for name, value in self.alone.state_dict().items():
            torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-11, msg=name)


def by_hand(both: Both) -> None:
    for parameter in both.parameters():
        parameter.grad = None


def of_modules(both: Both) -> None:
    both.alone.zero_grad()
    both.inner.zero_grad()


def of_modules_to_zero(both: Both) -> None:
    both.alone.zero_grad(set_to_none=False)
    both.inner.zero_grad(set_to_none=False)


def in_place(both: Both) -> None:
    for parameter in both.parameters():
        if parameter.grad is not None:
            parameter.grad.data.zero_()


def all_in_one_call(both: Both) -> None:
    for module in (both.alone, both.inner):
        torch._foreach_zero_([p.grad for p in module.parameters() if p.grad is not None])


def own_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def through_the_optimizer(both: Both) -> None:
    has = any(parameter.grad is not None for parameter in own_parameters(both.optimizer))
    if not all(both.world.gather_objects(has)) and any(both.world.gather_objects(has)):
        both.its.zero_grad()
        both.optimizer.zero_grad()  # the other way is refused: see below
        return
    for optimizer in (both.its, both.optimizer):
        for parameter in own_parameters(optimizer):
            parameter.grad = None


def by_another_optimizer(both: Both) -> None:
    for module in (both.alone, both.inner):
        torch.optim.SGD(module.parameters(), lr=1.0).zero_grad()


FORGETTING = [
    by_hand, of_modules, of_modules_to_zero, in_place, all_in_one_call, through_the_optimizer,
    by_another_optimizer,
]  # fmt: skip


@ranks
@pytest.mark.parametrize("way", STAGES)
def test_gradients_forgotten_by_hand(way: dict[str, Any]) -> None:
    both = Both(way)
    for forget in FORGETTING:
        both.backward(rare=True)
        both.step()
        forget(both)
        both.step()
        # What is not used in a pass is left alone, or has a gradient of zero.
        both.backward()
        both.step()
        forget(both)
        both.compare()


@several_ranks
def test_a_rank_without_a_part_cannot_see_what_is_done_to_parts() -> None:
    """It goes on with the gradients that the others have forgotten, and is found to."""
    net = nn.Linear(3, 2, bias=False)  # one rank has all of it
    model, optimizer = mz.zero(net, torch.optim.SGD(net.parameters()), 2, partition="parameter")
    model(torch.ones(1, 3)).sum().backward()
    for parameter in own_parameters(optimizer):
        parameter.grad = None
    with pytest.raises(mz.MismatchError, match="no gradients"):
        optimizer.step()


def skip(parameter: nn.Parameter) -> None:
    parameter.grad = None


def replace(parameter: nn.Parameter) -> None:
    parameter.grad = torch.full_like(parameter, 0.01)


def zero(parameter: nn.Parameter) -> None:
    parameter.grad.zero_()


def scale(parameter: nn.Parameter) -> None:
    parameter.grad.mul_(0.5).add_(0.01)
    parameter.grad /= 2


def limit(parameter: nn.Parameter) -> None:
    nn.utils.clip_grad_value_([parameter], 1e-3)


def rows(parameter: nn.Parameter) -> None:
    parameter.grad[1] = 0
    parameter.grad[..., :2] = torch.tensor([0.5, 0.25], dtype=torch.float64)


def mask(parameter: nn.Parameter) -> None:
    parameter.grad.mul_(torch.arange(parameter.shape[-1]).double())


def copied(parameter: nn.Parameter) -> None:
    parameter.grad.data.copy_(torch.linspace(0, 1, parameter.numel()).view(parameter.shape))


def by_a_given_norm(parameter: nn.Parameter) -> None:
    nn.utils.clip_grads_with_norm_([parameter], 1.0, torch.tensor(7.0))


@ranks
@pytest.mark.parametrize("way", STAGES)
def test_single_gradients(way: dict[str, Any]) -> None:
    both = Both(way)
    for change in (skip, replace, zero, scale, limit, rows, mask, copied, by_a_given_norm):
        both.zero_grad()
        both.backward()
        for parameter in both.parameters("last.weight", "first.weight"):
            change(parameter)
        both.backward(rare=True)  # more is added
        for parameter in both.parameters("second.weight", "last.weight"):
            change(parameter)
        both.step()
        both.compare()


@ranks
@pytest.mark.parametrize("way", STAGES)
def test_gradients_where_no_pass_has_come(way: dict[str, Any]) -> None:
    both = Both(way)
    for parameter in both.parameters("rare", "last.bias"):
        replace(parameter)
    both.step()
    both.backward()  # adds to what was set
    for parameter in both.parameters("frozen.bias"):
        replace(parameter)
    both.step()
    both.compare()


@ranks
@pytest.mark.parametrize("way", STAGES)
def test_a_gradient_stays_while_other_passes_do_not_touch_it(way: dict[str, Any]) -> None:
    both = Both(way)
    both.backward(rare=True)
    both.backward()
    assert all(parameter.grad is not None for parameter in both.parameters("rare"))
    for parameter in both.parameters("rare"):
        parameter.grad.mul_(3.0)
    both.backward()
    both.step()
    both.compare()


@ranks
@pytest.mark.parametrize("way", SHARDED)
def test_gradients_that_stay_on_a_rank(way: dict[str, Any]) -> None:
    """Under no_sync a gradient is this rank's own, and what is done to it is, too."""
    both = Both(way)
    for _ in range(2):
        both.zero_grad()
        with both.model.no_sync():
            both.backward(rare=True)
        for parameter in both.parameters("first.weight"):
            parameter.grad.mul_(0.5)
        for parameter in both.parameters("second.weight", "rare"):
            parameter.grad = None
        for parameter in both.parameters("last.weight"):
            parameter.grad = parameter.grad.clone() * 2
        both.backward()
        both.step()
    both.compare()
    # Beside gradients that are averaged already, either all are forgotten or none is changed.
    with both.model.no_sync():
        both.backward(rare=True)
    gradient: Any = both.inner.first.weight.grad
    gradient.mul_(2.0)
    with pytest.raises(mz.MpizeroError, match=r"first\.weight.*no_sync"):
        both.backward()
    by_hand(both)


@ranks
@pytest.mark.parametrize("way", SHARDED)
def test_gradients_that_stay_beside_a_mean_of_others(way: dict[str, Any]) -> None:
    """They are added up where no pass has averaged anything since the gradients were forgotten."""
    both = Both(way)
    for _ in range(2):
        both.zero_grad()
        both.backward()  # of all but one
        with both.model.no_sync():
            both.backward(rare=True)
        both.backward(rare=True)
        both.step()
    both.compare()


READING: dict[str, Callable[[Any], Any]] = {
    "norm": lambda g: g.norm(),
    "data": lambda g: g.data.norm(2),
    "detach": lambda g: g.detach().clone(),
    "T": lambda g: g.T,
    "mT": lambda g: g.mT,
    "real": lambda g: g.real,
    "cpu": lambda g: g.cpu().tolist(),
    "float": lambda g: g.float().sum(),
    "numpy": lambda g: g.numpy(),
    "isfinite": torch.isfinite,
    "item": lambda g: g[0],
    "arithmetic": lambda g: g * 2,
    "view": lambda g: g.view(-1),
    "bool": lambda g: bool((g == 0).all()),
    "address": lambda g: g.data_ptr(),
    "storage": lambda g: g.untyped_storage(),
    "total": lambda g: nn.utils.get_total_norm([g]),
    "noise": lambda g: g.normal_(),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "save": lambda g: torch.save(g, io.BytesIO()),
    "set data": lambda g: setattr(g, "data", torch.ones(8, 8, dtype=torch.float64)),
    "out": lambda g: torch.add(torch.ones(8, 8).double(), 1, out=g),
    "norms": lambda g: torch._foreach_norm([g]),
}


@ranks
@pytest.mark.parametrize("way", SHARDED)
def test_what_needs_the_values_is_refused(way: dict[str, Any]) -> None:
    both = Both(way)
    both.backward()
    weight = both.inner.second.weight
    for title, read in READING.items():
        with pytest.raises(mz.MpizeroError, match=r"mz\.full_gradient"):
            read(weight.grad)
            pytest.fail(title)
    gradient: Any = weight.grad
    form = (gradient.shape, gradient.dtype, gradient.device, gradient.is_sparse, gradient.dim())
    assert form == ((8, 8), torch.float64, torch.device("cpu"), False, 2)
    assert not torch.zeros_like(gradient).any() and "sharded" in f"{gradient}"
    assert (gradient != None) is True  # noqa: E711
    assert (gradient == None) is False  # noqa: E711
    twin = copy.deepcopy(both.inner.last.bias) if way.get("share_parameters") is None else None
    assert twin is None or twin.grad is None
    for parameter in both.alone.parameters():  # nothing of this has changed anything
        assert parameter.grad is None or parameter.grad is not None
    both.step()
    both.compare()


@several_ranks
@pytest.mark.parametrize("way", SHARDED)
def test_norms_of_the_optimizers_parameters_are_refused(way: dict[str, Any]) -> None:
    both = Both(way)
    both.backward()
    own = own_parameters(both.optimizer)
    held = [p for p in own if p.grad is not None]
    for wrong in (
        lambda: nn.utils.clip_grad_norm_(own, 0.1),
        lambda: nn.utils.clip_grad_norm_(own, 0.1, foreach=True),
        lambda: held[0].grad.data.norm(2),
        lambda: held[0].grad.abs().max(),
        lambda: nn.utils.get_total_norm([p.grad for p in held]),
        lambda: sum((p.grad**2).sum() for p in held),
    ):
        if held:
            with pytest.raises(mz.MpizeroError, match=r"mz\.clip_grad_norm_"):
                wrong()
    # What treats each element by itself is right. (torch's function wants some gradient.)
    if held:
        nn.utils.clip_grad_value_(own, 1e-3)
    nn.utils.clip_grad_value_(both.alone.parameters(), 1e-3)
    for parameter in held:
        parameter.grad.mul_(0.5)
        parameter.grad = parameter.grad * 0.5
    for parameter in both.alone.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0.25)
    both.step()
    both.compare()


@ranks
@pytest.mark.parametrize("way", SHARDED)
def test_norms_after_changes(way: dict[str, Any]) -> None:
    both = Both(way)
    both.backward()
    for change, names in ((skip, ["first.weight"]), (replace, ["rare"]), (scale, ["last.bias"])):
        for parameter in both.parameters(*names):
            change(parameter)
        expected = nn.utils.clip_grad_norm_(both.alone.parameters(), math.inf)
        found = mz.clip_grad_norm_(both.model, math.inf)
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    by_hand(both)
    assert mz.clip_grad_norm_(both.model, math.inf).item() == 0.0


@several_ranks
@pytest.mark.parametrize("way", SHARDED)
@pytest.mark.parametrize("change", [skip, replace, zero, scale])
@pytest.mark.parametrize("then", ["step", "backward"])
def test_ranks_that_do_not_do_the_same(
    way: dict[str, Any], change: Callable[[Any], None], then: str
) -> None:
    both = Both(way)
    both.backward()
    if both.world.rank == 1:
        change(both.inner.last.weight)
    with pytest.raises(mz.MismatchError, match="rank 1: gradients"):
        if then == "backward":
            both.backward()
        else:
            both.step()


@several_ranks
@pytest.mark.parametrize("way", SHARDED)
def test_values_that_differ_between_ranks(way: dict[str, Any]) -> None:
    both = Both(way)
    both.inner.last.weight.grad = torch.full((3, 8), 1.0 + both.world.rank, dtype=torch.float64)
    with pytest.raises(mz.MismatchError, match=r"last\.weight"):
        both.step()


@ranks
@pytest.mark.parametrize("way", SHARDED)
def test_a_scaler_and_a_gradient_that_was_set(way: dict[str, Any]) -> None:
    """Whether it was set before or after the gradients were unscaled cannot be told."""
    both = Both(way)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x = torch.ones(2, 6).double()
    scaler.scale(both.model(x).square().mean()).backward()
    scaled = mz.clip_grad_norm_(both.model, math.inf)
    replace(both.inner.last.weight)
    mz.set_gradient(both.inner.last.weight, None)
    norm = mz.clip_grad_norm_(both.model, math.inf)
    scaler.unscale_(both.optimizer)
    assert mz.clip_grad_norm_(both.model, math.inf).item() == pytest.approx(norm.item() / 8)
    assert norm < scaled
    held = [
        p for group in both.optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    if held:  # torch's scaler wants to have seen some gradient
        scaler.update()
    else:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(both.model(x).square().mean()).backward()
    replace(both.inner.last.weight)
    scaler.unscale_(both.optimizer)
    with pytest.raises(mz.MpizeroError, match=r"mz\.set_gradient"):
        both.optimizer.step()


@ranks
@pytest.mark.parametrize("way", SHARDED)
def test_hooks_on_accumulated_gradients(way: dict[str, Any]) -> None:
    """They are called when the gradient is the average, whenever they were added."""
    both = Both(way)
    seen: list[tuple[str, torch.Tensor]] = []

    def look(name: str) -> Callable[[Any], None]:
        def hook(parameter: nn.Parameter) -> None:
            gradient = mz.full_gradient(parameter)
            assert gradient is not None
            seen.append((name, gradient))

        return hook

    for _ in range(3):
        both.zero_grad()
        handles = [
            parameter.register_post_accumulate_grad_hook(look(name))
            for name, parameter in both.inner.named_parameters()
            if parameter.requires_grad
        ]
        seen.clear()
        with both.model.no_sync():
            both.backward()
        assert not seen
        both.backward()
        expected = {name: p.grad for name, p in both.alone.named_parameters() if name != "rare"}
        assert len(seen) == len([each for each in expected.values() if each is not None])
        for name, gradient in seen:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
        both.step()
        for handle in handles:
            handle.remove()
    seen.clear()
    both.backward()
    assert not seen
    both.compare()


@ranks
@pytest.mark.parametrize(
    "way", [each for each in SHARDED if "share_parameters" not in each.values[0]]
)
def test_a_pass_through_the_inner_module(way: dict[str, Any]) -> None:
    """Its gradients come unannounced: they must not be taken for ones that the program has set."""
    both = Both(way)
    world = both.world
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(world.size, 6, generator=generator, dtype=torch.float64)
        both.zero_grad()
        if step:
            for parameter in both.parameters("rare", "last.bias"):
                replace(parameter)  # no pass was before it, and one comes after
        both.alone(x).square().mean().backward()
        both.inner(x[world.rank : world.rank + 1]).square().mean().backward()
        both.step()
    both.compare()


def decay(module: nn.Module) -> torch.Tensor:
    """A term of the loss that comes to parameters before any gradient comes to an output."""
    return torch.stack([p.square().sum() for p in module.parameters() if p.requires_grad]).sum()


@ranks
@pytest.mark.parametrize("way", STAGES)
@pytest.mark.parametrize("alone", [False, True])
def test_weights_in_the_loss_are_added_to_gradients_that_are_there(
    way: dict[str, Any], alone: bool
) -> None:
    """Also in a pass of their own, which no output of the module announces."""
    both = Both(way)
    x = torch.ones(2, 6, dtype=torch.float64)
    for _ in range(2):
        both.backward()
        for model, inner in ((both.alone, both.alone), (both.model, both.inner)):
            loss = decay(inner) if alone else model(x).square().mean() + decay(inner)
            loss.backward()
        both.step()
    for mine, its in zip(both.inner.parameters(), both.alone.parameters(), strict=True):
        assert (its.grad is None) == (mine.grad is None)
        if its.grad is not None:
            torch.testing.assert_close(mz.full_gradient(mine), its.grad, rtol=1e-9, atol=1e-11)
    both.compare()


@ranks
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_adding_to_a_gradient_without_the_wrapped_module(stage: int) -> None:
    inner = nn.Linear(1, 1, bias=False)
    model, _ = mz.zero(inner, sgd(inner), stage)
    model(torch.ones(1, 1)).sum().backward()
    inner(torch.ones(1, 1)).sum().backward()
    found = mz.full_gradient(inner.weight)
    assert found is not None and found.item() == 2.0


@several_ranks
@pytest.mark.parametrize("way", SHARDED)
def test_one_rank_alone_asks_for_a_gradient(way: dict[str, Any]) -> None:
    both = Both(way)
    both.backward()
    with pytest.raises(mz.MismatchError, match=r"full_gradient\(\)"):
        if both.world.rank == 1:
            mz.full_gradient(both.inner.last.weight)
        else:
            both.step()
