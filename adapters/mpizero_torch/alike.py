"""Do replicas still hold the same parameters? Asked in each averaged pass, by one number."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from operator import attrgetter
from zlib import crc32

import numpy as np
import torch
from torch import nn

from mpizero import MismatchError, World
from mpizero.diagnostics.views import name
from mpizero.engine import MARKS, News
from mpizero_torch import slices

# Relative to a parameter's largest element. Processors of several kinds round updates differently,
# and training lets such differences grow; an update that only some ranks made is larger.
_ROUNDING = 1e-5

# Two primes: in each pass another parameter's element is looked at, and another one of its own.
_NEXT_PARAMETER, _NEXT_ELEMENT = 7919, 104729


class Alike:
    """This rank's parameters, as they were when gradients were last averaged.

    torch counts the writes to each tensor: a rank that has left an optimizer's step out, or taken
    one more, has other counts. One element, another one in each pass, shows what counts do not: a
    learning rate of its own, say. Only where the ranks' numbers differ are contents compared, since
    a rank may write without changing anything (an average that is swapped in and out).
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        self._named = [(key, each) for key, each in named if each.numel()]
        self._parameters = [each for _, each in self._named if not each.is_inference()]
        self._passes = 0
        self._drifts = False
        self._count = self._writes()

    def mark(self) -> float:
        """A number for what was written since the last pass; equal if the same was."""
        count, before = self._writes(), self._count
        self._count = count
        told = f"{count - before} {None if self._drifts else self._element()!r}"
        return float(crc32(told.encode()) % MARKS)

    def check(self, world: World, told: News, active: bool) -> None:
        """After a pass: MismatchError if ranks that took part hold other parameters. Collective.

        ``active``: had this rank a pass of its own?
        """
        self._passes += 1
        if told.marks_differ:
            self._compare(world, active)

    def _writes(self) -> int:
        return sum(map(attrgetter("_version"), self._parameters))

    def _element(self) -> complex | None:
        if not self._parameters:
            return None
        passes = self._passes
        chosen = self._parameters[passes * _NEXT_PARAMETER % len(self._parameters)]
        own = slices.local(chosen).detach()
        if not own.numel() or own.device.type != "cpu" or not chosen.requires_grad:
            return None  # on a GPU it would be waited for
        at = np.unravel_index(passes * _NEXT_ELEMENT % own.numel(), own.shape)
        found: complex = own[at].item()
        return found

    @torch.no_grad()
    def _compare(self, world: World, active: bool) -> None:
        root = world.gather_objects(active).index(True)
        worst, where = 0.0, ""
        for key, parameter in self._named:
            own = slices.local(parameter).detach()
            theirs = own.clone(memory_format=torch.contiguous_format)
            world.broadcast(theirs, root)
            apart = _distance(own, theirs) if active else 0.0
            if apart > worst:
                worst, where = apart, key
        found = world.gather_objects((worst, where))
        others = [rank for rank, (apart, _) in enumerate(found) if apart]
        if not others:
            return
        apart, where = max(found)
        said = (
            f"the parameters of {name(others)} are not those of rank {root} any more: '{where}' "
            f"differs by {apart:.2g} of its largest element."
        )
        if apart <= _ROUNDING:
            self._drifts = True
            if world.rank == root:
                warnings.warn(
                    f"{said} Updates are rounded differently there (other processors or "
                    "libraries?). Broadcast the parameters now and then, or train with mz.zero, "
                    "where each is updated once.",
                    stacklevel=2,
                )
            return
        raise MismatchError(
            f"backward(): {said} Since gradients were last averaged the ranks have done different "
            "things: one has left out an optimizer's step, by its own loss perhaps, or has another "
            "learning rate, or has loaded or changed weights. Decide such things on all ranks "
            "alike (world.allreduce() of what decides), and change weights on all."
        ).told_by(world.rank == root)


def _distance(own: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest element; infinite if one is not finite."""
    if torch.equal(own, theirs):
        return 0.0
    wide = torch.complex128 if own.is_complex() else torch.float64
    mine, other = own.to(wide), theirs.to(wide)
    both_nan = mine.isnan() & other.isnan()
    apart = float((mine - other).abs().masked_fill(both_nan, 0.0).max())
    largest = float(other.abs().nan_to_num(0.0).max())
    relative = apart / largest if largest else apart
    return relative if np.isfinite(relative) else float("inf")
