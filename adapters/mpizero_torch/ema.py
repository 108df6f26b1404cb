"""``EMA``: a moving average of a model's parameters, of which each rank keeps its part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError, MpizeroError, World
from mpizero_torch import names, tensors
from mpizero_torch.runtime import init
from mpizero_torch.sharding import ShardedModule
from mpizero_torch.wrapper import DistributedModule


@dataclass(frozen=True)
class Kept:
    """The average of a parameter's elements from ``start`` on, and how to find these now."""

    name: str
    start: int
    average: torch.Tensor


class EMA:
    """An exponential moving average of ``model``'s parameters (Polyak and Juditsky, 1992).

    Call ``update()`` after each step of the optimizer: average = decay * average + (1 - decay) *
    parameter. Each rank keeps the average of its own part, at any stage and with replicas, in
    float32 where parameters have 16 bits; with ``precision=`` it is that of the float32 masters.
    It begins as the parameters are now. Buffers, and parameters that are no floating-point
    numbers or in none of a sharded optimizer's groups, are used as they are.

    ``mz.save(..., ema=ema)`` and ``mz.load(..., ema=ema)`` keep it in a checkpoint, for any number
    of ranks: ``ema.safetensors`` has the parameters' names.

    Raises ArgumentError for a decay that is not in [0, 1], and for a model along several axes of a
    mesh.
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.999, *, world: World | None = None
    ) -> None:
        if not 0 <= decay <= 1:
            raise ArgumentError("EMA()", "decay", str(decay), "a number from 0 to 1")
        self._model = names.uncompiled(model)
        if isinstance(self._model, DistributedModule):
            self.world = self._model.world
        else:
            self.world = world if world is not None else init()
        if self.world.mesh is not None:
            raise ArgumentError("EMA()", "model", "one on a mesh of ranks", "one without a mesh")
        self.decay, self.updates = float(decay), 0
        self._kept: dict[tuple[str, int], Kept] = {}
        self._swapped = False
        self._follow(lambda average, value: average.copy_(value))

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters as they are now into the average. Sends nothing."""
        if self._swapped:
            raise MpizeroError("EMA.update() inside average(): the parameters are the average.")
        self.updates += 1

        def follow(average: torch.Tensor, value: torch.Tensor) -> None:
            average.mul_(self.decay).add_(value.to(average.dtype), alpha=1 - self.decay)

        self._follow(follow)

    @contextmanager
    def average(self) -> Iterator[None]:
        """In here the model has the averaged parameters: to evaluate, not to train. Collective."""
        if self._swapped:
            raise MpizeroError("EMA.average() inside average(): the parameters are the average.")
        with torch.no_grad(), self.world.together("EMA.average()"):
            before = self._swap_in()
        self._swapped = True
        try:
            yield
        finally:
            self._swapped = False
            with torch.no_grad(), self.world.together("EMA.average()"):
                self._write(before)

    def state_dict(self, root: int | None = None) -> dict[str, Any]:
        """The decay, the number of updates and all of the averages by name. Collective.

        On every rank, or on ``root`` only ({} elsewhere).
        """
        found: dict[str, torch.Tensor] = {}
        wanted = root is None or root == self.world.rank
        with torch.no_grad(), self.world.together("EMA.state_dict()"):
            for name, whole in self._wholes():
                if wanted:
                    found[name] = whole
        if not wanted:
            return {}
        return {"decay": self.decay, "updates": self.updates, "average": found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a ``state_dict()``, which every rank is given; each keeps its part."""
        given = state["average"]

        def read(name: str, elements: slice) -> torch.Tensor:
            whole: torch.Tensor = given[name]
            return whole.reshape(-1)[elements]

        self.take({name: tuple(value.shape) for name, value in given.items()}, read)
        self.decay, self.updates = float(state["decay"]), int(state["updates"])

    def take(
        self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str, slice], torch.Tensor]
    ) -> None:
        """Have averages that ``read(name, elements)`` gives, of parameters of these shapes."""
        for name, own in self.shapes.items():
            if shapes.get(name, None) != own:
                given = f"of shape {shapes[name]}" if name in shapes else "missing"
                raise ArgumentError("EMA", f"average of '{name}'", given, f"shape {own}")
        with torch.no_grad():
            for each in self._kept.values():
                elements = slice(each.start, each.start + each.average.numel())
                each.average.copy_(read(each.name, elements))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the averaged parameters, by name."""
        averaged = self._averaged()
        return {name: tuple(parameter.shape) for name, parameter in averaged.items()}

    def kept(self) -> list[Kept]:
        """What this rank speaks for: together the ranks have every element once."""
        if isinstance(self._model, ShardedModule) and not self._model.state.group.is_holder:
            return []
        return list(self._kept.values())

    @property
    def is_shared(self) -> bool:
        """Do ranks keep parts of it? Not of a plain model, which every rank has for itself."""
        return isinstance(self._model, DistributedModule)

    def dtype(self, name: str) -> torch.dtype:
        """In which the average of a parameter is kept."""
        own = self._averaged()[name].dtype
        return torch.float32 if own.itemsize < 4 else own

    def _averaged(self) -> dict[str, torch.Tensor]:
        """The parameters that it follows, tied ones once."""
        if isinstance(self._model, ShardedModule):
            state = self._model.state
            trained = {index for own in state.trained for index in own.space.members}
            named = [each for index, each in enumerate(state.named) if index in trained]
        else:
            inner = (
                self._model.module if isinstance(self._model, DistributedModule) else self._model
            )
            named = list(names.named_parameters(inner))
        return {name: each for name, each in named if each.is_floating_point()}

    def _parts(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """This rank's part of the parameters as they are trained, 1-D, to read and to write."""
        averaged = self._averaged()
        if isinstance(self._model, ShardedModule):
            state = self._model.state
            for index, elements, values in state.pieces():
                if state.named[index][0] in averaged:
                    yield state.named[index][0], elements.start, tensors.as_tensor(values)
            return
        rank, size = self.world.rank, self.world.size
        if not self.is_shared:
            rank, size = 0, 1  # every rank has a model of its own
        for name, parameter in averaged.items():
            start, stop = (parameter.numel() * at // size for at in (rank, rank + 1))
            yield name, start, parameter.detach().reshape(-1)[start:stop]

    def _follow(self, follow: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        with torch.no_grad():
            for name, start, values in self._parts():
                found = self._kept.get((name, start))
                if found is None or found.average.numel() != values.numel():
                    # New, or trained from now on: until now it has been what it is.
                    average = values.to(self.dtype(name), copy=True)
                    self._kept[name, start] = Kept(name, start, average)
                else:
                    follow(found.average, values)

    def _wholes(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The averages, put together one by one. Collective."""
        by_name: dict[str, list[Kept]] = {}
        for each in self.kept():
            by_name.setdefault(each.name, []).append(each)
        alone = not self.is_shared
        for name, parameter in self._averaged().items():
            device = self.world.device.name if not alone else parameter.device
            whole = torch.zeros(parameter.shape, dtype=self.dtype(name), device=device)
            for each in by_name.get(name, ()):
                whole.view(-1)[each.start : each.start + each.average.numel()] = each.average
            yield name, whole if alone else self.world.allreduce(whole)

    def _swap_in(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Let the model have the average; returns where something was, and what."""
        before: list[tuple[torch.Tensor, torch.Tensor]] = []
        if isinstance(self._model, ShardedModule):
            self._model.follow("EMA.average()", sure=True)
            pieces = [(values, self._kept[name, start].average)
                      for name, start, values in self._parts()
                      if (name, start) in self._kept]  # fmt: skip
        else:
            averaged = self._averaged()
            pieces = [(averaged[name].detach(), whole) for name, whole in self._wholes()]
        for values, _ in pieces:
            before.append((values, values.clone()))
        self._write(pieces)
        return before

    def _write(self, pieces: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        sharded = self._model if isinstance(self._model, ShardedModule) else None
        with nullcontext() if sharded is None else sharded.changing("EMA.average()"):
            for values, new in pieces:
                values.copy_(new)
