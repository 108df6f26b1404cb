"""What programs do to parameters after ``mz.zero``: it is trained from there on, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import mpizero_torch as mz

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])

PRIVATE = {"share_parameters": False}
WAYS = [
    pytest.param({"stage": 1, **PRIVATE}, id="1 private"),
    pytest.param({"stage": 2}, id="2 shared"),
    pytest.param({"stage": 2, **PRIVATE}, id="2 private"),
    pytest.param({"stage": 2, "partition": "parameter", **PRIVATE}, id="2 by parameter"),
    pytest.param({"stage": 2, "offload": "disk", **PRIVATE}, id="2 on disk"),
    pytest.param({"stage": 3}, id="3 shared"),
    pytest.param({"stage": 3, **PRIVATE}, id="3 private"),
]
SOME_WAYS = [WAYS[0], WAYS[1], WAYS[3], WAYS[6]]
PRECISIONS = [pytest.param({}, id="fp32"), pytest.param({"precision": "bf16"}, id="bf16")]


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def sharded(way: dict[str, Any], lr: float = 0.5) -> tuple[nn.Module, Any, Any]:
    inner = build()
    optimizer = torch.optim.SGD(inner.parameters(), lr=lr, momentum=0.5)
    return inner, *mz.zero(inner, optimizer, segment_mb=0.0005, **way)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(12, 6, generator=generator), torch.randn(12, 4, generator=generator)


def train(model: Any, optimizer: Any, step: int) -> None:
    x, y = batch(step)
    optimizer.zero_grad()
    functional.mse_loss(model(x), y).backward()
    optimizer.step()


Write = Callable[[nn.Module], Any]


def pretrained() -> dict[str, torch.Tensor]:
    return {key: torch.full_like(value, 0.25) for key, value in build().state_dict().items()}


def weights(module: nn.Module) -> nn.Parameter:
    found = module[2].weight  # type: ignore[index]
    assert isinstance(found, nn.Parameter)
    return found


def load(module: nn.Module) -> None:
    module.load_state_dict(pretrained())


def initialise(module: nn.Module) -> None:
    torch.manual_seed(7)
    nn.init.normal_(weights(module))


@torch.no_grad()
def limit(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.clamp_(-0.125, 0.125)


def limit_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.clamp_(-0.125, 0.125)


def into_a_view(module: nn.Module) -> None:
    weights(module).data[1].fill_(0.5)


def other_memory(module: nn.Module) -> None:
    weights(module).data = torch.full((8, 8), 0.25, dtype=weights(module).dtype)


def assign(module: nn.Module) -> None:
    dtype = weights(module).dtype
    state = {key: value.to(dtype) for key, value in pretrained().items()}
    module.load_state_dict(state, assign=True)


def from_a_vector(module: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 0.5, module.parameters())


def there_and_back(module: nn.Module) -> None:
    dtype = weights(module).dtype
    module.double().to(dtype)


def into_shared_memory(module: nn.Module) -> None:
    module.share_memory()


IN_PLACE: list[Write] = [load, initialise, limit, limit_data, into_a_view]
REPLACING: list[Write] = [other_memory, assign, from_a_vector, there_and_back, into_shared_memory]


def is_refused(way: dict[str, Any], write: Write) -> bool:
    """Shared memory is not written to by all; and what is sharded is not here."""
    if way["stage"] == 3 and way.get("share_parameters") is False:
        return True
    return way.get("share_parameters") is None and mz.init().size > 1 and write in IN_PLACE


@ranks
@pytest.mark.parametrize("way", SOME_WAYS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("write", [*IN_PLACE, *REPLACING])
def test_what_is_written_is_trained(
    way: dict[str, Any], precision: dict[str, Any], write: Write
) -> None:
    inner, model, optimizer = sharded({**way, **precision})
    train(model, optimizer, 0)
    if is_refused(way, write):
        errors = RuntimeError, mz.MpizeroError, mz.ArgumentError
        with pytest.raises(errors, match=r"gathered|zero\(\)"):
            write(inner)
            train(model, optimizer, 1)
        return
    expected = copy.deepcopy({k: v.float() for k, v in model.state_dict().items()})
    momentum = optimizer.state_dict()
    write(inner)
    dtype = weights(inner).dtype
    alone = build()
    alone.load_state_dict(expected)
    as_it_is = copy.deepcopy(alone).to(dtype)
    write(as_it_is)
    # What was not changed goes on with all its digits, what was comes from 16 bits.
    for name, parameter in alone.named_parameters():
        written = as_it_is.get_parameter(name).detach()
        kept = expected[name].to(dtype) == written
        parameter.data = torch.where(kept, expected[name], written.float())
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[key], rtol=0, atol=1e-6, msg=key)
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if precision else {"rtol": 1e-5, "atol": 1e-6}
    its = torch.optim.SGD(alone.parameters(), lr=0.5, momentum=0.5)
    its.load_state_dict(momentum)
    for step in (1, 2):
        train(model, optimizer, step)
        train(alone, its, step)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value.float(), alone.state_dict()[key], **tolerance, msg=key)
    assert weights(inner).dtype == dtype


@ranks
@pytest.mark.parametrize("way", [WAYS[2], WAYS[4], WAYS[5]])
@pytest.mark.parametrize("write", [load, other_memory])
def test_what_is_written_is_kept_in_other_ways(way: dict[str, Any], write: Write) -> None:
    way = {**way, "precision": "bf16"}
    inner, model, optimizer = sharded(way, lr=0.0)
    if not is_refused(way, write):
        write(inner)
        train(model, optimizer, 0)
        assert bool((model.state_dict()["2.weight"] == 0.25).all())


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_other_forms_are_refused(way: dict[str, Any]) -> None:
    inner, model, optimizer = sharded(way)
    with pytest.raises((mz.ArgumentError, mz.MpizeroError), match=r"zero\(\)|gathered"):
        inner.double()
        optimizer.step()
    inner, model, optimizer = sharded(way)
    inner[4] = nn.Linear(8, 4)  # type: ignore[operator]
    inner[2].bias = nn.Parameter(torch.zeros(8, dtype=torch.float64))  # type: ignore[index, union-attr]
    with pytest.raises(mz.ArgumentError, match=r"2\.bias"):
        optimizer.step()
    assert model is not None


@several_ranks
@pytest.mark.parametrize("way", WAYS[2:4])
@pytest.mark.parametrize("write", [initialise, limit_data, other_memory, assign])
def test_one_rank_alone(way: dict[str, Any], write: Write) -> None:
    inner, model, optimizer = sharded(way)
    if mz.init().rank == 1:
        write(inner)
    with pytest.raises(mz.MismatchError, match=r"rank 1: .*wrote to '"):
        train(model, optimizer, 0)


@several_ranks
@pytest.mark.parametrize("way", [WAYS[1], WAYS[2]])
def test_every_rank_its_own_values(way: dict[str, Any]) -> None:
    inner, model, optimizer = sharded(way)
    weights(inner).data = torch.full((8, 8), float(mz.init().rank))
    with pytest.raises(mz.MismatchError, match=r"2\.weight.*\n.*\n.*|gathered"):
        train(model, optimizer, 0)


@ranks
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_access_to_single_parameters(way: dict[str, Any], precision: dict[str, Any]) -> None:
    inner, model, optimizer = sharded({**way, **precision})
    alone = build()
    its = torch.optim.Adam(alone.parameters())
    with pytest.raises(mz.ArgumentError, match="shape"):
        mz.set_parameter(weights(inner), torch.zeros(3))
    for parameter in inner.parameters():
        assert mz.full_gradient(parameter) is None and mz.optimizer_state(parameter) == {}
    values = torch.linspace(-0.3, 0.3, 64).view(8, 8)
    mz.set_parameter(weights(inner), values)
    mz.set_parameter(weights(alone), values)
    assert torch.equal(mz.full_parameter(weights(inner)), values)  # float32, not rounded
    x, y = batch(0)
    functional.mse_loss(model(x), y).backward()
    functional.mse_loss(alone(x), y).backward()
    close = {"rtol": 0.1, "atol": 1e-2} if precision else {"rtol": 1e-5, "atol": 1e-7}
    for ours, theirs in zip(inner.parameters(), alone.parameters(), strict=True):
        found = mz.full_gradient(ours)
        assert found is not None and theirs.grad is not None
        torch.testing.assert_close(found.float(), theirs.grad, **close)
    mz.set_gradient(weights(inner), torch.ones(8, 8))
    mz.set_gradient(inner[0].bias, None)  # type: ignore[index, union-attr]
    assert mz.full_gradient(inner[0].bias) is None  # type: ignore[index, union-attr]
    optimizer.step()
    torch.testing.assert_close(mz.full_parameter(weights(inner)), values - 0.5)
    state = mz.optimizer_state(weights(inner))
    torch.testing.assert_close(state["momentum_buffer"], torch.ones(8, 8))
    assert mz.optimizer_state(inner[0].bias) == {}  # type: ignore[index, union-attr]
    own = next(p for group in optimizer.param_groups for p in group["params"])
    if own.numel():
        with pytest.raises(mz.ArgumentError, match="shard"):
            mz.full_parameter(own)
    assert mz.full_gradient(weights(alone)) is not None and its is not None
    with pytest.raises(mz.ArgumentError, match=r"optimizer\.state"):
        mz.optimizer_state(weights(alone))


@several_ranks
@pytest.mark.parametrize("way", WAYS[1:3])
def test_values_to_be_set_must_be_the_same(way: dict[str, Any]) -> None:
    inner, _, _ = sharded(way)
    for function in (mz.set_parameter, mz.set_gradient):
        with pytest.raises(mz.MismatchError, match=r"2\.weight"):
            function(weights(inner), torch.full((8, 8), float(mz.init().rank)))


@ranks
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_parts_are_gathered(way: dict[str, Any], precision: dict[str, Any]) -> None:
    inner, model, optimizer = sharded({**way, **precision})
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    part, bias = inner[2], inner[4].bias  # type: ignore[index, union-attr]
    with mz.gathered([part, bias]) as (given, its):
        torch.testing.assert_close(given.weight.float(), expected["2.weight"], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(its.float(), expected["4.bias"], rtol=1e-2, atol=1e-2)
        if way == {"stage": 3, **PRIVATE}:
            with pytest.raises(mz.MpizeroError, match="gathered"):
                inner[0].weight.sum()  # type: ignore[index, union-attr]
            with mz.gathered(inner[0]) as first:  # type: ignore[index]
                first.weight.sum()
            given.weight.sum()
    rank = mz.init().rank
    with mz.gathered(part, modify=True), torch.no_grad():
        part.weight.fill_(0.5 if rank == 0 else 7.0)
    expected["2.weight"].fill_(0.5)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    train(model, optimizer, 0)
    assert not torch.equal(model.state_dict()["2.weight"], expected["2.weight"])
    with mz.gathered(build()) as plain:
        assert plain is not None
    with pytest.raises(mz.ArgumentError, match="a module, a parameter"), mz.gathered(3):
        pass
