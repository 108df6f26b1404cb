"""All stages side by side, the fewest ranks that suffice for each, and which stage to take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpizero.plan.job import STAGES, Machine, Model, Ranks, Settings
from mpizero.plan.memory import Holding, memory
from mpizero.plan.step_time import StepTime, step_time
from mpizero.plan.traffic import Traffic, traffic

# No job is larger; who needs more ranks than that does not fit.
MOST_RANKS = 1 << 20

# Differences below this are no reason to choose.
_NEARLY = 0.03


@dataclass(frozen=True)
class Limits:
    """Bytes that may be held, as far as there is a limit."""

    node: float | None = None
    rank: float | None = None

    def allow(self, held: Holding) -> bool:
        return (self.node is None or held.node.total <= self.node) and (
            self.rank is None or held.rank.total <= self.rank
        )

    @property
    def known(self) -> bool:
        return self.node is not None or self.rank is not None


@dataclass(frozen=True)
class StagePlan:
    """What a stage takes. ``fits``: None where no limit is known; ``fewest_ranks``: None where no
    limit is known, or no number of ranks suffices."""

    stage: int
    holding: Holding
    traffic: Traffic
    time: StepTime | None
    fits: bool | None
    fewest_ranks: int | None


@dataclass(frozen=True)
class Plan:
    """``stage``: the one to take, None if none fits; ``reason``: why."""

    model: Model
    settings: Settings
    ranks: Ranks
    stages: tuple[StagePlan, ...]
    stage: int | None
    reason: str


def plan(
    model: Model,
    settings: Settings,
    ranks: Ranks,
    machine: Machine | None = None,
    limits: Limits | None = None,
    stages: Sequence[int] = STAGES,
) -> Plan:
    """Work out ``stages`` on ``ranks``. In microseconds: nothing is built or run."""
    machine, limits = machine or Machine(), limits or Limits()
    found = tuple(_of_stage(model, settings, ranks, machine, limits, each) for each in stages)
    chosen, reason = choose(found)
    return Plan(model, settings, ranks, found, chosen, reason)


def fewest_ranks(
    model: Model, settings: Settings, per_node: int, limits: Limits, stage: int
) -> int | None:
    """The smallest number of ranks that holds the model: on one node, or on full ones.

    None if no number up to MOST_RANKS does. On more nodes a rank never holds more, so that the
    number of nodes is found by halving.
    """

    def fits(size: int) -> bool:
        return limits.allow(memory(model, settings, Ranks(size, per_node), stage))

    for size in range(1, per_node + 1):
        if fits(size):
            return size
    low, high = 1, max(2, MOST_RANKS // per_node)
    if not fits(high * per_node):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle * per_node) else (middle, high)
    return high * per_node


def choose(stages: Sequence[StagePlan]) -> tuple[int | None, str]:
    """The stage to take, and why: of those that fit the fastest, of equally fast ones the smallest.

    Where times are not known, bytes between nodes stand for them; then bytes through memory.
    """
    fitting = [each for each in stages if each.fits is not False]
    if not fitting:
        return None, _why_none(stages)
    cost, _ = _measure(fitting)
    least = min(cost(each) for each in fitting)
    fast = [each for each in fitting if cost(each) <= least * (1 + _NEARLY)]
    smallest = min(each.holding.node.total for each in fast)
    # Among equals the lowest: it has most freedom left (accumulating, compiled models).
    taken = next(each for each in fast if each.holding.node.total <= smallest * (1 + _NEARLY))
    return taken.stage, _why(taken, stages, fitting, fast)


def _of_stage(
    model: Model,
    settings: Settings,
    ranks: Ranks,
    machine: Machine,
    limits: Limits,
    stage: int,
) -> StagePlan:
    held = memory(model, settings, ranks, stage)
    moved = traffic(model, settings, ranks, stage)
    time = step_time(model, settings, machine, moved, stage)
    if not limits.known:
        return StagePlan(stage, held, moved, time, None, None)
    fewest = fewest_ranks(model, settings, ranks.per_node, limits, stage)
    return StagePlan(stage, held, moved, time, limits.allow(held), fewest)


def _why(
    taken: StagePlan,
    stages: Sequence[StagePlan],
    fitting: Sequence[StagePlan],
    fast: Sequence[StagePlan],
) -> str:
    said = []
    too_large = [each.stage for each in stages if each not in fitting]
    slower = [each.stage for each in fitting if each not in fast]
    larger = [each.stage for each in fast if _clearly_more(each, taken)]
    equal = [each.stage for each in fast if each is not taken and each.stage not in larger]
    if too_large:
        said.append(f"{_named(too_large)} need{_s(too_large)} more memory than there is")
    if slower:
        said.append(f"{_named(slower)} {_measure(fitting)[1]}")
    if larger:
        said.append(f"{_named(larger)} hold{_s(larger)} more memory and gain{_s(larger)} nothing")
    if equal:
        said.append(f"{_named(equal)} would be no better")
    return "; ".join(said) or "it is the only one asked about"


def _why_none(stages: Sequence[StagePlan]) -> str:
    some = [each for each in stages if each.fewest_ranks is not None]
    if not some:
        return (
            "no number of ranks is enough: what every node holds, whatever their number "
            "(parameters, activations, what replicas keep), is too much. Take fewer ranks per "
            "node, a smaller micro-batch, bf16, or stage 3 without shared parameters."
        )
    best = min(some, key=lambda each: each.fewest_ranks or MOST_RANKS)
    return f"none fits; stage {best.stage} would on {best.fewest_ranks} ranks"


def _measure(stages: Sequence[StagePlan]) -> tuple[Callable[[StagePlan], float], str]:
    """By what stages are compared, and what is said of those that have more of it."""
    if all(each.time is not None for each in stages):
        return _seconds, "would be slower"
    if any(each.traffic.network for each in stages):
        return lambda each: each.traffic.network, "would send more between nodes"
    return lambda each: each.traffic.memory, "would move more through memory"


def _seconds(stage: StagePlan) -> float:
    return stage.time.total if stage.time is not None else 0.0


def _clearly_more(one: StagePlan, other: StagePlan) -> bool:
    return one.holding.node.total > other.holding.node.total * (1 + _NEARLY)


def _named(stages: Sequence[int]) -> str:
    numbers = " and ".join(map(str, stages))
    return f"stage{'' if len(stages) == 1 else 's'} {numbers}"


def _s(stages: Sequence[int]) -> str:
    return "s" if len(stages) == 1 else ""
