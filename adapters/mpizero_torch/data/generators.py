"""The random numbers that a sampler draws, as values that a checkpoint can hold."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

_DEPTH = 3  # of samplers within samplers


class Generators:
    """The generators of a sampler's own (and of samplers in it), and the process's global ones."""

    def __init__(self, sampler: Any) -> None:
        self._own = dict(_found(sampler, "", 0))

    def own(self) -> dict[str, Any]:
        """What the sampler's own will draw next."""
        return {name: _state(each) for name, each in self._own.items()}

    def all(self) -> dict[str, Any]:
        """The same, and what the global ones will: of use for what is drawn from here on only."""
        return {**self.own(), **{f"global.{name}": _state(each) for name, each in _GLOBAL.items()}}

    def set(self, states: Mapping[str, Any], with_global: bool) -> None:
        """Let them draw what they drew at that time."""
        known = {**self._own, **{f"global.{name}": each for name, each in _GLOBAL.items()}}
        for name, state in states.items():
            if name in known and (with_global or name in self._own):
                _set(known[name], state)


def _found(sampler: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    for name, each in dict(getattr(sampler, "__dict__", {})).items():
        if isinstance(each, _KINDS):
            yield f"{path}{name}", each
        elif isinstance(each, Sampler) and depth < _DEPTH:
            yield from _found(each, f"{path}{name}.", depth + 1)


_KINDS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_GLOBAL: dict[str, Any] = {"python": random, "numpy": np.random, "torch": torch.default_generator}


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().copy()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState) or generator is np.random:
        return generator.get_state(legacy=False)
    version, words, gauss = generator.getstate()
    return [version, np.array(words, np.uint32), gauss]


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.as_tensor(np.array(state)))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState) or generator is np.random:
        generator.set_state(state)
    else:
        version, words, gauss = state
        generator.setstate((version, tuple(int(each) for each in words), gauss))
