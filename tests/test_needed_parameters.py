"""Stage 3: parameters that are needed where no hook on a module's output would tell.

Whatever a model or a loop does with its parameters, n ranks learn what one process learns; where
parameters are sharded, nobody ever reads memory that has been given back.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import mpizero_torch as mz
from support.placements import Placement, placed

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])

PRIVATE = {"stage": 3, "share_parameters": False, "segment_mb": 0.002}
WAYS = [
    pytest.param({"stage": 0}, id="0"),
    pytest.param({"stage": 1, "segment_mb": 0.002}, id="1"),
    pytest.param({"stage": 2, "segment_mb": 0.002}, id="2"),
    pytest.param({"stage": 3, "segment_mb": 0.002}, id="3"),
    pytest.param(PRIVATE, id="3 private"),
    pytest.param({"stage": 3, "share_parameters": False}, id="3 private, one unit"),
]
SHARDED = WAYS[4:]
PER_RANK, WIDTH = 2, 16

Step = Callable[[Any, torch.Tensor, torch.Tensor], None]


def mse(model: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    functional.mse_loss(model(x), y).backward()


class Base(nn.Module):
    """Two layers, and between them what those that derive do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 32), nn.Linear(32, 8)

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.between(torch.tanh(self.first(x))))


class Gives(nn.Module):
    """A module that gives away a parameter: as it is, or a view of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.randn(PER_RANK * 4, 32) * 0.1)

    def forward(self, count: int) -> Any:
        views = {
            "whole": lambda: self.weight,
            "a view": lambda: self.weight[:count],
            "in a dict": lambda: {"prompts": [self.weight[:count]]},
            "a column": lambda: self.weight.t()[:, :count].t(),
            "a token": lambda: self.weight[:1].expand(count, -1),
        }
        return views[self.how]()


class GivesAway(Base):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.position, self.scale = Gives(how), Gives(how)

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        taken = [self.position(len(hidden)), self.scale(len(hidden))]
        add, times = (each["prompts"][0] if isinstance(each, dict) else each for each in taken)
        return hidden * (1 + times[: len(hidden)]) + add[: len(hidden)]


@dataclass
class Out:
    hidden: torch.Tensor


class OwnOut:
    def __init__(self, hidden: torch.Tensor) -> None:
        self.kept = hidden


class Block(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind
        self.linear, self.scale = nn.Linear(32, 32), nn.Parameter(torch.ones(32) * 1.1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.kind(torch.tanh(self.linear(x)) * self.scale)


class ReturnsObjects(Base):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(kind) for _ in range(2)])

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            found = vars(block(hidden))
            hidden = next(iter(found.values()))
        return hidden


class ChecksPointsAMethod(Base):
    """A checkpoint of a method, which uses parameters by name."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.inner, self.own = nn.Linear(32, 32), nn.Parameter(torch.randn(32, 32) * 0.1)

    def mixed(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = functional.linear(hidden, self.inner.weight, self.inner.bias)
        return torch.tanh(hidden @ self.own) * self.own[0]

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        found: Any = checkpoint(self.mixed, hidden, use_reentrant=self.reentrant)
        return found


class PenaltyWithin(Base):
    def forward(self, x: torch.Tensor) -> Any:
        penalty = sum(each.pow(2).sum() for each in self.parameters())
        return super().forward(x) + 1e-2 * penalty


class Doubled(torch.autograd.Function):
    """Keeps a weight in both ways in which functions keep things."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight = weight
        return x * weight * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return gradient * (weight + ctx.weight), (gradient * x * 2).sum(0)


class OwnFunction(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 32))

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = Doubled.apply(hidden, self.scale)  # type: ignore[no-untyped-call]
        return found


class Repeated(Base):
    """The same module several times."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(32, 32)

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            hidden = torch.tanh(self.mix(hidden))
        return hidden


class Forces(Base):
    """A forward that differentiates: by its input, and by hidden values."""

    def forward(self, x: torch.Tensor) -> Any:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = super().forward(x).tanh()
            (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy + force[:, :8]


def plainly(model: Any) -> Any:
    """The module with the parts, of a wrapped model or a plain one."""
    return model.module if isinstance(model, mz.wrapper.DistributedModule) else model


def two_backwards(model: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    out = model(x)
    functional.mse_loss(out, y).backward(retain_graph=True)
    out.abs().mean().backward()


def gradient_penalty(model: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    x = x.clone().requires_grad_()
    out = model(x)
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (functional.mse_loss(out, y) + ((gradient.norm(dim=1) - 1) ** 2).mean()).backward()


def adaptive_weight(model: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    loss = functional.mse_loss(model(x), y)
    last = plainly(model).last.weight
    (by_keyword,) = torch.autograd.grad(outputs=loss, inputs=[last], retain_graph=True)
    (by_place,) = torch.autograd.grad(loss, last, retain_graph=True)
    torch.testing.assert_close(by_keyword, by_place, rtol=0, atol=0)
    loss.backward()


def penalty_in_the_loop(model: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    penalty = sum(each.pow(2).sum() for each in model.parameters())
    together = torch.stack([each.norm() for each in model.parameters()]).sum()
    (functional.mse_loss(model(x), y) + 1e-2 * (penalty + together)).backward()


def penalty_after_forward(model: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    loss = functional.mse_loss(model(x), y)
    flat = torch.cat([each.reshape(-1) for each in plainly(model).parameters()])
    (loss + 1e-2 * flat.pow(2).sum()).backward()


def fused_loss(model: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    inner = plainly(model)
    hidden = torch.tanh(inner.first(x))
    out = functional.linear(input=hidden, weight=inner.last.weight) + inner.last.bias
    functional.mse_loss(out, y).backward()


def parts_by_hand(model: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    inner = plainly(model)
    parts = nn.Sequential(inner.first, nn.Tanh(), inner.last)
    functional.mse_loss(parts(x), y).backward()


def called_functionally(model: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    inner = plainly(model)
    out = functional_call(inner, dict(inner.named_parameters()), (x,))
    other = functional_call(inner, {k: v * 0.5 for k, v in inner.named_parameters()}, (x,))
    functional.mse_loss(out + other, y).backward()


def loss_in_gathered(model: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    hidden = torch.tanh(plainly(model).first(x))
    with mz.gathered(model) as inner:
        loss = functional.mse_loss(functional.linear(hidden, inner.last.weight), y)
        loss = loss + 0 * inner.last.bias.sum()
    loss.backward()


def all_in_gathered(model: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    with mz.gathered(model) as inner:
        functional.mse_loss(inner(x), y).backward()


def kept_on_the_host(model: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    with torch.autograd.graph.save_on_cpu():
        loss = functional.mse_loss(model(x), y)
    loss.backward()


def hooks_that_keep_all(model: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        loss = functional.mse_loss(model(x), y)
    loss.backward()


def checkpointed_from_outside(model: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    inner = plainly(model)
    hidden: Any = checkpoint(inner.first, x, use_reentrant=False)
    functional.mse_loss(inner.last(torch.tanh(hidden)), y).backward()


def evaluated_before(model: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    for _ in range(2):
        model(x)
        with torch.no_grad():
            model(x)
    mse(model, x, y)


def with_a_hook_that_looks(model: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    """In backward somebody reads the weights of another part."""
    out = model(x)
    first = plainly(model).first.weight
    out.register_hook(lambda gradient: gradient * (1 + first.detach().abs().mean()))
    functional.mse_loss(out, y).backward()


class KeptByOthers(Base):
    """What autograd saves of a frozen layer is kept by somebody else, who keeps what is given."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.norm = how, nn.LayerNorm(32).requires_grad_(False)

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.how == "checkpoint":
            found: Any = checkpoint(self.norm, hidden, use_reentrant=False)
            return torch.tanh(found)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            return torch.tanh(self.norm(hidden))


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"gives {how}": lambda how=how: GivesAway(how)  # type: ignore[misc]
        for how in ("whole", "a view", "in a dict", "a column", "a token")
    },
    "dataclass": lambda: ReturnsObjects(Out),
    "object": lambda: ReturnsObjects(OwnOut),
    "method, reentrant": lambda: ChecksPointsAMethod(True),
    "method": lambda: ChecksPointsAMethod(False),
    "penalty": PenaltyWithin,
    "function": OwnFunction,
    "repeated": Repeated,
    **{
        f"frozen, kept by {how}": lambda how=how: KeptByOthers(how)  # type: ignore[misc]
        for how in ("checkpoint", "hooks")
    },
    "forces": Forces,
}
STEPS: list[Step] = [
    two_backwards, gradient_penalty, adaptive_weight, penalty_in_the_loop, penalty_after_forward,
    fused_loss, parts_by_hand, called_functionally, loss_in_gathered, all_in_gathered,
    kept_on_the_host, hooks_that_keep_all, checkpointed_from_outside, evaluated_before,
    with_a_hook_that_looks,
]  # fmt: skip


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def batch(step: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(step)
    x, y = torch.randn(count, WIDTH, generator=drawn), torch.randn(count, 8, generator=drawn)
    return x.double(), y.double()


def built(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    return build().double()


def assert_learns_the_same(
    build: Callable[[], nn.Module], step: Step, way: dict[str, Any], world: Any = None
) -> Any:
    """Each rank takes its part, and one process all of them in turn."""
    world = world or mz.init()
    alone, inner = built(build), built(build)
    its = sgd(alone)
    model, optimizer = mz.zero(inner, sgd(inner), world=world, **way)
    for number in range(2):
        x, y = batch(number, world.size * PER_RANK)
        its.zero_grad()
        optimizer.zero_grad()
        for rank in range(world.size):
            part = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
            step(alone, x[part], y[part])
        for parameter in alone.parameters():
            if parameter.grad is not None:
                parameter.grad /= world.size
        own = slice(world.rank * PER_RANK, (world.rank + 1) * PER_RANK)
        step(model, x[own], y[own])
        its.step()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-9, atol=1e-11, msg=name)
    return model


@ranks
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_models_that_use_parameters_in_their_own_ways(way: dict[str, Any], kind: str) -> None:
    model = assert_learns_the_same(MODELS[kind], mse, way)
    if way.get("share_parameters") is False:
        assert model.gathered_bytes == 0


@ranks
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_loops_that_use_parameters_in_their_own_ways(way: dict[str, Any], step: Step) -> None:
    if step is all_in_gathered and way["stage"] == 0:
        pytest.skip("the inner module is no replica")
    model = assert_learns_the_same(Base, step, way)
    if way.get("share_parameters") is False:
        gc.collect()
        model.optimizer.zero_grad()
        model(batch(0, 2)[0])
        assert model.gathered_bytes == 0


@pytest.mark.parallel([2, 4])
def test_the_same_where_gathering_takes_messages() -> None:
    names = "AB" if mz.init().size == 2 else "ABBA"
    with placed(Placement(names, tuple(range(len(names))))) as world:
        for build in MODELS.values():
            assert_learns_the_same(build, mse, PRIVATE, world)
        for step in STEPS:
            assert_learns_the_same(Base, step, PRIVATE, world)


def private(build: Callable[[], nn.Module] = Base, **more: Any) -> tuple[Any, Any]:
    inner = built(build)
    return mz.zero(inner, sgd(inner), **{**PRIVATE, **more})


class Marked(torch.autograd.Function):
    """Tells whether the graph that it is part of is still there."""

    alive: ClassVar[list[weakref.ref[Any]]] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        Marked.alive.append(weakref.ref(ctx))
        output = x.clone()
        ctx.save_for_backward(x, output)  # as tanh and others do
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return gradient


class Marking(Base):
    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = Marked.apply(hidden)  # type: ignore[no-untyped-call]
        return found


@ranks
@pytest.mark.parametrize("way", SHARDED)
def test_forwards_without_a_backward_keep_nothing(way: dict[str, Any]) -> None:
    inner = built(Marking)
    model, _ = mz.zero(inner, sgd(inner), **way)
    Marked.alive.clear()
    for step in range(3):
        x, _ = batch(step, PER_RANK)
        model(x).sum().item()
        model(x.requires_grad_()).sum().item()
    assert [each() for each in Marked.alive] == [None] * 6
    assert model.gathered_bytes == 0


@ranks
def test_a_view_that_outlives_its_forward_sees_what_one_process_would() -> None:
    class Keeps(Base):
        def between(self, hidden: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.kept = [self.last.weight[:3], self.first.weight.detach().numpy()]
            return hidden

    model, optimizer = private(Keeps)
    x, y = batch(0, PER_RANK)
    for _ in range(2):
        mse(model, x, y)
        with mz.gathered(model) as inner:
            torch.testing.assert_close(inner.kept[0], inner.last.weight[:3], rtol=0, atol=0)
        optimizer.step()
        optimizer.zero_grad()
        whole = model.state_dict()
        torch.testing.assert_close(model.module.kept[0], whole["last.weight"][:3], rtol=0, atol=0)
        found = torch.from_numpy(model.module.kept[1])
        torch.testing.assert_close(found, whole["first.weight"], rtol=0, atol=0)
    model.module.kept = []
    del found
    model.module.first(x)
    assert model.gathered_bytes == 0


@ranks
@pytest.mark.parametrize("way", SHARDED)
def test_a_graph_older_than_the_parameters_is_refused(way: dict[str, Any]) -> None:
    inner = built(Base)
    model, optimizer = mz.zero(inner, sgd(inner), **way)
    x, y = batch(0, PER_RANK)
    loss = functional.mse_loss(model(x), y)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@ranks
def test_activations_written_to_after_they_were_saved_are_refused() -> None:
    class Writes(Base):
        def between(self, hidden: torch.Tensor) -> torch.Tensor:
            found = hidden.exp()
            found.add_(1)
            return found

    model, _ = private(Writes)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mse(model, *batch(0, PER_RANK))


@several_ranks
@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.data,
        lambda weight: weight.detach_().add_(1),
        lambda weight: nn.init.normal_(tensor=weight),
        lambda weight: nn.init.constant_(weight, val=1.0),
        lambda weight: torch._foreach_mul_([weight], 0.5),
        lambda weight: torch.mul(weight, 2, out=weight),
        lambda weight: weight.__setitem__(0, 1.0),
        lambda weight: setattr(weight, "data", torch.zeros(32, WIDTH)),
    ],
    ids=["data", "in place", "init", "keyword", "list", "out", "item", "set"],
)
def test_writes_that_would_be_lost_are_refused(write: Callable[[Any], Any]) -> None:
    model, _ = private()
    before = model.state_dict()["first.weight"]
    with torch.no_grad(), pytest.raises(mz.MpizeroError, match=r"modify=True"):
        write(model.module.first.weight)
    torch.testing.assert_close(model.state_dict()["first.weight"], before, rtol=0, atol=0)


@several_ranks
def test_writes_within_a_forward_are_refused() -> None:
    class Clips(Base):
        def between(self, hidden: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.last.weight.clamp_(-0.01, 0.01)
            return hidden

    model, _ = private(Clips)
    with pytest.raises(mz.MpizeroError, match=r"written to.*modify=True"):
        model(batch(0, PER_RANK)[0])


@ranks
def test_values_are_there_for_who_asks() -> None:
    """On one node a rank may even ask alone."""
    world = mz.init()
    model, _ = private()
    whole = model.state_dict()
    weight = model.module.first.weight
    assert weight.shape == (32, WIDTH) and "sharded" in repr(weight)
    if world.rank == 0:
        expected = whole["first.weight"]
        views = [weight.detach(), weight.T.t(), weight[:], weight.view(-1).view(32, -1)]
        for found in [*views, torch.stack([weight])[0], weight + 0]:
            torch.testing.assert_close(found.detach(), expected, rtol=0, atol=0)
        assert weight.sum().item() == pytest.approx(expected.sum().item())
        vector = nn.utils.parameters_to_vector(model.parameters())
        every = nn.utils.parameters_to_vector(whole.values())
        torch.testing.assert_close(vector.detach(), every, rtol=0, atol=0)
    world.barrier()


@ranks
def test_copies_made_in_gathered_are_plain_modules() -> None:
    model, optimizer = private()
    with pytest.raises(mz.MpizeroError, match="gathered"):
        copy.deepcopy(model.module)
    with mz.gathered(model) as inner:
        copied = copy.deepcopy(inner)
        loaded = pickle.loads(pickle.dumps(inner))
    x, y = batch(0, PER_RANK)
    with torch.no_grad():
        expected = model(x)
    mse(model, x, y)
    optimizer.step()
    for other in (copied, loaded):
        assert not any(type(part._parameters) is not dict for part in other.modules())
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        its = sgd(other)
        mse(other, x, y)
        its.step()
    assert model.gathered_bytes == 0


@ranks
def test_transforms_of_torch_func() -> None:
    model, _ = private()
    alone = built(Base)
    x, y = batch(0, PER_RANK)

    def gradients(inner: nn.Module) -> Any:
        def loss(parameters: Any) -> torch.Tensor:
            return functional.mse_loss(functional_call(inner, parameters, (x,)), y)

        return torch.func.grad(loss)(dict(inner.named_parameters()))

    ours, theirs = gradients(model.module), gradients(alone)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-11)
    del ours, theirs
    gc.collect()
    model(x)
    assert model.gathered_bytes == 0


class Experts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        which = (hidden[:, 0].abs() * 100).long() % 4
        out = torch.zeros_like(hidden)
        for at, expert in enumerate(self.experts):
            if (which == at).any():
                out[which == at] = expert(hidden[which == at])
        return hidden + out


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_modules_that_some_ranks_call(way: dict[str, Any]) -> None:
    assert_learns_the_same(Experts, mse, way)


class MoE(nn.Module):
    """Experts for each sample: some ranks call none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor) -> Any:
        out = torch.zeros_like(hidden, requires_grad=False)
        for at, expert in enumerate(self.experts):
            if (chosen == at).any():
                out = out.index_add(0, (chosen == at).nonzero()[:, 0], expert(hidden[chosen == at]))
        return out


class Routed(Base):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MoE() for _ in range(2)])

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            chosen = (hidden[:, 0].abs() * 100).long() % 6  # of which two are nobody
            hidden = hidden + layer(hidden, chosen)
        return hidden


@pytest.mark.parallel([2, 4])
def test_experts_over_several_nodes() -> None:
    names = "AB" if mz.init().size == 2 else "ABCA"
    with placed(Placement(names, tuple(range(len(names))))) as world:
        model = assert_learns_the_same(Routed, mse, {**PRIVATE, "whole": [MoE]}, world)
        assert model.gathered_bytes == 0


@ranks
def test_what_is_whole_is_of_the_model() -> None:
    for wrong in ([nn.Conv2d], [nn.Linear(2, 2)], MoE, ["experts"]):
        with pytest.raises(mz.ArgumentError, match="whole"):
            private(whole=wrong)
