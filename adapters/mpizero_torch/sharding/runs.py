"""What a torch optimizer sees under sharding: this rank's part of the parameters, as parameters.

A *run* is memory of this rank's shard that can be updated as one tensor: a slice of a segment
(partition "flat"), or a whole parameter (partition "parameter"). A run that covers several
parameters is cut when their fates part: when one of them gets a gradient in a step and another
does not, an optimizer must leave the second, with its state, alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError
from mpizero.engine import Space
from mpizero_torch import tensors
from mpizero_torch.sharding.stand_in import OwnGradient, PartOfGradient, ShardedGradient


@dataclass(frozen=True)
class Piece:
    """The elements ``elements`` (C order) of parameter ``index``, at ``place`` of a run."""

    index: int
    elements: slice
    place: slice


@dataclass(eq=False)
class Run:
    """Memory that is updated as one: ``parameter``, its ``gradient``, and what lies in it.

    ``home``: the number of its space among those of the optimizer, of the segment (or the
    parameter, if it is a whole one), and where it begins there. ``is_cut``: parameters may begin
    and end anywhere in it.
    """

    parameter: nn.Parameter
    gradient: torch.Tensor
    pieces: tuple[Piece, ...]
    group: int  # of the optimizer's groups
    home: tuple[int, int, int]
    is_all: bool = False  # does one rank hold all there is?
    has_gradient: bool = False  # since it was last forgotten
    is_cut: bool = False
    copy: torch.Tensor | None = None  # of the gradient, in a file
    _shown: tuple[torch.Tensor, torch.Tensor] | None = None  # the gradient, and what shows it

    def receive(self) -> None:
        """The gradient's memory holds a gradient now."""
        self.has_gradient = True
        self.show()

    def show(self) -> None:
        """Let ``.grad`` be what the program may see of it."""
        self.parameter.grad = self.shown if self.has_gradient else None

    def lend(self) -> None:
        """Let the optimizer, in its step, have the gradient itself."""
        if self.has_gradient and self.is_direct:
            self.parameter.grad = self.gradient

    def take_changes(self) -> None:
        """The program may have put another gradient in its place."""
        given = self.parameter.grad
        if given is not None and given is not self.shown:
            self.gradient.copy_(given)
            self.parameter.grad = self.shown

    @property
    def shown(self) -> torch.Tensor:
        """What ``.grad`` is outside of a step: a part, of which no sum over all can be made."""
        if self._shown is None or self._shown[0] is not self.gradient:
            found = self.gradient
            if not self.is_direct:
                found = ShardedGradient.for_parameter(self.parameter)
            else:
                found = found.as_subclass(OwnGradient if self.is_all else PartOfGradient)
            self._shown = self.gradient, found
        return self._shown[1]

    def forget(self) -> None:
        self.has_gradient = False
        self.parameter.grad = None

    @property
    def is_direct(self) -> bool:
        """Can the optimizer use the gradient as it is? (Not a 16-bit one for float32 masters.)"""
        return (
            self.gradient.dtype == self.parameter.dtype
            and self.gradient.device == self.parameter.device
        )


def slice_runs(
    space: Space,
    number: int,
    group: int,
    part: int,
    values: Sequence[Any],
    gradients: Sequence[Any],
) -> Iterable[Run]:
    """A run for each segment. ``values``, ``gradients``: the memory of the part's block of each.

    ``number``: of the space; ``group``: the optimizer's.
    """
    for at, (segment, block, gradient) in enumerate(
        zip(space.segments, values, gradients, strict=True)
    ):
        if block.size == 0:
            continue
        own = segment.block(part)
        found = [(index, space.layout.overlap(str(index), own)) for index in segment.members]
        pieces = tuple(Piece(index, *overlap) for index, overlap in found if overlap is not None)
        parameter = nn.Parameter(tensors.as_tensor(block))
        gradient = tensors.as_tensor(gradient)
        yield Run(parameter, gradient, pieces, group, (number, at, 0), is_cut=True)


def parameter_runs(
    space: Space,
    number: int,
    group: int,
    part: int,
    values: Callable[[int], Any],
    gradients: Callable[[int], Any],
) -> Iterable[Run]:
    """A run for each parameter that is the part's; ``values(index)``: all of its memory."""
    for index in space.members:
        if space.owned_place(index, part) is not None:
            shape = space.shape(index)
            parameter = nn.Parameter(tensors.as_tensor(values(index)).view(shape))
            gradient = tensors.as_tensor(gradients(index)).view(shape)
            count = parameter.numel()
            whole = Piece(index, slice(0, count), slice(0, count))
            yield Run(parameter, gradient, (whole,), group, (number, index, 0))


def split(runs: Sequence[Run], fate: Callable[[int], Hashable], state: dict[Any, Any]) -> list[Run]:
    """Cut the runs where neighbouring parameters differ in ``fate(index)``.

    ``state`` is the optimizer's, by parameter: the parts of a run go on with their parts of it.
    """
    result: list[Run] = []
    for run in runs:
        fates = [fate(piece.index) for piece in run.pieces]
        result += [run] if len(set(fates)) < 2 else _cut(run, fates, state)
    return result


def _cut(run: Run, fates: Sequence[Hashable], state: dict[Any, Any]) -> list[Run]:
    parts: list[Run] = []
    count = run.parameter.numel()
    together = [
        [piece for _, piece in same]
        for _, same in groupby(zip(fates, run.pieces, strict=True), key=lambda pair: pair[0])
    ]
    # Padding goes with what it follows.
    bounds = [0, *(pieces[0].place.start for pieces in together[1:]), count]
    before = state.pop(run.parameter, {})
    for pieces, (start, stop) in zip(together, pairwise(bounds), strict=True):
        parameter = nn.Parameter(run.parameter.detach()[start:stop])
        moved = tuple(
            Piece(p.index, p.elements, slice(p.place.start - start, p.place.stop - start))
            for p in pieces
        )
        number, segment, offset = run.home
        home = number, segment, offset + start
        part = Run(
            parameter, run.gradient[start:stop], moved, run.group, home, run.is_all, is_cut=True
        )
        if run.has_gradient:
            part.receive()
        if before:
            state[parameter] = {
                key: _part_of_state(key, value, count, start, stop) for key, value in before.items()
            }
        parts.append(part)
    return parts


def _part_of_state(key: str, value: Any, count: int, start: int, stop: int) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() == 1 and value.numel() == count:
        return value[start:stop]
    if value.numel() > 1:
        raise not_by_element("optimizer", key, tuple(value.shape))
    return value.clone()


def not_by_element(function: str, key: str, shape: tuple[int, ...]) -> ArgumentError:
    """The error for state that cannot be cut, nor put together, where parameters are."""
    return ArgumentError(
        function, "partition", f"'flat' for an optimizer whose state '{key}' has shape {shape}, "
        "neither one number for each element nor one for all",
        "partition='parameter'", "mz.zero(..., partition='parameter') gives it whole parameters, "
        "whose state may have any shape.",
    )  # fmt: skip
