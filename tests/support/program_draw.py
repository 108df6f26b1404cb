"""What random programs are drawn from: settings, and choices for one step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from support.program_sides import LAYERS, After, Before, Joined, Saved, Shape

Events = Iterator[Before | After | Joined | Saved]


@dataclass(frozen=True)
class Setting:
    """What a program is about: its modules, how they are wrapped, and what else holds for it."""

    shapes: tuple[Shape, ...]
    options: tuple[dict[str, Any], ...]
    progress: str
    weights: str  # "never", "always", "mixed"
    optimizer: str
    hooks: str  # an optimizer's step in backward: "", "before" or "after" wrapping
    converts: bool

    def __str__(self) -> str:
        modules = ", ".join(
            f"m{number} = {shape} {options or ''}".rstrip()
            for number, (shape, options) in enumerate(zip(self.shapes, self.options, strict=True))
        )
        hooks = f", hooks {self.hooks} wrapping step in backward" if self.hooks else ""
        return f"{modules}; {self.optimizer}; progress {self.progress}{hooks}"


class Draw:
    """Random choices for one step."""

    def __init__(self, rng: random.Random, size: int, setting: Setting) -> None:
        self.rng, self.size, self.setting = rng, size, setting

    def one(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def often(self, share: float) -> bool:
        return self.rng.random() < share

    @property
    def model(self) -> int:
        return self.rng.randrange(len(self.setting.shapes))

    @property
    def chain(self) -> tuple[int, ...]:
        """The modules that a forward goes through, the first one last."""
        if len(self.setting.shapes) == 1:
            return self.one((0,), (0,), (0, 0))  # type: ignore[no-any-return]
        found: tuple[int, ...] = self.one((0, 1), (1, 0), (0,), (1,))
        return found

    def uses(self, same: bool) -> list[str]:
        """Which layers each rank uses."""
        choices = ("abc", "abc", "ab", "a", "c", "bc", "ba", "abab", "")
        if same:
            return [self.one(*choices[:-1])] * self.size
        return [self.one(*choices) for _ in range(self.size)]

    @property
    def some(self) -> list[int]:
        """Some ranks, perhaps all, perhaps none."""
        if self.often(0.3):
            return list(range(self.size))
        return [rank for rank in range(self.size) if self.often(0.5)]

    @property
    def layers(self) -> str:
        return "".join(name for name in LAYERS if self.often(0.5)) or self.one(*LAYERS)

    def weights(self, passes: int) -> list[list[float]] | None:
        kind = self.setting.weights
        if kind == "never" or (kind == "mixed" and self.often(0.5)):
            return None
        return [[self.one(0.0, 1.0, 2.5, 7.0) for _ in range(self.size)] for _ in range(passes)]
