"""Which rank keeps what of an optimizer's state: found from what depends on what.

State of several parameters whose updates depend on each other's state belongs together; each such
*group* has one owner, who alone keeps its state and computes its updates. What is small and depends
on no group (step counters, keys, learning rates) is kept and computed on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from mpizero import ArgumentError
from mpizero.adapting import ParameterSpec, balanced_owners

# Kept everywhere, where that is possible: less is not worth a message.
_SMALL = 64  # elements

EVERYWHERE = -1


@dataclass(frozen=True)
class Ownership:
    """``state[j]``, ``updates[i]``: the rank that has it, or EVERYWHERE."""

    state: tuple[int, ...]
    updates: tuple[int, ...]

    @classmethod
    def of(
        cls,
        forms: Sequence[Any],
        state_needs: Sequence[int],
        update_needs: Sequence[int],
        ranks: int,
    ) -> Ownership:
        """``state_needs[j]``: on which state (as bits) the next ``state[j]`` depends, and so on."""
        common = _common(forms, state_needs)
        groups = _Groups(len(forms))
        for at, needs in enumerate(state_needs):
            if not common >> at & 1:
                groups.join([at, *_bits(needs & ~common)])
        for needs in update_needs:
            groups.join(_bits(needs & ~common))
        names = sorted({groups.of(at) for at in range(len(forms)) if not common >> at & 1})
        _check_apart(names, groups, update_needs, common)
        bytes_of = dict.fromkeys(names, 0)
        for at, form in enumerate(forms):
            if not common >> at & 1:
                bytes_of[groups.of(at)] += prod(form.shape) * form.dtype.itemsize
        specs = [ParameterSpec(str(n), (bytes_of[n],), np.dtype(np.uint8)) for n in names]
        owner = dict(zip(names, balanced_owners(specs, ranks), strict=True))
        state = tuple(
            EVERYWHERE if common >> at & 1 else owner[groups.of(at)] for at in range(len(forms))
        )
        updates = tuple(
            next((state[at] for at in _bits(needs & ~common)), EVERYWHERE) for needs in update_needs
        )
        return cls(state, updates)


def _common(forms: Sequence[Any], needs: Sequence[int]) -> int:
    """What every rank keeps, as bits: small, and depending on nothing else but such."""
    common = sum(1 << at for at, form in enumerate(forms) if prod(form.shape) <= _SMALL)
    while True:
        left = sum(1 << at for at in _bits(common) if not needs[at] & ~common)
        if left == common:
            return common
        common = left


def _check_apart(
    names: Sequence[int], groups: _Groups, update_needs: Sequence[int], common: int
) -> None:
    """One group for several parameters' updates: nothing would be shared out."""
    some = [needs & ~common for needs in update_needs if needs & ~common]
    if len(names) == 1 and len(some) > 1:
        raise ArgumentError(
            "zero()", "transformation",
            "one in which the update of every parameter depends on the state of all others",
            "one whose state can be parted among the ranks (most of Optax: not lbfgs, not prodigy)",
            "Use it as it is, without zero().",
        )  # fmt: skip


def _bits(mask: int) -> list[int]:
    return [at for at in range(mask.bit_length()) if mask >> at & 1]


class _Groups:
    """Sets of numbers, joined by and by."""

    def __init__(self, count: int) -> None:
        self._above = list(range(count))

    def of(self, at: int) -> int:
        while self._above[at] != at:
            self._above[at] = self._above[self._above[at]]
            at = self._above[at]
        return at

    def join(self, members: Sequence[int]) -> None:
        for each in members[1:]:
            self._above[self.of(each)] = self.of(members[0])
