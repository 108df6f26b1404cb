"""Stage 3 without shared parameters: when units are gathered and released.

A unit is gathered when a module that needs it begins its forward, or when somebody asks for the
values of its parameters, and released when that module is done. In backward it is gathered when
autograd comes to something of it that was saved, and released when the gradients of all its
parameters have come, or when two further units have been gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from mpizero import World
from mpizero.engine import ParameterMemory
from mpizero_torch import engine_runs, slices
from mpizero_torch.sharding.covered import register
from mpizero_torch.sharding.saved import Place, SavedTensors
from mpizero_torch.sharding.units import Unit, Where
from mpizero_torch.sharding.watched import WatchedParameters, watch_calls, when_backward_comes

_AT_ONCE = 2  # units that backward holds


class _Frame:
    """A module in forward, or another that needs units for a while, and those held for it."""

    def __init__(self, module: nn.Module | None = None, *, may_write: bool = False) -> None:
        self.module, self.may_write = module, may_write
        self.held: list[Unit] = []
        self.sees = False  # what autograd saves, by hooks of its own


class UnitSchedule:
    """Gathers and releases units as the module runs.

    ``memory`` is the engine's ParameterMemory, which the ranks of ``world`` gather together;
    ``units`` in the order in which forward, most likely, comes to them: while one is computed the
    next is gathered, where that takes messages. ``whole``: there are modules of which each rank may
    call other parts.
    """

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        parameters: Sequence[nn.Parameter],
        memory: ParameterMemory,
        world: World,
        whole: bool = False,
    ) -> None:
        self._units, self.memory, self._world = list(units), memory, world
        self._parameters = list(parameters)
        self._any_whole = whole
        self._unit_of = {
            id(self._parameters[index]): unit for unit in units for index in unit.members
        }
        # By the address of memory: the number of the unit and of its space that it belongs to.
        self.places: dict[int, tuple[int, int]] = {}
        self._number = {unit: number for number, unit in enumerate(self._units)}
        self._settle()
        self._saved = SavedTensors(self, any(slices.is_slice(each) for each in parameters))
        self._is_seen = True  # what autograd saves, in the forward under way
        self._stack: list[_Frame] = []
        self._lent: set[Unit] = set()
        self._asked: list[Unit] = []  # held for who last asked for values, of no module's forward
        self._backward: dict[Unit, set[int]] = {}  # held in backward: gradients not come yet
        self._run = -1  # of autograd's engine, whose end is awaited
        self._handles: list[Any] = []  # of hooks on modules: as many as there are, for good
        for part in module.modules():
            own = [self._unit_of[id(p)] for p in part.parameters(recurse=False)]
            own += [unit for unit in units if unit.root is part]
            self._handles += watch_calls(part, self, list(dict.fromkeys(own)))
            part._parameters = WatchedParameters(part._parameters, self)
        register(self._parameters, self.lend)

    @property
    def reduces_at_the_end(self) -> bool:
        """Must gradients wait for the end of backward?

        Where all ranks gather together, and each may get gradients of other parameters, they would
        not come to sums and gathers in the same order otherwise.
        """
        return self._any_whole and self.memory.sends_to_gather

    def taken(self, parameter: Any) -> None:
        """Somebody takes a parameter from a module: in a forward, it is needed."""
        if self._stack:
            unit = self._unit_of.get(id(parameter))
            if unit is not None:
                self._need(unit)

    def begin(self, module: nn.Module, own: Sequence[Unit]) -> None:
        """A module begins its forward, with these units' parameters for its own."""
        self._push(_Frame(module))
        for unit in own:
            self._need(unit)

    def end(self, module: nn.Module, output: Any) -> Any:
        """Its forward is over, or has failed; returns what to give back instead of ``output``."""
        frame = next((each for each in reversed(self._stack) if each.module is module), None)
        if frame is None:
            return None
        self._pop(frame)
        units = [unit for unit in frame.held if unit.has_parts]
        if units and self.memory.sends_to_gather and torch.is_grad_enabled():
            return when_backward_comes(output, lambda: self._come_to(units))
        return None

    @contextmanager
    def lend(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Let these have their values for an operation; they stay until others are asked for."""
        units = list(dict.fromkeys(self._unit_of[id(each)] for each in parameters))
        frame = _Frame()
        self._push(frame)
        try:
            for unit in units:
                self._hold(unit, frame)
            for unit in units:
                unit.wait()
            if units != self._asked:
                before, self._asked = self._asked, units
                for unit in units:
                    unit.uses += 1
                self._done(before)
            yield
        finally:
            self._pop(frame)

    def hold(self, indices: Collection[int]) -> Callable[[], None]:
        """Let these parameters be there, to be read and written, until the result is called."""
        wanted = set(indices)
        units = [unit for unit in self._units if not wanted.isdisjoint(unit.members)]
        frame = _Frame(may_write=True)
        self._push(frame)
        for unit in units:
            self._hold(unit, frame)
        for unit in units:
            unit.wait()

        def let_go() -> None:
            self._pop(frame)
            self.end_of_backward()
            self._settle()

        return let_go

    def recall(self, place: Place) -> torch.Tensor:
        """Backward has come to what was saved: gather it."""
        unit = self._units[place.unit]
        if place.changes != self.memory.changes:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a parameter of '{unit.name or 'the module'}' has changed "
                "since the forward of this pass (by the optimizer, or in mz.gathered())."
            )
        if engine_runs.current_run() == -1:  # somebody looks at the graph
            with self.lend([unit.parameters[0][0]]):
                pass
        else:
            self._hold_in_backward(unit)
        _, whole = unit.spaces[place.space]
        return whole.view(place.offset, place.size, place.stride, place.dtype)

    def gradient_came(self, index: int) -> None:
        """In backward: the gradient of a parameter has been computed."""
        # Where all ranks gather together, they hold the same: even if they get other gradients.
        if self._backward and not self.memory.sends_to_gather:
            unit = self._unit_of[id(self._parameters[index])]
            coming = self._backward.get(unit)
            if coming is not None:
                coming.discard(index)
                if not coming:
                    del self._backward[unit]
                    self._done([unit])

    def end_of_backward(self) -> None:
        """Backward, and whoever has asked for values beside it, need nothing any more."""
        units = [*self._backward, *self._asked]
        self._backward.clear()
        self._asked = []
        self._run = -1
        self._done(units)
        self._release_unused()

    def before_update(self) -> None:
        """What has been gathered is about to be old."""
        if self._stack:  # left behind by an exception
            self._pop(self._stack[0])
        self.end_of_backward()

    def after_update(self) -> None:
        """Let those who still hold the memory of units see the new values. Collective."""
        lent = [unit.state is Where.LENT for unit in self._units]
        if self.memory.sends_to_gather:
            anywhere = np.array(lent, np.int32)
            self._world.allreduce(anywhere, "max")
            lent = [bool(each) for each in anywhere]
        for unit, is_lent in zip(self._units, lent, strict=True):
            if is_lent:
                unit.refresh(self.memory)
                unit.release()

    def _need(self, unit: Unit) -> None:
        """Hold a unit for the module that it belongs to, or else for the one that is running."""
        if not unit.shown:
            root = unit.root
            frame = next((each for each in self._stack if each.module is root), self._stack[-1])
            self._hold(unit, frame)
            self._gather_next(unit)
        unit.wait()

    def _hold(self, unit: Unit, frame: _Frame) -> None:
        unit.gather(self.memory)
        unit.uses += 1
        unit.is_exposed |= not self._is_seen
        frame.held.append(unit)
        unit.show()

    def _gather_next(self, unit: Unit) -> None:
        """While this one is computed, the next one travels."""
        following = self._number[unit] + 1
        if unit.state is Where.GATHERING and following < len(self._units):
            self._units[following].gather(self.memory)

    def _hold_in_backward(self, unit: Unit) -> None:
        run = engine_runs.current_run()
        if run != self._run:
            self._run = engine_runs.at_end(-1, self.end_of_backward)
        if unit in self._backward:
            return
        unit.gather(self.memory)
        unit.uses += 1
        unit.wait()
        if len(self._backward) == _AT_ONCE:
            oldest = next(iter(self._backward))
            del self._backward[oldest]
            self._done([oldest])
        self._backward[unit] = set(unit.members)

    def _come_to(self, units: Sequence[Unit]) -> None:
        """In backward all ranks come to a module, of which each may have called other parts."""
        for unit in units:
            self._hold_in_backward(unit)

    def _push(self, frame: _Frame) -> None:
        if not self._stack and self._backward and engine_runs.current_run() == -1:
            self.end_of_backward()  # one that an exception has ended
        self._is_seen, frame.sees = self._saved.open()
        self._stack.append(frame)

    def _pop(self, frame: _Frame) -> None:
        """A frame has ended, and with it those above it, whose ends nobody has heard of."""
        if frame not in self._stack:
            return
        at = self._stack.index(frame)
        ended = self._stack[at:]
        del self._stack[at:]
        for each in reversed(ended):
            if each.sees:
                self._saved.close()
            try:
                for unit in each.held:
                    unit.cover(written=each.may_write)
            finally:
                self._done(each.held)
        if not self._stack:
            self._release_unused()

    def _done(self, units: Sequence[Unit]) -> None:
        for unit in units:
            unit.uses -= 1
            if not unit.uses:
                self._release(unit)
        for unit in list(self._lent):
            self._release(unit)

    def _release_unused(self) -> None:
        for unit in self._units:
            if not unit.uses:
                self._release(unit)

    def _release(self, unit: Unit) -> None:
        if unit.uses:
            self._lent.discard(unit)
            return
        addresses = unit.addresses
        unit.release()
        if unit.addresses != addresses:
            self._note_places()
        if unit.state is Where.LENT:
            self._lent.add(unit)
        else:
            self._lent.discard(unit)

    def _settle(self) -> None:
        for unit in self._units:
            if not unit.shown:
                unit.settle([self._parameters[index] for index in unit.members])
        self._note_places()

    def _note_places(self) -> None:
        self.places.clear()
        for number, unit in enumerate(self._units):
            for at, address in enumerate(unit.addresses):
                self.places[address] = (number, at)
