"""The random numbers that a sampler draws: apart from the program's, and as values to save."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
        """The same, and what the global ones will."""
        return {**self.own(), **{f"global.{name}": _state(each) for name, each in _GLOBAL.items()}}

    def set_own(self, states: Mapping[str, Any]) -> None:
        """Let the sampler's own draw what they drew at that time."""
        _set_all(self._own, states)

    def set(self, states: Mapping[str, Any]) -> None:
        """Let all draw what they drew at that time."""
        self.set_own(states)
        _set_all({f"global.{name}": each for name, each in _GLOBAL.items()}, states)


def are_of_an_epoch(states: Mapping[str, Any]) -> bool:
    """Are they from where an epoch began (with the global ones), rather than from between two?"""
    return any(name.startswith("global.") for name in states)


class Apart:
    """A course of the process's global generators of its own, which begins where they are.

    For what one rank alone draws: the program's own course stays that of the other ranks, and what
    is drawn does not depend on what the program draws meanwhile.
    """

    def __init__(self) -> None:
        self._course = _course()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """In here the global generators are on this course, and go on with it next time."""
        programs = _course()
        _follow(self._course)
        try:
            yield
        finally:
            self._course = _course()
            _follow(programs)


def advance() -> None:
    """Let the global generators be elsewhere than what has begun where they were."""
    random.random(), np.random.random(), torch.empty((), dtype=torch.int64).random_()


def _course() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _follow(course: tuple[Any, Any, torch.Tensor]) -> None:
    random.setstate(course[0])
    np.random.set_state(course[1])
    torch.set_rng_state(course[2])


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


def _set_all(generators: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    for name, each in generators.items():
        if name in states:
            _set(each, states[name])


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
