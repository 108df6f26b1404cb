"""What programs do around a backward pass, and what is a pass at all: equal to one process."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm
from torch.utils.checkpoint import checkpoint

import mpizero_torch as mz
import mpizero_torch.horovod as hvd
from support.reference import seeded

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def batch(step: int, rank: int | None = None) -> torch.Tensor:
    return seeded(100 * step + (mz.init().rank if rank is None else rank), 3, 4)


def mean(tensor: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    """Over the ranks, in float64."""
    own = torch.cat(
        [tensor.detach().double().reshape(-1) * weight, torch.tensor([weight]).double()]
    )
    mz.init().allreduce(own)
    return (own[:-1] / own[-1]).reshape(tensor.shape)


def check_mean(plain: nn.Module, model: nn.Module, weight: float = 1.0) -> None:
    """Is each gradient of ``model`` the mean of the ranks' gradients of ``plain``?"""
    for (name, own), (_, ours) in zip(
        plain.named_parameters(), model.named_parameters(), strict=True
    ):
        assert (own.grad is None) == (ours.grad is None), name
        if own.grad is not None and ours.grad is not None:
            torch.testing.assert_close(
                ours.grad.double(), mean(own.grad, weight), rtol=1e-10, atol=1e-13, msg=name
            )


def equal_everywhere(tensor: torch.Tensor) -> bool:
    world = mz.init()
    root = world.broadcast(tensor.detach().clone().contiguous(), 0)
    return all(world.gather_objects(bool(torch.equal(root, tensor.detach().contiguous()))))


def passes(model: Any) -> int:
    return int(model._hooks.steps) if model._hooks is not None else 0


@ranks
def test_a_frozen_module_passes_gradients_on_and_sends_nothing() -> None:
    """A GAN: the discriminator is frozen for the generator's step, in every step."""
    generator, critic = net(0), nn.Linear(2, 1).double()
    g, d = mz.DistributedDataParallel(generator), mz.DistributedDataParallel(critic)
    for step in range(3):
        critic.requires_grad_(False)
        g.zero_grad()
        before = passes(d)
        fake = g(batch(step))
        d(fake).square().mean().backward()
        plain = copy.deepcopy(generator)
        plain.zero_grad()
        critic(plain(batch(step))).square().mean().backward()
        check_mean(plain, generator)
        assert passes(d) == before
        critic.requires_grad_(True)
        d.zero_grad()
        (d(fake.detach()).mean() + d(seeded(step, 3, 2)).square().mean()).backward()
        other = copy.deepcopy(critic)
        other.zero_grad()
        (other(fake.detach()).mean() + other(seeded(step, 3, 2)).square().mean()).backward()
        check_mean(other, critic)


@ranks
def test_layers_that_are_frozen_by_turns_keep_their_places() -> None:
    inner = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).double()
    model = mz.DistributedDataParallel(inner, bucket_cap_mb=1e-4)
    model(batch(0)).square().mean().backward()
    size = model.bucket_bytes
    for step in range(1, 7):
        model.zero_grad()
        for at, layer in enumerate(inner):
            layer.requires_grad_(at == step % 4)
        model(batch(step)).square().mean().backward()
        plain = copy.deepcopy(inner)
        plain.zero_grad()
        plain(batch(step)).square().mean().backward()
        check_mean(plain, inner)
    assert model.bucket_bytes == size


@ranks
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_what_is_unfrozen_later_is_averaged(training: bool) -> None:
    inner = net()
    inner[0].requires_grad_(False)
    model = mz.DistributedDataParallel(inner).train(training)
    model(batch(0)).square().mean().backward()
    assert inner[0].weight.grad is None
    inner[0].requires_grad_(True)
    for step in range(1, 3):
        model.zero_grad()
        model(batch(step)).square().mean().backward()
        plain = copy.deepcopy(inner)
        plain.zero_grad()
        plain(batch(step)).square().mean().backward()
        check_mean(plain, inner)


@ranks
def test_a_frozen_parameter_keeps_its_gradient() -> None:
    """As in one process: who freezes it and does not clear it steps with it again."""
    inner = net()
    model = mz.DistributedDataParallel(inner)
    model(batch(0)).square().mean().backward()
    kept = inner[0].weight.grad
    assert kept is not None
    values = kept.clone()
    inner[0].weight.requires_grad_(False)
    inner[0].bias.grad = inner[2].weight.grad = inner[2].bias.grad = None
    model(batch(1)).square().mean().backward()
    assert inner[0].weight.grad is not None
    assert torch.equal(inner[0].weight.grad, values)


@several_ranks
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_gradient_for_the_input_sends_nothing(training: bool) -> None:
    world = mz.init()
    inner = net()
    model = mz.DistributedDataParallel(inner)
    for step in range(3):
        model.zero_grad()
        model(batch(step)).mean().backward()
        before = passes(model)
        model.train(training)
        if world.rank == step % world.size:  # one rank alone looks at the model
            x = batch(step).requires_grad_(True)
            torch.autograd.grad(model(x).sum(), x)
            model(x).sum().backward(inputs=[x])
        model.train()
        assert passes(model) == before
        plain = copy.deepcopy(inner)
        plain.zero_grad()
        plain(batch(step)).mean().backward()
        check_mean(plain, inner)


class Part(nn.Module):
    """The first so many layers of a net."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor, upto: int) -> torch.Tensor:
        for layer in self.layers[:upto]:
            x = layer(x)
        return x


@several_ranks
def test_a_gradient_for_the_input_sends_nothing_where_no_parameter_lies_behind() -> None:
    """To the engine it looks as a plain backward() does: nothing is left out."""
    world = mz.init()
    inner = net()
    inner[0].requires_grad_(False)
    model = mz.DistributedDataParallel(Part(inner))
    for step in range(3):
        model.zero_grad()
        model(batch(step), upto=3).mean().backward()
        before = passes(model)
        if world.rank == step % world.size:
            x = batch(step).requires_grad_(True)
            model(x, upto=1).sum().backward(inputs=[x])
            assert x.grad is not None
        assert passes(model) == before
        plain = copy.deepcopy(inner)
        plain.zero_grad()
        plain(batch(step)).mean().backward()
        check_mean(plain, inner)


@several_ranks
def test_asking_for_parameters_that_a_rank_does_not_use_is_a_pass() -> None:
    world = mz.init()
    inner = net()
    model = mz.DistributedDataParallel(Part(inner))
    x, last = batch(0).requires_grad_(True), list(inner[2].parameters())
    upto = 1 if world.rank == 0 else 3
    model(x, upto=upto).mean().backward(inputs=[x, *last])
    assert passes(model) == 1
    plain = copy.deepcopy(inner)
    for parameter in plain.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if world.rank != 0:
        plain(batch(0)).mean().backward(inputs=list(plain[2].parameters()))
    check_mean(plain[2], inner[2])
    assert all(parameter.grad is None for parameter in inner[0].parameters())


@ranks
def test_gradients_that_a_program_asks_for_are_its_own() -> None:
    """autograd.grad for parameters: this rank's, whatever the batch weighs."""
    inner = net()
    model = mz.DistributedDataParallel(inner)
    model.weigh(1.0 + 2 * mz.init().rank)
    found = torch.autograd.grad(model(batch(0)).mean(), list(inner.parameters()))
    expected = torch.autograd.grad(inner(batch(0)).mean(), list(inner.parameters()))
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)


@ranks
@pytest.mark.parametrize("weighs", [False, True])
def test_gradient_penalties(weighs: bool) -> None:
    inner = net()
    model = mz.DistributedDataParallel(inner)
    weight = 1.0 + 2 * mz.init().rank if weighs else 1.0

    def loss(of: nn.Module) -> torch.Tensor:
        x = batch(0).requires_grad_(True)
        out = of(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out.mean() + (slope.norm(dim=1) - 1).square().mean()

    for _ in range(2):
        model.zero_grad()
        if weighs:
            model.weigh(weight)
        loss(model).backward()
        plain = copy.deepcopy(inner)
        plain.zero_grad()
        loss(plain).backward()
        check_mean(plain, inner, weight)


@ranks
def test_several_backwards_through_one_graph_and_several_graphs() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    model = mz.DistributedDataParallel(inner)
    for step in range(2):
        model.zero_grad()
        plain = copy.deepcopy(inner)
        plain.zero_grad()
        for of in (model, plain):
            out = of(batch(step))
            out[:, 0].mean().backward(retain_graph=True)
            out[:, 1].square().mean().backward()
        check_mean(plain, inner)
        model.zero_grad()
        plain = copy.deepcopy(inner)
        plain.zero_grad()
        for of in (model, plain):
            one, two = of(batch(step)), of(batch(step + 10))
            one.mean().backward()
            two.square().mean().backward()
        check_mean(plain, inner)
        assert all(equal_everywhere(buffer) for buffer in inner.buffers())


class Branchy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        x = self.always(x)
        return self.sometimes(x) if both else x


@ranks
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_modules_in_one_backward_with_a_parameter_that_one_rank_uses(stage: int) -> None:
    world = mz.init()
    torch.manual_seed(0)
    first, second = Branchy().double(), nn.Linear(4, 4).double()
    plain = copy.deepcopy(nn.ModuleList([first, second]))
    a, optimizer = mz.zero(first, torch.optim.SGD(first.parameters(), lr=0.1), stage=stage)
    b = mz.DistributedDataParallel(second)
    own = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(3):
        both = world.rank == world.size - 1
        a(b(batch(step)), both=both).square().mean().backward()
        optimizer.step()
        own.zero_grad()
        for rank in range(world.size):
            x = plain[1](batch(step, rank))
            out = plain[0](x, both=rank == world.size - 1)
            (out.square().mean() / world.size).backward()
        for mine, theirs in zip(second.parameters(), plain[1].parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-13)
        own.step()
        with torch.no_grad():
            for mine, theirs in zip(second.parameters(), plain[1].parameters(), strict=True):
                mine.copy_(theirs)
        optimizer.zero_grad()
        b.zero_grad()
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, plain[0].state_dict()[name], rtol=1e-10, atol=1e-13)


def by_ddp(inner: nn.Module) -> tuple[Any, torch.optim.Optimizer]:
    model = mz.DistributedDataParallel(inner)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def by_horovod(inner: nn.Module) -> tuple[Any, torch.optim.Optimizer]:
    hvd.init()
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    return inner, hvd.DistributedOptimizer(optimizer, inner.named_parameters())


@ranks
@pytest.mark.parametrize("wrap", [by_ddp, by_horovod])
def test_gradients_that_are_given_other_memory(wrap: Callable[..., Any]) -> None:
    """Clipped by hand through ``.grad.data = ...``, or replaced: the next step's are averages."""
    inner = net()
    model, optimizer = wrap(inner)
    plain = copy.deepcopy(inner)
    own = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        if wrap is by_horovod:
            optimizer.synchronize()
        own.zero_grad()
        for rank in range(mz.init().size):
            (plain(batch(step, rank)).square().mean() / mz.init().size).backward()
        for each in (inner, plain):
            for parameter in each.parameters():
                assert parameter.grad is not None
                if step % 2:
                    parameter.grad = parameter.grad.clamp(-0.1, 0.1)
                else:
                    parameter.grad.data = parameter.grad.data.clamp(-0.1, 0.1)
        if wrap is by_horovod:
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            optimizer.step()
        own.step()
        for mine, theirs in zip(inner.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) @ self.weight


@ranks
@pytest.mark.parametrize("wrap", [by_ddp, by_horovod])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["channels_last", "transposed"])
def test_gradients_lie_as_their_parameters_do(
    wrap: Callable[..., Any], when: str, kind: str
) -> None:
    """Fused optimizers go through the memory of both side by side."""
    torch.manual_seed(0)
    inner: Any = nn.Conv2d(3, 8, 3) if kind == "channels_last" else Transposed()

    def change(module: nn.Module) -> None:
        if kind == "channels_last":
            module.to(memory_format=torch.channels_last)
        elif when == "after":
            module.weight.data = module.weight.data.contiguous()

    if when == "before":
        change(inner)
    plain = copy.deepcopy(inner)
    model, _ = wrap(inner)
    if when == "after":
        change(inner)
        change(plain)
    ours = torch.optim.AdamW(inner.parameters(), lr=0.1, fused=True)
    own = torch.optim.AdamW(plain.parameters(), lr=0.1, fused=True)
    if wrap is by_horovod:
        hvd_optimizer = hvd.DistributedOptimizer(ours, inner.named_parameters())
        ours = hvd_optimizer
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    for of, optimizer in ((model, ours), (plain, own)):
        for _ in range(3):
            optimizer.zero_grad()
            of(x).square().mean().backward()
            optimizer.step()
    assert inner.weight.grad.stride() == inner.weight.stride()
    torch.testing.assert_close(inner.weight, plain.weight, rtol=1e-5, atol=1e-6)


@ranks
@pytest.mark.parametrize("views", [None, False], ids=["by default", "False"])
@pytest.mark.parametrize("take", ["itself", "view", "data", "detach", "numpy"])
def test_gradients_that_a_program_keeps_stay_as_they_were(views: bool | None, take: str) -> None:
    inner = nn.Linear(2, 1, bias=False).double()
    model = mz.DistributedDataParallel(inner, gradient_as_bucket_view=views)

    def taken(gradient: torch.Tensor) -> Any:
        return {
            "itself": lambda: gradient, "view": lambda: gradient.view(-1),
            "data": lambda: gradient.data, "detach": gradient.detach,
            "numpy": gradient.numpy,
        }[take]()  # fmt: skip

    kept = []
    for task in range(1, 5):
        model.zero_grad(set_to_none=True)
        model(torch.full((1, 2), float(task)).double() * (1 + mz.init().rank)).sum().backward()
        assert inner.weight.grad is not None
        kept.append(taken(inner.weight.grad))
    middle = (1 + mz.init().size) / 2
    for task, each in enumerate(kept, 1):
        assert (torch.as_tensor(each) == task * middle).all(), task


@ranks
def test_modules_that_change_their_dtype() -> None:
    """CLIP's loop: to float32 for the optimizer's step, and back; and for good."""
    inner = net().float()
    model = mz.DistributedDataParallel(inner)
    model(batch(0).float()).square().mean().backward()
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float16, 2e-3), (torch.float32, 1e-5)):
        inner.to(dtype)
        for step in range(2):
            model.zero_grad()
            plain = copy.deepcopy(inner)
            plain.zero_grad()
            for of in (model, plain):
                of(batch(step).to(dtype)).square().mean().backward()
            for mine, theirs in zip(inner.parameters(), plain.parameters(), strict=True):
                assert mine.grad is not None
                assert theirs.grad is not None
                assert mine.grad.dtype == dtype
                expected = mean(theirs.grad)
                torch.testing.assert_close(
                    mine.grad.double(), expected, rtol=tolerance, atol=tolerance / 10
                )
            for parameter in inner.parameters():  # to float32, and back
                assert parameter.grad is not None
                parameter.data = parameter.data.float()
                parameter.grad.data = parameter.grad.data.float()
            inner.to(dtype)


class Codebook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("codes", torch.randn(6, 4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = batch_norm(self.layer(x), self.mean, self.variance, training=self.training)
        self.codes.data[0] = 0.9 * self.codes.data[0] + 0.1 * z.detach().mean(0)
        return z + self.codes[0].detach()


@several_ranks
def test_buffers_that_are_written_without_torchs_count() -> None:
    torch.manual_seed(0)
    inner = Codebook().double()
    model = mz.DistributedDataParallel(inner)
    for step in range(4):
        model(batch(step)).square().mean().backward()
        assert all(equal_everywhere(buffer) for buffer in inner.buffers())
    sent = []
    broadcast = model._buffers_in_sync.broadcast
    model._buffers_in_sync.broadcast = lambda *given: sent.append(broadcast(*given))
    inner.forward = lambda x: inner.layer(x)  # writes to none of them
    model(batch(9)).square().mean().backward()
    assert not sent


@several_ranks
@pytest.mark.parametrize("with_optimizer", [False, True])
def test_join_with_several_passes_to_a_step(with_optimizer: bool) -> None:
    world = mz.init()
    inner = net()
    model = mz.DistributedDataParallel(inner)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with model.join(optimizer if with_optimizer else None):
        for step in range(2 + world.rank):
            optimizer.zero_grad()
            model(batch(step)).mean().backward()
            model(batch(step + 50)).square().mean().backward()
            optimizer.step()
    mz.assert_in_sync(model, optimizer if with_optimizer else None)


@several_ranks
@pytest.mark.parametrize("stage", [1, 2])
def test_join_of_sharded_training_follows_the_loops_that_go_on(stage: int) -> None:
    """Two passes to a step, gradients kept over a step, a learning rate that falls."""
    world = mz.init()
    inner = net()
    plain = copy.deepcopy(inner)
    model, optimizer = mz.zero(inner, torch.optim.SGD(inner.parameters(), lr=0.1), stage=stage)
    rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with model.join(optimizer):
        for step in range(1 + world.rank):
            if step != 2:
                optimizer.zero_grad()
            model(batch(step)).mean().backward()
            model(batch(step + 50)).square().mean().backward()
            optimizer.step()
            rates.step()
    own = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(world.size):
        if step != 2:
            own.zero_grad()
        active = range(step, world.size)
        for rank in active:
            (plain(batch(step, rank)).mean() / len(active)).backward()
            (plain(batch(step + 50, rank)).square().mean() / len(active)).backward()
        own.step()
        own.param_groups[0]["lr"] *= 0.5
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-10, atol=1e-13)


def _assign(model: Any, inner: Any) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "load_state_dict(assign=True)": _assign,
    "a new head": lambda model, inner: inner.__setitem__(2, nn.Linear(8, 2).double()),
    "weight_norm": lambda model, inner: nn.utils.parametrizations.weight_norm(inner[0]),
    "a further parameter": lambda model, inner: inner[0].register_parameter(
        "more", nn.Parameter(torch.ones(3))
    ),
}


@ranks
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_parameters_that_come_later_are_refused_by_name(change: str, training: bool) -> None:
    inner = net()
    model = mz.DistributedDataParallel(inner).train(training)
    model(batch(0)).mean().backward()
    CHANGES[change](model, inner)
    if mz.init().size == 1:  # whose gradients are all there are
        model(batch(0)).mean().backward()
        return
    with pytest.raises(mz.ArgumentError, match="was added or replaced after it was wrapped"):
        model(batch(0))


@ranks
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_hooks_on_gradients_see_the_average(first: bool) -> None:
    """An optimizer for each parameter, which takes its step as soon as the gradient is there."""
    world = mz.init()
    inner = net()
    plain = copy.deepcopy(inner)

    def install(module: nn.Module) -> list[Any]:
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in module.parameters()}

        def step(parameter: torch.Tensor) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        return [p.register_post_accumulate_grad_hook(step) for p in module.parameters()]

    handles = install(inner) if first else []
    model = mz.DistributedDataParallel(inner)
    handles = handles or install(inner)
    for step in range(3):
        model(batch(step)).square().mean().backward()
        grads = [torch.zeros_like(p) for p in plain.parameters()]
        for rank in range(world.size):
            loss = plain(batch(step, rank)).square().mean() / world.size
            for total, each in zip(
                grads, torch.autograd.grad(loss, list(plain.parameters())), strict=True
            ):
                total += each
        with torch.no_grad():
            for parameter, gradient in zip(plain.parameters(), grads, strict=True):
                parameter -= 0.1 * gradient
        for mine, theirs in zip(inner.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)
    for handle in handles:
        handle.remove()
    before = [parameter.detach().clone() for parameter in inner.parameters()]
    model(batch(9)).square().mean().backward()
    for mine, theirs in zip(inner.parameters(), before, strict=True):
        assert torch.equal(mine, theirs)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


class Slotted:
    __slots__ = ("logits",)

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class Checkpointed(nn.Module):
    def __init__(self, returns: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.returns = returns

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = checkpoint(lambda y, f=layer: torch.tanh(f(y)), x, use_reentrant=True)
        return self.returns(x)


RETURNS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "dataclass": (Output, lambda out: out.logits),
    "slots": (Slotted, lambda out: out.logits),
    "list in a dict": (lambda x: {"all": [Output(x)]}, lambda out: out["all"][0].logits),
    "distribution": (lambda x: torch.distributions.Normal(x, 1.0), lambda out: out.loc),
}


@ranks
@pytest.mark.parametrize("returns", RETURNS)
def test_one_backward_through_nested_runs_is_one_pass(returns: str) -> None:
    torch.manual_seed(0)
    make, read = RETURNS[returns]
    inner = Checkpointed(make).double()
    model = mz.DistributedDataParallel(inner)
    for step in range(2):
        model.zero_grad()
        before = passes(model)
        x = batch(step).requires_grad_(True)
        model.weigh(1.0 + mz.init().rank)
        read(model(x)).square().mean().backward()
        assert passes(model) == before + 1
        plain = copy.deepcopy(inner)
        plain.zero_grad()
        read(plain(x)).square().mean().backward()
        check_mean(plain, inner, 1.0 + mz.init().rank)


@several_ranks
def test_outputs_that_cannot_be_seen_are_refused_where_they_matter() -> None:
    torch.manual_seed(0)
    inner = Checkpointed(lambda x: lambda: x).double()
    model = mz.DistributedDataParallel(inner)
    loss = model(batch(0).requires_grad_(True))().square().mean()
    with pytest.raises(mz.MpizeroError, match="use_reentrant"):
        loss.backward()


class Itself(nn.Module):
    """Returns its parameter beside what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3).double())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x * self.weight).sum(), self.weight


@ranks
def test_a_parameter_that_forward_returns_gets_no_hook() -> None:
    inner = Itself()
    model = mz.DistributedDataParallel(inner)
    for step in range(5):
        model.zero_grad()
        out, weight = model(seeded(step + mz.init().rank, 3))
        (out + weight.square().sum()).backward()
    assert not inner.weight._backward_hooks


def _weights() -> Iterator[float]:
    yield from (8192.0, 40000.0)


@ranks
@pytest.mark.parametrize("weight", list(_weights()))
def test_stated_weights_beyond_the_range_of_16_bits(weight: float) -> None:
    rank = mz.init().rank
    inner = nn.Linear(4, 1, bias=False).half()
    model = mz.DistributedDataParallel(inner)
    for accumulated in (False, True):
        model.zero_grad()
        own = weight * (1 + rank)
        if accumulated:
            with model.no_sync():
                model.weigh(own)
                model(torch.full((2, 4), 2.0 + rank).half()).sum().backward()
        model.weigh(own)
        model(torch.full((2, 4), 2.0 + rank).half()).sum().backward()
        ranks = range(mz.init().size)
        total = sum(1 + r for r in ranks)
        # Stated weights: a mean over passes, too, which are alike here.
        expected = sum((1 + r) * 2 * (2.0 + r) for r in ranks) / total
        assert inner.weight.grad is not None
        # Rounded when it is scaled, and once more at the end: 2^-11 each.
        assert inner.weight.grad[0, 0].item() == pytest.approx(expected, rel=1.1e-3)
