"""``elastic``: a function that is called again, with a smaller World, when a rank has died."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Generic, Protocol, TypeVar

from mpizero.api import World, reform
from mpizero.errors import LaunchError, RankDiedError
from mpizero.world import survival


class Beginning(Protocol):
    """The state of a training, which can begin on any World."""

    def begin(self, world: World) -> None:
        """Be as it was last committed, on the ranks of ``world``. Collective."""

    def leave(self) -> None:
        """Let go of what belongs to the World of before, of which a rank has died."""


T = TypeVar("T")
S = TypeVar("S", bound=Beginning)


def elastic(train: Callable[[S], T]) -> Callable[[S], T]:
    """Let ``train(state)`` survive the death of ranks.

    When a process of the job dies, ``train`` is left by an exception on all others, wherever they
    are: in the middle of a step, too. They form a new World, ``state`` begins on it as it was last
    committed, and ``train`` is called again. That holds for any number of deaths, one after the
    other or together, to the last rank. ``train`` returns when it has on all ranks.

    An exception of the program's own still ends the whole job, and so does a ``sys.exit`` with a
    status other than 0. Only what happens under this decorator is survived.

    Raises LaunchError if the job was not begun with ``init(elastic=True)``.
    """

    @wraps(train)
    def run(state: S) -> T:
        world = reform.current()
        if world is None:
            raise LaunchError("@elastic: call init(elastic=True) first.")
        while True:
            outcome = _attempt(partial(_train, train, state, world))
            if reform.finished(outcome.death) and outcome.result:
                return outcome.result[0]
            state.leave()
            world = _reform()

    return run


def _train(train: Callable[[S], T], state: S, world: World) -> T:
    state.begin(world)
    return train(state)


def _reform() -> World:
    """A World of those who are left, also if more die while it is being formed."""
    while True:
        outcome = _attempt(reform.reform)
        if outcome.result:
            return outcome.result[0]
        reform.finished(outcome.death)


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What was returned, in a list; or what tells that a rank has died."""

    result: list[T]
    death: RankDiedError | None


def _attempt(action: Callable[[], T]) -> _Outcome[T]:
    try:
        return _Outcome([action()], None)
    except BaseException as error:
        lifeline = survival.lifeline()
        if lifeline is None or not lifeline.is_death(error):
            raise
        # A new one: that which was caught holds the frames it came through, and their arrays.
        return _Outcome([], lifeline.died())
