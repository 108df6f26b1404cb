"""Sequences of passes and of what users do between them, each once found by a random program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import mpizero_torch as mz
from support.program_sides import Net, Shape, taken
from support.reference import seeded

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])


def wrapped(**shape: bool) -> tuple[Net, Any]:
    net = Net(Shape(**shape), 3)
    return net, mz.DistributedDataParallel(net)


def loss_of(model: Any, use: str, seed: int = 0, **options: Any) -> torch.Tensor:
    x = seeded(seed * 8 + model.world.rank, 3, 4).requires_grad_()
    return taken(model(x, use, **options)).square().mean()


@several_ranks
@pytest.mark.parametrize("how", ["frozen", "unused"])
def test_hooks_are_called_for_parameters_that_got_a_gradient(how: str) -> None:
    net, model = wrapped()
    called: list[str] = []

    def calling(name: str) -> Callable[[torch.Tensor], None]:
        return lambda _: called.append(name)

    for name, parameter in net.named_parameters():
        parameter.register_post_accumulate_grad_hook(calling(name))
    loss_of(model, "abc").backward()
    called.clear()  # and gradients stay where they are
    if how == "frozen":
        net.b.requires_grad_(False)
    # One rank uses more than the others.
    use = {"frozen": "abc", "unused": "ac"}[how] if model.world.rank == 0 else "a"
    loss_of(model, use).backward()
    assert sorted(called) == ["a.bias", "a.weight", "c.bias", "c.weight"]


@several_ranks
def test_hooks_are_called_for_gradients_that_were_kept_on_a_rank() -> None:
    net, model = wrapped()
    called: list[str] = []
    net.c.bias.register_post_accumulate_grad_hook(lambda _: called.append("c"))
    with model.no_sync():
        loss_of(model, "c" if model.world.rank == 0 else "a").backward()
    assert not called
    loss_of(model, "a").backward()
    assert called == ["c"]
    loss_of(model, "a").backward()  # it has the average of before
    assert called == ["c"]


@several_ranks
@pytest.mark.parametrize("before", [True, False])
def test_a_gradient_of_weight_zero_is_zero(before: bool) -> None:
    """Whatever lies there already: an optimizer treats zero and None differently."""
    net, model = wrapped()
    if before:
        model.weigh(2.0)
        loss_of(model, "a").backward()
    model.weigh(0.0 if model.world.rank == 0 else 3.0)
    loss_of(model, "c" if model.world.rank == 0 else "a").backward()
    assert net.c.weight.grad is not None and not net.c.weight.grad.any()


@several_ranks
@pytest.mark.parametrize("weight", [0.0, 2.5])
def test_weights_of_a_pass_whose_output_is_hidden(weight: float) -> None:
    """What was kept before cannot be told from what has come: refused on all ranks, not halved."""
    _, model = wrapped()
    model.weigh(2.5)
    loss_of(model, "abc").backward()
    model.zero_grad()
    model.weigh(weight if model.world.rank == 0 else 2.5)
    with pytest.raises(mz.MpizeroError, match="Let it return tensors"):
        loss_of(model, "abc", form="closure").backward()


@several_ranks
@pytest.mark.parametrize("how", ["loaded", "joined", "counted"])
def test_two_backwards_after_statistics_were_written_between_forwards(how: str) -> None:
    """Only a forward that counts its own writes makes torch refuse the second one."""
    net, model = wrapped(norm=True)
    if how == "loaded":
        model.load_state_dict(model.state_dict())
    elif how == "joined":
        with model.join():
            for _ in range(model.world.rank + 1):
                loss_of(model, "abc").backward()
    else:  # what is saved for backward must not change unseen
        net.register_forward_pre_hook(lambda *_: (net.norm.running_mean.mul_(0.5), None)[1])
    out = taken(model(seeded(model.world.rank, 3, 4), "abc"))
    out[:, 0].mean().backward(retain_graph=True)
    if how == "counted" and model.world.rank:
        with model.no_sync(), pytest.raises(RuntimeError, match="modified by an inplace"):
            out[:, 1].square().mean().backward()
        return
    if how != "counted":
        out[:, 1].square().mean().backward()
        assert torch.equal(net.a.weight.grad, model.world.broadcast(net.a.weight.grad.clone(), 0))


@several_ranks
def test_gradients_that_are_kept_stay_as_they_are_in_a_join() -> None:
    net, model = wrapped()
    loss_of(model, "abc").backward()
    kept = net.b.weight.grad
    assert kept is not None
    values = kept.clone()
    model.zero_grad()
    with model.join():
        for step in range(model.world.rank):
            model.zero_grad()
            loss_of(model, "abc", step + 1).backward()
    assert torch.equal(kept, values)


@several_ranks
@pytest.mark.parametrize("stated", ["before", "after"])
@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_a_weight_that_was_stated_for_a_frozen_module_is_not_the_next_ones(
    weight: float, stated: str
) -> None:
    """Its backward pass has come, and has asked for no gradient of a parameter."""
    net, model = wrapped()
    net.requires_grad_(False)
    model.weigh(weight)
    loss_of(model, "abc").backward()
    net.requires_grad_(True)
    if stated == "before":
        model.weigh(1.0 + model.world.rank)
    loss = loss_of(model, "abc", 1)
    if stated == "after":
        model.weigh(1.0 + model.world.rank)
    loss.backward()
    found = [taken(each.grad) for each in net.parameters()]
    net.zero_grad()
    means = []
    for rank in range(model.world.size):
        alone = Net(Shape(), 3)
        x = seeded(8 + rank, 3, 4).requires_grad_()
        taken(alone(x, "abc")).square().mean().backward()
        means.append([taken(each.grad) * (1.0 + rank) for each in alone.parameters()])
    whole = sum(range(1, model.world.size + 1))
    for gradient, *terms in zip(found, *means, strict=True):
        torch.testing.assert_close(gradient, sum(terms) / whole, rtol=1e-12, atol=1e-12)
    loss_of(model, "abc").backward()  # without a weight: none is stated for it


@several_ranks
@pytest.mark.parametrize("what", ["gradient", "part"])
def test_gradients_that_are_kept_stay_when_parameters_get_another_dtype(what: str) -> None:
    """Their memory is no place of the parameters' any more, and is reduced all the same."""
    net, model = wrapped()
    for number in range(2):  # the second's gradients lie where they lie from then on
        model.zero_grad()
        loss_of(model, "abc", number).backward()
    gradient = net.c.weight.grad
    assert gradient is not None
    kept = gradient if what == "gradient" else gradient[0]
    del gradient
    model.zero_grad()
    values = kept.clone()
    net.c.to(torch.bfloat16)
    for number in range(2, 5):
        loss_of(model, "ab", number).backward()
        assert torch.equal(kept, values)
        model.zero_grad()
    net.c.to(torch.float64)
    for number in range(5, 7):
        loss_of(model, "abc" if number == 6 else "ab", number).backward()
        assert torch.equal(kept, values)


@several_ranks
@pytest.mark.parametrize("kept", [False, True])
def test_the_mean_of_a_frozen_layer_is_left_alone_by_weights(kept: bool) -> None:
    """Also where passes in between stay on the rank."""
    net, model = wrapped()
    model.weigh(2.0)
    loss_of(model, "abc").backward()
    assert net.a.weight.grad is not None
    values = net.a.weight.grad.clone()
    net.a.requires_grad_(False)
    if kept:
        model.weigh(5.0 + model.world.rank)
        with model.no_sync():
            loss_of(model, "abc").backward()
    model.weigh(7.0)
    loss_of(model, "abc").backward()
    assert torch.equal(net.a.weight.grad, values)
