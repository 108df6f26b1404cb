"""Models that are too large to be built on one rank: built without memory, filled in while sharded.

In ``with mz.deferred():`` a module's parameters have shapes and no values (torch's meta device).
``mz.zero`` then makes one module's at a time, as that module initialises them itself, and keeps
this rank's part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mpizero import ArgumentError, World
from mpizero_torch.replicate import start_alike

Initialise = Callable[[nn.Module], None]

_METHODS = ("reset_parameters", "_reset_parameters")


@contextmanager
def deferred() -> Iterator[None]:
    """Modules made in this context get no memory; ``mz.zero`` gives them theirs, sharded.

    Their parameters are then initialised by the ``reset_parameters`` method of the module that
    holds them, as torch's own modules have, or by ``mz.zero(..., initialise=...)``. What else a
    constructor writes into parameters or buffers is lost.
    """
    with torch.device("meta"):
        yield


class Initialiser:
    """Gives parameters their first values: rank 0's.

    Those that have memory are broadcast at once; others are made when ``prepare`` asks for one,
    with all of the module that holds it. Collective.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        world: World,
        initialise: Initialise | None,
    ) -> None:
        self._world, self._initialise = world, initialise
        self._holder: dict[int, tuple[str, nn.Module]] = {}
        for name, part in module.named_modules():
            for parameter in part.parameters(recurse=False):
                if parameter.is_meta:
                    self._holder.setdefault(id(parameter), (name, part))
            if any(each.is_meta for each in _own(part)):
                self._check(name, part)
        there = [each for each in (*parameters, *module.buffers()) if not each.is_meta]
        start_alike(there, world)
        for part in module.modules():
            if any(buffer.is_meta for buffer in part.buffers(recurse=False)):
                self._make(part)

    def prepare(self, parameter: nn.Parameter) -> None:
        """Let ``parameter`` have its values."""
        if parameter.is_meta:
            self._make(self._holder[id(parameter)][1])

    def _make(self, part: nn.Module) -> None:
        device = self._world.device.name
        for parameter in part.parameters(recurse=False):
            if parameter.is_meta:
                made = nn.Parameter(
                    torch.empty_like(parameter, device=device), parameter.requires_grad
                )
                # In place: optimizers and tied modules go on with the parameter they know.
                torch.utils.swap_tensors(parameter, made)
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                part._buffers[name] = torch.empty_like(buffer, device=device)
        with torch.no_grad():
            if self._initialise is not None:
                self._initialise(part)
            else:
                next(getattr(part, m) for m in _METHODS if hasattr(part, m))()
        start_alike([each for each in _own(part) if not each.is_meta], self._world)

    def _check(self, name: str, part: nn.Module) -> None:
        if self._initialise is None and not any(hasattr(part, method) for method in _METHODS):
            raise ArgumentError(
                "zero()", "model", f"'{name}', a {type(part).__name__} made in mz.deferred(), "
                "which does not know how to initialise its parameters",
                "modules with a method reset_parameters()",
                "Give it one, or pass initialise=, which is called with each such module.",
            )  # fmt: skip


def _own(part: nn.Module) -> list[torch.Tensor]:
    """A module's parameters and buffers, without its children's."""
    return [*part.parameters(recurse=False), *part.buffers(recurse=False)]
