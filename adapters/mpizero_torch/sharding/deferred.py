"""First values for the parameters of models that are too large for one rank, while sharding them.

A model that was built in ``mz.deferred()`` has no memory: its parameters get the values that their
constructors have written one at a time, and each rank keeps its part. One that was built on torch's
meta device has nothing written: a module's parameters are made as it initialises them itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mpizero import ArgumentError, World
from mpizero_torch import building
from mpizero_torch.replicate import start_alike

Initialise = Callable[[nn.Module], None]

_METHODS = ("reset_parameters", "_reset_parameters")


class Initialiser:
    """Gives parameters their first values: rank 0's.

    Those that have memory are broadcast at once; others are made when ``prepare`` asks for one:
    with ``initialise``, with all of the module that holds it. Collective.
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
        self._names: dict[int, str] = {}
        for name, part in module.named_modules():
            for own, parameter in part.named_parameters(recurse=False):
                self._names.setdefault(id(parameter), f"{name}.{own}".lstrip("."))
                if _lacks_values(parameter):
                    self._holder.setdefault(id(parameter), (name, part))
            if any(each.is_meta for each in _own(part)):
                self._check(name, part)
        there = [each for each in (*parameters, *module.buffers()) if not _lacks_values(each)]
        start_alike(there, world)
        for name, part in module.named_modules():
            if any(map(_lacks_values, part.buffers(recurse=False))):
                self._make(name, part)

    def prepare(self, parameter: nn.Parameter) -> None:
        """Let ``parameter`` have its values."""
        if building.is_hollow(parameter) and self._initialise is None:
            building.fill(parameter, self._names[id(parameter)])
            self._take_along([parameter])
        elif _lacks_values(parameter):
            self._make(*self._holder[id(parameter)])

    def _make(self, name: str, part: nn.Module) -> None:
        """Make all that a module holds itself."""
        everything: list[tuple[str, torch.Tensor]] = list(part.named_parameters(recurse=False))
        everything += part.named_buffers(recurse=False)
        made = [(own, each) for own, each in everything if _lacks_values(each)]
        written = all(building.is_hollow(each) for _, each in made)
        for own, each in made:
            if not building.is_hollow(each):
                self._place(name, part, own, each)
            elif self._initialise is None:
                building.fill(each, f"{name}.{own}".lstrip("."))
            else:
                building.fill_or_mark(each)
        with torch.no_grad():
            if self._initialise is not None:
                self._initialise(part)
            elif not written:
                next(getattr(part, m) for m in _METHODS if hasattr(part, m))()
        for own, _ in made:
            building.check_filled(getattr(part, own), f"{name}.{own}".lstrip("."))
        self._take_along([each for each in _own(part) if not _lacks_values(each)])

    def _take_along(self, tensors: Sequence[torch.Tensor]) -> None:
        """Let new tensors be on the ranks' devices, and everywhere the same."""
        device = torch.device(self._world.device.name)
        for each in tensors:
            if each.device.type != device.type:
                each.data = each.data.to(device)
        start_alike(tensors, self._world)

    def _place(self, name: str, part: nn.Module, own: str, tensor: torch.Tensor) -> None:
        """Give one of torch's meta device memory."""
        made = torch.empty_like(tensor, device=self._world.device.name)
        building.mark(made)
        if not isinstance(tensor, nn.Parameter):
            part._buffers[own] = made
            return
        if weakref.getweakrefs(tensor):
            raise ArgumentError(
                "zero()", "model", f"'{name}', a {type(part).__name__} on torch's meta device, "
                "which keeps weak references to its parameters",
                "one that was built inside `with mz.deferred():`",
            )  # fmt: skip
        # In place: optimizers and tied modules go on with the parameter they know.
        torch.utils.swap_tensors(tensor, nn.Parameter(made, tensor.requires_grad))

    def _check(self, name: str, part: nn.Module) -> None:
        if self._initialise is None and not any(hasattr(part, method) for method in _METHODS):
            raise ArgumentError(
                "zero()", "model", f"'{name}', a {type(part).__name__} on torch's meta device, "
                "which does not know how to initialise its parameters",
                "modules with a method reset_parameters(), or built inside `with mz.deferred():`",
                "Or pass initialise=, which is called with each such module.",
            )  # fmt: skip


def check_lazy(function: str, module: nn.Module) -> None:
    """Raise ArgumentError for a module that has yet to see an input to know its parameters."""
    for name, part in module.named_modules():
        if any(map(is_lazy, _own(part))):
            raise ArgumentError(
                function, "model", f"'{name}', a {type(part).__name__}, whose parameters have no "
                "shapes yet", "parameters with shapes",
                "Let the model see an input first: model(example), inside `with mz.deferred():` "
                "if it was built there.",
            )  # fmt: skip


def _lacks_values(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or building.is_hollow(tensor)


def _own(part: nn.Module) -> list[torch.Tensor]:
    """A module's parameters and buffers, without its children's."""
    return [*part.parameters(recurse=False), *part.buffers(recurse=False)]
