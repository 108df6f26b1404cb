"""What users do with a sharded model and its optimizer, beside plain training."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import mpizero_torch as mz
from support.models import KINDS, loss

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])

KIND = next(kind for kind in KINDS if kind.name == "transformer")
STAGES = [
    pytest.param({"stage": 1}, id="1"),
    pytest.param({"stage": 2}, id="2"),
    pytest.param({"stage": 3}, id="3"),
    pytest.param({"stage": 3, "share_parameters": False}, id="3 private"),
]
PER_RANK = 2


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def pair(
    way: dict[str, Any],
    build: Callable[[], nn.Module] = lambda: KIND.build(torch.float64),
    make: Callable[[Any], Any] = adamw,
) -> tuple[Any, Any, Any, Any]:
    """A plain model and optimizer, and sharded ones."""
    alone, plain = build(), build()
    its = make(alone.parameters())
    model, optimizer = mz.zero(plain, make(plain.parameters()), segment_mb=0.002, **way)
    return alone, its, model, optimizer


def backward(alone: Any, model: Any, step: int) -> None:
    """One process takes the whole batch, each rank its part."""
    world = mz.init()
    x, y = KIND.batch(world.size * PER_RANK, step)
    own = slice(world.rank * PER_RANK, (world.rank + 1) * PER_RANK)
    loss(alone, x, y).backward()
    loss(model, x[own], y[own]).backward()


def train(alone: Any, its: Any, model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        for each in (its, optimizer):
            each.zero_grad()
        backward(alone, model, step)
        for each in (its, optimizer):
            each.step()


def assert_same(model: Any, alone: Any) -> None:
    ours, theirs = model.state_dict(), alone.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-7, atol=1e-9, msg=name)


@ranks
@pytest.mark.parametrize("way", STAGES)
def test_the_optimizer_is_a_torch_optimizer(way: dict[str, Any]) -> None:
    alone, its, model, optimizer = pair(way)
    assert isinstance(optimizer, torch.optim.Optimizer)
    schedules = [torch.optim.lr_scheduler.StepLR(each, 2, 0.5) for each in (its, optimizer)]
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    for step in range(4):
        its.zero_grad(set_to_none=False)
        optimizer.zero_grad(set_to_none=False)
        backward(alone, model, step)
        its.step()
        assert optimizer.step(lambda: torch.tensor(3.0)).item() == 3.0
        for schedule in schedules:
            schedule.step()
    assert calls == ["before", "after"] * 4
    assert optimizer.param_groups[0]["lr"] == its.param_groups[0]["lr"] == 1e-3 / 4
    assert_same(model, alone)


@ranks
@pytest.mark.parametrize("way", STAGES)
def test_whole_state_goes_to_plain_ones_and_back(way: dict[str, Any]) -> None:
    world = mz.init()
    alone, its, model, optimizer = pair(way)
    train(alone, its, model, optimizer, range(3))
    root = world.size - 1
    on_root = model.state_dict(root=root), optimizer.state_dict(root=root)
    state, optimizer_state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    if world.rank == root:
        assert on_root[0].keys() == state.keys()
        assert on_root[1]["state"].keys() == optimizer_state["state"].keys()
    else:
        assert not on_root[0] and not on_root[1]["state"]
    # Plain ones go on from there as those that were never sharded.
    plain = KIND.build(torch.float64)
    plain_optimizer = adamw(plain.parameters())
    plain.load_state_dict(state)
    plain_optimizer.load_state_dict(copy.deepcopy(optimizer_state))
    # So do sharded ones of another kind, and an optimizer that has state when it is sharded.
    other = KIND.build(torch.float64)
    other, other_optimizer = mz.zero(
        other, adamw(other.parameters()), stage=1, partition="parameter"
    )
    other.load_state_dict(state)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer_state))
    late = copy.deepcopy(plain)
    late_optimizer = adamw(late.parameters())
    late_optimizer.load_state_dict(copy.deepcopy(optimizer_state))
    late, late_optimizer = mz.zero(late, late_optimizer, **way)
    train(alone, its, model, optimizer, range(3, 6))
    for resumed, its_optimizer in ((other, other_optimizer), (late, late_optimizer)):
        train(plain, plain_optimizer, resumed, its_optimizer, range(3, 6))
        assert_same(resumed, alone)
        plain.load_state_dict(state)
        plain_optimizer.load_state_dict(copy.deepcopy(optimizer_state))
    assert_same(model, alone)


@ranks
@pytest.mark.parametrize("way", STAGES)
def test_freezing_unfreezing_and_further_groups(way: dict[str, Any]) -> None:
    def make(parameters: Any) -> Any:
        return torch.optim.AdamW(list(parameters)[4:], lr=1e-3)

    alone, its, model, optimizer = pair(way, make=make)
    train(alone, its, model, optimizer, range(2))
    for each in (alone, model.module):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("blocks.0" not in name)
    train(alone, its, model, optimizer, range(2, 4))
    for each, optim in ((alone, its), (model.module, optimizer)):
        optim.zero_grad()
        for parameter in each.parameters():
            parameter.requires_grad_(True)
        optim.add_param_group({"params": list(each.parameters())[:4], "lr": 1e-2})
    train(alone, its, model, optimizer, range(4, 7))
    assert_same(model, alone)
    assert len(optimizer.state_dict()["param_groups"]) == 2
    with pytest.raises(mz.ArgumentError, match="params"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


@ranks
@pytest.mark.parametrize("way", STAGES)
def test_training_a_few_parameters_only(way: dict[str, Any]) -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = KIND.build(torch.float64).requires_grad_(False)
            self.down = nn.Linear(17, 2, bias=False, dtype=torch.float64)
            self.up = nn.Linear(2, 17, bias=False, dtype=torch.float64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.base(x)
            return out + self.up(self.down(out))

    def build() -> nn.Module:
        torch.manual_seed(4)
        return Adapted()

    def few(parameters: Any) -> Any:
        return adamw([parameter for parameter in parameters if parameter.requires_grad])

    alone, its, model, optimizer = pair(way, build, few)
    train(alone, its, model, optimizer, range(4))
    assert_same(model, alone)


@ranks
@pytest.mark.parametrize("way", STAGES)
def test_a_parameter_used_outside_its_module(way: dict[str, Any]) -> None:
    class Borrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(17, 16)
            self.mix = nn.Linear(16, 16)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            hidden = torch.tanh(self.mix(self.embed(tokens)))
            return functional.linear(hidden, self.embed.weight)

    def build() -> nn.Module:
        torch.manual_seed(4)
        return Borrowing().double()

    alone, its, model, optimizer = pair(way, build)
    train(alone, its, model, optimizer, range(4))
    assert_same(model, alone)


@ranks
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", STAGES)
def test_activation_checkpointing(way: dict[str, Any], reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = KIND.build(torch.float64)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.inner.embed(tokens) + self.inner.position
            for block in self.inner.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.inner.head(x)

    alone, its, model, optimizer = pair(way, Checkpointed)
    train(alone, its, model, optimizer, range(4))
    assert_same(model, alone)


@ranks
@pytest.mark.parametrize("way", STAGES)
def test_torch_compile_of_the_inner_module(way: dict[str, Any]) -> None:
    alone = KIND.build(torch.float64)
    its = adamw(alone.parameters())
    plain = KIND.build(torch.float64)
    inner_optimizer = adamw(plain.parameters())
    compiled: Any = torch.compile(plain, backend="aot_eager")
    if way.get("share_parameters") is False:
        with pytest.raises(mz.ArgumentError, match=r"torch\.compile"):
            mz.zero(compiled, inner_optimizer, **way)
        return
    model, optimizer = mz.zero(compiled, inner_optimizer, **way)
    train(alone, its, model, optimizer, range(3))
    for ours, theirs in zip(model.state_dict().values(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@ranks
@pytest.mark.parametrize("way", STAGES)
def test_evaluation_between_everything(way: dict[str, Any]) -> None:
    alone, its, model, optimizer = pair(way)
    x, _ = KIND.batch(3, 99)
    for step in range(3):
        its.zero_grad()
        optimizer.zero_grad()
        backward(alone, model, step)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                torch.testing.assert_close(model(x), alone(x), rtol=1e-9, atol=1e-9)
        its.step()
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(model(x), alone(x), rtol=1e-9, atol=1e-9)


@ranks
@pytest.mark.parametrize("way", STAGES)
def test_two_models_and_two_optimizers(way: dict[str, Any]) -> None:
    """A generator and a discriminator: gradients for one flow through the other."""
    world = mz.init()

    def build(seed: int) -> Callable[[], nn.Module]:
        def made() -> nn.Module:
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double()

        return made

    makers = pair(way, build(1)), pair(way, build(2))
    plain = [(g[0], g[1]) for g in makers]
    sharded = [(g[2], g[3]) for g in makers]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(world.size * 2, 6, generator=generator, dtype=torch.float64)
        part = slice(2 * world.rank, 2 * world.rank + 2)
        for nets, z in ((plain, noise), (sharded, noise[part])):
            (g, g_optimizer), (d, d_optimizer) = nets
            fake, real = g(z), z.flip(1)
            d_optimizer.zero_grad()
            # Two forwards of the discriminator before its backward.
            (d(fake.detach()).square().mean() - d(real).mean()).backward()
            d_optimizer.step()
            g_optimizer.zero_grad()
            d(fake).mean().backward()
            g_optimizer.step()
    for (alone, _), (model, _) in zip(plain, sharded, strict=True):
        assert_same(model, alone)


@several_ranks
@pytest.mark.parametrize("way", STAGES)
@pytest.mark.parametrize("unscale", [True, False])
def test_a_grad_scaler_skips_on_all_ranks(way: dict[str, Any], unscale: bool) -> None:
    world = mz.init()
    _alone, _its, model, optimizer = pair(way)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    before = model.state_dict()["head.weight"].clone()
    for step in range(4):
        x, y = KIND.batch(PER_RANK, 10 * step + world.rank)
        value = loss(model, x, y)
        if step == 0 and world.rank == 1:
            value = value * float("inf")
        optimizer.zero_grad()
        scaler.scale(value).backward()
        if unscale:
            scaler.unscale_(optimizer)
            mz.clip_grad_norm_(model, 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales = world.gather_objects(scaler.get_scale())
        assert len(set(scales)) == 1
        if step == 0:
            assert scales[0] == 4.0
            assert torch.equal(model.state_dict()["head.weight"], before)
    assert scales[0] == 8.0  # grown once after two good steps, and the third is not enough
    assert not torch.equal(model.state_dict()["head.weight"], before)


@ranks
@pytest.mark.parametrize("way", STAGES)
def test_gradients_say_where_they_are(way: dict[str, Any]) -> None:
    alone, _its, model, optimizer = pair(way)
    backward(alone, model, 0)
    with pytest.raises(mz.MpizeroError, match="clip_grad_norm_"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    parameter = next(model.parameters())
    assert parameter.grad is not None and "sharded" in repr(parameter.grad)
    optimizer.zero_grad()
    assert parameter.grad is None
    with model.no_sync():
        backward(alone, model, 1)
    with pytest.raises(mz.MpizeroError, match="no_sync"):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(mz.ArgumentError, match="head"):
        model.gradient("nothing")


@ranks
@pytest.mark.parametrize("way", STAGES)
def test_looking_at_and_changing_parameters(way: dict[str, Any]) -> None:
    world = mz.init()
    alone, its, model, optimizer = pair(way)
    train(alone, its, model, optimizer, range(2))
    with mz.gathered(model) as inner:
        for ours, theirs in zip(inner.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    with mz.gathered(model, modify=True) as inner, torch.no_grad():
        for parameter in inner.parameters():
            parameter.mul_(0.5 if world.rank == 0 else 7.0)  # rank 0's writes hold
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter.mul_(0.5)
    assert_same(model, alone)
    train(alone, its, model, optimizer, range(2, 4))
    assert_same(model, alone)


@several_ranks
def test_writes_to_shared_parameters_are_refused() -> None:
    _, _, model, _ = pair({"stage": 2})
    nn.init.zeros_(model.module.head.weight)
    x, _ = KIND.batch(2, 0)
    with pytest.raises(mz.ArgumentError, match=r"head\.weight.*gathered"):
        model(x)


@ranks
@pytest.mark.parametrize("way", STAGES)
def test_deferred_models(way: dict[str, Any]) -> None:
    world = mz.init()

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(17, 16)
            self.norm = nn.BatchNorm1d(16)
            self.head = nn.Linear(16, 17, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.embed(x).flatten(0, 1))).unflatten(0, x.shape)

    with mz.deferred():
        plain = Tied()
    optimizer: Any = adamw(plain.parameters())
    model, optimizer = mz.zero(plain, optimizer, segment_mb=0.002, **way)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    assert values["embed.weight"].std() > 0.1 and torch.equal(values["norm.weight"], torch.ones(16))
    everyones = world.gather_objects(values["embed.weight"].numpy().tobytes())
    assert len(set(everyones)) == 1
    for step in range(2):
        x, y = KIND.batch(2, step)
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()
    assert not torch.equal(model.state_dict()["embed.weight"], values["embed.weight"])

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(40))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    for initialise in (None, lambda part: nn.init.constant_(part.weight, 3.0)):
        with torch.device("meta"):  # where nothing is kept of what constructors write
            bare = Bare()
        if initialise is None:
            with pytest.raises(mz.ArgumentError, match="reset_parameters"):
                mz.zero(bare, adamw(bare.parameters()), **way)
        else:
            found, _ = mz.zero(bare, adamw(bare.parameters()), initialise=initialise, **way)
            assert torch.equal(found.state_dict()["weight"], torch.full((40,), 3.0))


@several_ranks
def test_a_join_wants_the_optimizer() -> None:
    """Ranks that are done must take part in the others' updates."""
    _, its, model, _ = pair({"stage": 2})
    for wrong in (None, its):
        with pytest.raises(mz.ArgumentError, match="optimizer"), model.join(wrong):
            pass


@ranks
@pytest.mark.parametrize("way", STAGES)
def test_models_are_let_go(way: dict[str, Any]) -> None:
    """torch keeps hooks where Python's collector does not see them."""
    _, _, model, optimizer = pair(way)
    x, y = KIND.batch(2, 0)
    loss(model, x, y).backward()
    optimizer.step()
    kept = [weakref.ref(each) for each in (model, model.module, model.state, optimizer)]
    del model, optimizer
    gc.collect()
    assert [each() for each in kept] == [None] * 4


class WithNothing(torch.nn.Module):
    """Has a parameter of no elements, which takes part all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 6)
        self.nothing = torch.nn.Parameter(torch.zeros(0, 3))
        self.second = torch.nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) + self.nothing.sum()


@ranks
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("partition", ["flat", "parameter"])
@pytest.mark.parametrize("segment_mb", [1e-5, 25])
def test_parameters_of_no_elements(stage: int, partition: str, segment_mb: float) -> None:
    """A backward pass once waited for ever for such a gradient in a segment of its own."""
    models = []
    for sharded in (False, True):
        torch.manual_seed(0)
        model: torch.nn.Module = WithNothing()
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if sharded:
            model, optimizer = mz.zero(
                model, optimizer, stage, partition=partition, segment_mb=segment_mb
            )
        for _ in range(2):
            model(torch.ones(2, 6)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model.state_dict())
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value)


@ranks
@pytest.mark.parametrize("scale", ["loss", "gradients"])
@pytest.mark.parametrize(
    "way",
    [{"stage": 0}, {"stage": 1}, {"stage": 2}, {"stage": 3, "share_parameters": False}],
    ids=str,
)
def test_passes_that_are_accumulated_are_averaged_once(way: dict[str, Any], scale: str) -> None:
    """As a pipeline's schedule runs them, which may also divide what has come of them."""
    world, kind, passes = mz.init(), KIND, 3
    alone = kind.build(torch.float64)
    its = torch.optim.AdamW(alone.parameters(), lr=1e-2)
    model = kind.build(torch.float64)
    model, optimizer = mz.zero(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **way)
    for step in range(3):
        x, y = kind.batch(world.size * passes * 2, step)
        its.zero_grad()
        expected = loss(alone, x, y)
        expected.backward()
        its.step()
        optimizer.zero_grad()
        found = 0.0
        with model.accumulate():
            for at in range(passes):
                first = (world.rank * passes + at) * 2
                own = loss(model, x[first : first + 2], y[first : first + 2])
                (own / passes if scale == "loss" else own).backward()
                found += own.item() / passes
            for parameter in model.parameters() if scale == "gradients" else ():
                if parameter.grad is not None:
                    parameter.grad.div_(passes)
        optimizer.step()
        assert mz.mean(found) == pytest.approx(expected.item(), rel=1e-10)


@ranks
@pytest.mark.parametrize("way", STAGES)
def test_parameters_that_are_used_after_others_were_learned(way: dict[str, Any]) -> None:
    """A pass learns when segments are complete: another may bring more, in parts of several."""
    world = mz.init()

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.parts = nn.ModuleList(nn.Linear(5, 5) for _ in range(6))
            self.double()

        def forward(self, x: torch.Tensor, use: Sequence[int]) -> torch.Tensor:
            for at in use:
                x = torch.tanh(self.parts[at](x))
            return x

    for elements in (7, 13, 40):  # of a segment
        alone, inner = Parts(), Parts()
        its = torch.optim.SGD(alone.parameters(), 0.1)
        own = torch.optim.SGD(inner.parameters(), 0.1)
        model, optimizer = mz.zero(inner, own, segment_mb=elements * 8 / 2**20, **way)
        for step, use in enumerate([(5,), (0, 1, 2, 3, 4, 5), (2, 3), (4, 0), range(6)]):
            x = torch.randn(world.size, 5, generator=torch.Generator().manual_seed(step)).double()
            for zeroed in (its, optimizer):
                zeroed.zero_grad()
            alone(x, use).square().mean().backward()
            model(x[world.rank : world.rank + 1], use).square().mean().backward()
            for (name, p), mine in zip(alone.named_parameters(), inner.parameters(), strict=True):
                found = mz.full_gradient(mine)
                assert (found is None) == (p.grad is None), name
                if found is not None:
                    torch.testing.assert_close(found, p.grad, rtol=1e-9, atol=1e-11, msg=name)
            its.step()
            optimizer.step()
