"""Bytes that a rank and a node hold, by kind, at each ZeRO stage.

The formulas are those of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, sections 3 and 5), with
what mpizero adds: parameters that a node has once, and the scratch of the engine. Blocks end on
cache lines; what that adds is not counted, it is below 1 % for any model worth sharding.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from math import ceil
from typing import Any

from mpizero.engine.gradient_shards import BUFFERS
from mpizero.engine.partition import PARAMETER
from mpizero.plan.job import FLOAT, Model, Ranks, Settings


@dataclass(frozen=True)
class State:
    """Bytes of what trains a model: all of it, or one rank's part."""

    parameters: float
    gradients: float
    masters: float  # float32 copies, which the optimizer updates in the parameters' place
    optimizer_state: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.masters + self.optimizer_state


def part_of_rank(whole: State, stage: int, parts: float, sharers: int | None = None) -> State:
    """What one rank keeps of ``whole`` (ZeRO, arXiv 1910.02054, section 5, figure 1).

    Stage 1 divides the optimizer's state (and the float32 copies) by the ``parts`` into which it is
    cut, stage 2 the gradients too, stage 3 the parameters too. ``sharers``: parameters lie in
    memory that so many ranks have once, at every stage.
    """
    return State(
        parameters=whole.parameters / (sharers or (parts if stage == 3 else 1)),
        gradients=whole.gradients / (parts if stage >= 2 else 1),
        masters=whole.masters / (parts if stage else 1),
        optimizer_state=whole.optimizer_state / (parts if stage else 1),
    )


@dataclass(frozen=True)
class Memory:
    """Bytes by kind.

    ``buffers``: memory in which gradients are put together, and the module's buffers; ``in_flight``
    is there for a part of a step only: gradients on their way from autograd to their place, and
    parameters that stage 3 has gathered. ``activations``: None where the model is not known enough.
    """

    parameters: float
    masters: float
    gradients: float
    optimizer_state: float
    buffers: float
    in_flight: float
    activations: float | None

    @property
    def total(self) -> float:
        """The most that is held at a time: the sum of all that is known."""
        return sum(getattr(self, field.name) or 0.0 for field in fields(self))


@dataclass(frozen=True)
class Holding:
    """``rank``: memory that its node has once counts as its part of it. ``shared``: bytes of
    ``node`` that lie in memory which its ranks can all address (/dev/shm)."""

    rank: Memory
    node: Memory
    shared: float


def whole_state(model: Model, settings: Settings, stage: int) -> State:
    """All bytes of parameters, gradients and optimizer state, before anything is divided."""
    count, itemsize = model.parameters, settings.itemsize(stage)
    return State(
        parameters=count * itemsize,
        gradients=count * itemsize,
        masters=count * FLOAT if settings.has_masters(stage) else 0,
        optimizer_state=count * settings.optimizer.state_bytes,
    )


def memory(model: Model, settings: Settings, ranks: Ranks, stage: int) -> Holding:
    """What ``ranks`` hold at ``stage``."""
    sharers = ranks.local if settings.share and stage else None
    whole = whole_state(model, settings, stage)
    own = part_of_rank(whole, stage, _parts(model, settings, ranks, stage), sharers)
    buffers, in_flight = _scratch(model, settings, ranks, stage)
    rank = Memory(
        own.parameters,
        own.masters,
        own.gradients,
        own.optimizer_state,
        buffers + model.buffer_bytes,
        in_flight,
        activation_bytes(model, settings),
    )
    # Where a node has the parameters once, a rank's part of them times its ranks is once.
    held: dict[str, Any] = asdict(rank)
    every: dict[str, Any] = {
        kind: None if each is None else each * ranks.local for kind, each in held.items()
    }
    node = Memory(**every)
    shared = 0.0
    if ranks.local > 1:
        shared = ranks.local * buffers + (node.gradients if stage < 2 else 0.0)
        if stage:
            shared += node.parameters
    return Holding(rank, node, shared)


def activation_bytes(model: Model, settings: Settings) -> float | None:
    """What forward keeps for backward on one micro-batch; None where that cannot be said.

    As counted on the model; else, for a transformer, 34 s b h a layer in 16 bits: the part of
    Korthikanti et al. 2022 (arXiv 2205.05198, equation 1) that remains when attention's scores are
    not kept (as torch's scaled_dot_product_attention does not). Logits are not in it.
    """
    if model.activation_bytes is not None:
        return float(model.activation_bytes)
    if not (model.layers and model.hidden and settings.sequence):
        return None
    tokens = settings.sequence * settings.micro_batch
    width = 1 if settings.precision == "bf16" else 2
    return 34.0 * tokens * model.hidden * model.layers * width


def _parts(model: Model, settings: Settings, ranks: Ranks, stage: int) -> float:
    """Into how many parts the state is cut, if all were as large as the largest one.

    Whole parameters cannot be cut finer than the largest one (``balanced_owners``).
    """
    if stage and settings.optimizer.partition == PARAMETER:
        return max(1.0, min(ranks.size, model.parameters / model.largest_tensor))
    return ranks.size


def _scratch(model: Model, settings: Settings, ranks: Ranks, stage: int) -> tuple[float, float]:
    """Bytes of a rank's engine buffers, and of what is in flight at the worst moment."""
    itemsize = settings.itemsize(stage)
    largest = model.largest_tensor * itemsize
    everything = model.parameters * itemsize
    if stage == 0:
        if ranks.size == 1:
            return 0.0, 0.0
        # A bucket's gradients lie where autograd has put them until the bucket is full; in the
        # first pass all do, when there is no optimizer state yet.
        state = model.parameters * settings.optimizer.state_bytes
        bucket = min(everything, max(settings.bucket_bytes, largest))
        return 0.0, max(bucket, everything - state)
    gathers = stage == 3 and not settings.share
    buffers = 0.0
    if stage >= 2:
        # A unit's segments end with the unit.
        most = model.largest_unit * itemsize if gathers else everything
        segment = min(settings.segment_bytes, most)
        buffers = min(BUFFERS, ceil(everything / segment)) * float(segment)
    in_flight = float(largest)
    if gathers:  # where that takes messages, the next unit travels while one is computed
        in_flight += model.largest_unit * itemsize * (1 if ranks.nodes == 1 else 2)
    return buffers, in_flight
