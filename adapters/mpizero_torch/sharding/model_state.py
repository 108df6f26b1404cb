"""A sharded model's parameters as a whole: its state_dict, and looking at or changing them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError
from mpizero.engine import COMMON
from mpizero_torch import names, slices
from mpizero_torch.replicate import broadcast_tensors
from mpizero_torch.sharding.state import ShardedState
from mpizero_torch.wrapper import DistributedModule

_plainly = threading.local()


@contextmanager
def ungathered() -> Iterator[None]:
    """In here a state_dict has sharded parameters themselves, not their values."""
    _plainly.active = True
    try:
        yield
    finally:
        _plainly.active = False


def whole_state_dict(
    module: nn.Module, state: ShardedState, root: int | None, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """The module's state_dict with whole parameters, on every rank or on ``root``. Collective.

    Parameters that have float32 masters are given as these are. Where ranks hold all of a
    parameter, and train it as it is, it is the very one, as torch has it.
    """
    if getattr(_plainly, "active", False):
        plain: dict[str, Any] = names.state_dict(module, *args, **kwargs)
        return plain
    world = state.group.world
    with world.together("state_dict()"):
        if not 0 <= (root or 0) < world.size:
            raise ArgumentError(
                "state_dict()", "root", str(root), f"0 to {world.size - 1}, or None"
            )
        found: dict[str, Any] = names.state_dict(module, *args, **{**kwargs, "keep_vars": True})
        number = {id(parameter): index for index, (_, parameter) in enumerate(state.named)}
        collected: dict[int, Any] = {}  # tied parameters have several names
        wanted = root is None or root == world.rank
        for name, value in list(found.items()):
            index = number.get(id(value))
            if index is not None and state.is_scattered(index):
                if index not in collected:
                    own = state.collect(index, root)
                    collected[index] = None if own is None else slices.wrap(own, value)
                found[name] = collected[index]
            elif isinstance(value, torch.Tensor):
                found[name] = value.detach()
        return found if wanted else {}


@contextmanager
def gathered(model: nn.Module, modify: bool = False) -> Iterator[nn.Module]:
    """All of a model's parameters, whole, to look at or to change. Collective.

    In ``with mz.gathered(model) as inner:`` the plain module has all its values on every rank. What
    is written is lost, or, with ``modify``, becomes the model's: rank 0's writes hold, for all
    ranks; with ``precision`` parameters are the float32 values that are trained then. Takes memory
    for the whole model on each rank, unless it only looks at what is there. For models that are
    not sharded it does nothing but give the plain module.
    """
    model = names.uncompiled(model)
    state = getattr(model, "state", None)
    if not isinstance(model, DistributedModule) or not isinstance(state, ShardedState):
        yield model.module if isinstance(model, DistributedModule) else model
        return
    with state.group.world.together("gathered()"):
        model.follow("gathered()")
        with whole(model, modify, range(len(state.named))):
            yield model.module
        state.memory.settle()


@contextmanager
def whole(model: Any, modify: bool, indices: Sequence[int]) -> Iterator[None]:
    """These parameters of a sharded model, whole; with ``modify``, to be written by rank 0."""
    state: ShardedState = model.state
    let_go = model.hold(indices)
    parameters = [state.named[index][1] for index in indices]
    homes = [slices.local(parameter).data for parameter in parameters]
    if modify:
        for index, parameter, home in zip(indices, parameters, homes, strict=True):
            if state.trained_dtype(index) != home.dtype and not slices.is_slice(parameter):
                # What is trained, so that what nobody writes to is not rounded, nor what is.
                trained = state.collect(index, None)
                slices.move(parameter, home.clone() if trained is None else trained)
            elif state.sharding.how == COMMON:
                slices.move(parameter, home.clone())
        state.memory.settle()
    before, model.writes.watches = model.writes.watches, model.writes.watches and not modify
    try:
        yield
        if modify:
            broadcast_tensors(parameters, state.group.world, root=0)
            state.adopt(indices)
    finally:
        for parameter, home in zip(parameters, homes, strict=True):
            slices.move(parameter, home)
        let_go()
        model.writes.watches = before
        if modify:
            model.writes.settle()


def load_whole(model: Any, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Load a plain module's state_dict, which every rank must be given (rank 0's holds)."""
    with model.world.together("load_state_dict()"):
        with gathered(model, modify=True) as inner:
            result = names.load_state_dict(inner, state_dict, *args, **kwargs)
            buffers = [buffer for _, buffer in inner.named_buffers()]
        broadcast_tensors(buffers, model.world, root=0)
        return result


def open_for_loading(model: Any) -> None:
    """A bigger module is being loaded: let all parameters be there, to be written to."""
    if model.loading is None:
        model.loading = ExitStack()
        model.loading.enter_context(gathered(model, modify=True))


def close_after_loading(model: Any, keys: Any) -> None:
    """It has been: what was written is the model's, rank 0's. Collective."""
    if model.loading is not None:
        loading, model.loading = model.loading, None
        loading.close()
        broadcast_tensors([b for _, b in model.module.named_buffers()], model.world, root=0)
