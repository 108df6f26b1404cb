"""``gathered``: parameters of sharded models, whole, to look at or to change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError
from mpizero_torch import names
from mpizero_torch.sharding import model_state
from mpizero_torch.sharding.access import sharded_among
from mpizero_torch.wrapper import DistributedModule


@contextmanager
def gathered(model: Any, modify: bool = False) -> Iterator[Any]:
    """A model's parameters, whole, to look at or to change. Collective.

    In ``with mz.gathered(model) as inner:`` the plain module has all its values on every rank. What
    is written is lost, or, with ``modify``, becomes the model's: rank 0's writes hold, for all
    ranks. Takes memory for the whole model on each rank, unless it only looks at what is there.
    ``model`` may be a part of a model too, a parameter, or a list of such: then these alone are
    gathered, and it is what ``as`` gives. For what is not sharded it does nothing.
    """
    if isinstance(model, nn.Module) and isinstance(names.uncompiled(model), DistributedModule):
        with model_state.gathered(model, modify) as inner:
            yield inner
        return
    with ExitStack() as stack:
        for module, indices in sharded_among(_parameters(model)).items():
            world = module.state.group.world
            stack.enter_context(world.together("gathered()"))
            module.follow("gathered()")
            world.agree(list(map(str, indices)), "the parameters to be gathered")
            stack.callback(module.state.memory.settle)
            stack.enter_context(model_state.whole(module, modify, indices))
        yield model


def _parameters(given: Any) -> Iterator[nn.Parameter]:
    if isinstance(given, nn.Module):
        yield from given.parameters()
    elif isinstance(given, torch.Tensor):
        yield given  # type: ignore[misc]
    elif isinstance(given, Iterable):
        for each in given:
            yield from _parameters(each)
    else:
        raise ArgumentError(
            "gathered()", "model", f"a {type(given).__name__}",
            "a module, a parameter, or a list of them",
        )  # fmt: skip
