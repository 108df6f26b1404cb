"""Whole gradients, parameters and optimizer state of one parameter, wherever they lie.

What a program would read from ``p.grad``, ``p`` and ``optimizer.state[p]`` in one process, on all
ranks together. A parameter that is not sharded is looked at as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpizero import ArgumentError, MpizeroError
from mpizero_torch import slices, tensors
from mpizero_torch.sharding.mean_gradients import digest_of, octets

if TYPE_CHECKING:
    from mpizero_torch.sharding.module import ShardedModule

# The sharded modules, with the numbers of their parameters.
_modules: weakref.WeakKeyDictionary[Any, dict[int, int]] = weakref.WeakKeyDictionary()


def register(module: ShardedModule) -> None:
    """Let the parameters of ``module`` be found."""
    _modules[module] = {id(p): index for index, (_, p) in enumerate(module.state.named)}


def full_gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    """All of a parameter's mean gradient, on every rank; None if it has none. Collective.

    A copy. Raises MpizeroError for gradients that were only accumulated, under ``no_sync``.
    """
    found = _find("full_gradient()", parameter)
    if found is None:
        return None if parameter.grad is None else parameter.grad.detach().clone()
    module, index = found
    return whole_gradient(module, index)


def set_gradient(parameter: nn.Parameter, gradient: torch.Tensor | None) -> None:
    """Let ``gradient``, the same on all ranks, be the parameter's; None: it has none. Collective.

    Raises ArgumentError for one of another shape, MismatchError if the ranks' differ.
    """
    found = _find("set_gradient()", parameter)
    if gradient is not None:
        _check_shape("set_gradient()", "gradient", parameter, gradient)
        gradient = gradient.detach().to(parameter.device)
    if found is None:
        parameter.grad = None if gradient is None else gradient.to(parameter.dtype).clone()
        return
    module, index = found
    module.follow("set_gradient()")
    module.check_reduced("set_gradient()")
    if gradient is None:
        _agree(module, index, "None")
        parameter.grad = None
        module.gradients.follow()
    else:
        _agree(module, index, octets(slices.local(gradient)))
        module.gradients.set(index, gradient)
    module.gradients.agree()


def full_parameter(parameter: nn.Parameter) -> torch.Tensor:
    """All of a parameter's values, on every rank, float32 where these are trained. Collective.

    A copy. Without gathering any other parameter.
    """
    found = _find("full_parameter()", parameter)
    if found is None:
        return parameter.detach().clone()
    module, index = found
    module.follow("full_parameter()")
    whole = module.state.collect(index, None)
    assert whole is not None  # for every rank
    return slices.wrap(whole, parameter)


def set_parameter(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Let ``value``, the same on all ranks, be the parameter's values from here on. Collective.

    Raises ArgumentError for one of another shape, MismatchError if the ranks' differ.
    """
    found = _find("set_parameter()", parameter)
    _check_shape("set_parameter()", "value", parameter, value)
    value = value.detach().to(parameter.device)
    if found is None:
        with torch.no_grad():
            parameter.copy_(value)
        return
    module, index = found
    if slices.is_slice(parameter) and not slices.is_slice(value):
        raise ArgumentError(
            "set_parameter()", "value", "a plain tensor, for one that tensor parallelism has cut",
            "a DTensor that is cut up as the parameter is",
        )  # fmt: skip
    if not module.writes.watches:
        raise MpizeroError(
            "set_parameter() inside `with mz.gathered(..., modify=True):`, whose parameters are "
            "rank 0's in the end. Write to the parameter itself."
        )
    module.follow("set_parameter()")
    _agree(module, index, octets(slices.local(value)))
    module.state.store(index, value)
    module.state.memory.settle()
    module.let_parameters_go()  # what has been gathered is old


def optimizer_state(parameter: nn.Parameter) -> dict[str, Any]:
    """What the optimizer of ``mz.zero`` keeps for a parameter, whole, on every rank. Collective.

    As ``optimizer.state[p]`` in one process: {} before the first step. Copies.
    """
    found = _find("optimizer_state()", parameter)
    if found is None:
        raise ArgumentError(
            "optimizer_state()", "parameter", "one that no mz.zero() has sharded",
            "a parameter of a sharded model", "Of a plain optimizer it is optimizer.state[p].",
        )  # fmt: skip
    module, index = found
    module.follow("optimizer_state()")
    for optimizer in module.optimizers:
        if index in optimizer.members:
            return optimizer.state_of(index)
    return {}


def whole_gradient(module: ShardedModule, index: int) -> torch.Tensor | None:
    """All of a mean gradient, put together from the ranks' parts. Collective."""
    module.follow("full_gradient()")
    module.check_reduced("full_gradient()")
    if index not in module.gradients.marks:
        return None
    state = module.state
    dtype = tensors.torch_dtype(state.gradient_dtype(state.space_of[index].space))
    whole = torch.zeros(state.shapes[index], dtype=dtype, device=state.device)
    for run in module.runs if state.group.is_holder else ():
        for piece in run.pieces:
            if piece.index == index:
                whole.view(-1)[piece.elements] = run.gradient.reshape(-1)[piece.place].to(whole)
    state.group.world.allreduce(whole)
    return slices.wrap(whole, state.named[index][1])


def sharded_among(
    parameters: Iterable[nn.Parameter],
) -> dict[ShardedModule, list[int]]:
    """The sharded modules of these parameters, and their numbers there."""
    found: dict[ShardedModule, list[int]] = {}
    for parameter in parameters:
        place = _find("gathered()", parameter)
        if place is not None and place[1] not in found.setdefault(place[0], []):
            found[place[0]].append(place[1])
    return found


def _agree(module: ShardedModule, index: int, data: str | bytes) -> None:
    """All ranks must have come with the same, for the same parameter."""
    name = module.state.named[index][0]
    module.state.group.world.agree(
        [f"'{name}': {digest_of([data]):x}"], "what a parameter or its gradient is set to"
    )


def _find(function: str, parameter: Any) -> tuple[ShardedModule, int] | None:
    """The sharded module that a parameter is of, and its number there; None: of none."""
    if not isinstance(parameter, torch.Tensor):
        raise ArgumentError(
            function, "parameter", f"a {type(parameter).__name__}", "a parameter of the model"
        )
    for module, numbers in list(_modules.items()):
        index = numbers.get(id(parameter))
        if index is not None and module.state.named[index][1] is parameter:
            return module, index
        if any(run.parameter is parameter for run in module.runs):
            raise ArgumentError(
                function, "parameter", "one of the optimizer's, which is this rank's shard",
                "a parameter of the model",
            )  # fmt: skip
    return None


def _check_shape(function: str, what: str, parameter: torch.Tensor, value: Any) -> None:
    given = tuple(value.shape) if isinstance(value, torch.Tensor) else None
    if given != tuple(parameter.shape):
        described = f"a {type(value).__name__}" if given is None else f"one of shape {given}"
        raise ArgumentError(
            function, what, described, f"a tensor of shape {tuple(parameter.shape)}"
        )
