"""What is planned for: a model, an optimizer, the ranks and their nodes, the machine's speed."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mpizero.collectives.tuning import BUILT_IN
from mpizero.engine.partition import FLAT, PARAMETER, SEGMENT_BYTES
from mpizero.errors import ArgumentError

STAGES = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16")

FLOAT = 4  # bytes of a float32

# Of a model that is known by its size alone: its largest parameter is taken to be a fiftieth, as
# the embeddings of language models of some 10^9 parameters are.
_LARGEST_SHARE = 50


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer keeps and touches of each element that it updates.

    ``state_bytes``: float32 state; ``update_bytes``: what one pass reads and writes (the parameter,
    its gradient, the state), as torch's ``fused=True`` does it. ``partition``: see
    ``mpizero.engine.partition``.
    """

    name: str
    state_bytes: float
    update_bytes: float
    partition: str = FLAT


OPTIMIZERS = {
    each.name: each
    for each in (
        Optimizer("adamw", 8, 28),
        Optimizer("sgd", 0, 12),
        Optimizer("momentum", 4, 20),
        # One number for each row and column: nothing beside the parameters themselves.
        Optimizer("adafactor", 0, 12, PARAMETER),
    )
}


@dataclass(frozen=True)
class Model:
    """A model, as far as it is known.

    ``parameters``: all elements, every one trained. ``tensors``: how many they are; ``largest``:
    elements of the largest one; ``unit``: of the largest *unit* that stage 3 gathers at a time
    where parameters are not shared (see docs/zero.md), and ``units`` how many there are; 0 means
    unknown. ``buffer_bytes``: of
    buffers such as BatchNorm's statistics. ``layers`` and ``hidden``: of a transformer.
    ``activation_bytes`` and ``flops``: of forward and backward on one micro-batch, where they have
    been counted.
    """

    parameters: int
    tensors: int = 0
    largest: int = 0
    unit: int = 0
    units: int = 0
    buffer_bytes: int = 0
    layers: int = 0
    hidden: int = 0
    activation_bytes: int | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        if not self.parameters > 0:
            raise ArgumentError("plan", "parameters", f"{self.parameters:g}", "a number > 0")
        for name in ("largest", "unit"):
            if getattr(self, name) > self.parameters:
                given, most = f"{getattr(self, name):,}", f"{self.parameters:,}"
                raise ArgumentError("plan", name, given, f"no more than the model's {most}")

    @property
    def largest_tensor(self) -> int:
        """Elements of the largest parameter, known or guessed."""
        if self.largest:
            return self.largest
        if self.layers and self.hidden:  # a layer has 12 h^2, of which one matrix 4 h^2
            return min(self.parameters, 4 * self.hidden**2)
        return ceil(self.parameters / _LARGEST_SHARE)

    @property
    def largest_unit(self) -> int:
        return self.unit or self.largest_tensor

    @property
    def unit_count(self) -> int:
        """Known, or as few as there can be."""
        return self.units or ceil(self.parameters / self.largest_unit)


@dataclass(frozen=True)
class Settings:
    """How it is trained; the defaults are mpizero's.

    ``micro_batch``: sequences (samples) a rank and step; ``sequence``: tokens of each. ``share``:
    do the ranks of a node keep one copy of the parameters (CPUs)? ``overlap``: is there a core for
    a communicating thread beside each rank's compute?
    """

    optimizer: Optimizer = OPTIMIZERS["adamw"]
    precision: str = "fp32"
    share: bool = True
    micro_batch: int = 1
    sequence: int = 0
    overlap: bool = False
    segment_bytes: int = SEGMENT_BYTES
    bucket_bytes: int = BUILT_IN.bucket_bytes

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ArgumentError("plan", "precision", repr(self.precision), "fp32, bf16")

    def itemsize(self, stage: int) -> int:
        """Bytes of a parameter and of a gradient. Replicas have float32 ones (and autocast)."""
        return 2 if self.precision == "bf16" and stage else FLOAT

    def has_masters(self, stage: int) -> bool:
        """Does the optimizer update float32 copies?"""
        return self.itemsize(stage) < FLOAT


@dataclass(frozen=True)
class Ranks:
    """``size`` ranks, ``per_node`` on each node (fewer if there are fewer)."""

    size: int
    per_node: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ArgumentError("plan", "ranks", str(self.size), "a number >= 1")
        if self.per_node < 1:
            raise ArgumentError("plan", "ranks-per-node", str(self.per_node), "a number >= 1")
        if self.size > self.per_node and self.size % self.per_node:
            raise ArgumentError(
                "plan", "ranks", str(self.size), f"a multiple of the {self.per_node} of a node",
                "On nodes that differ ranks cannot share parameters.",
            )  # fmt: skip

    @property
    def local(self) -> int:
        """Ranks on each node."""
        return min(self.size, self.per_node)

    @property
    def nodes(self) -> int:
        return ceil(self.size / self.per_node)


@dataclass(frozen=True)
class Machine:
    """Speeds, as far as they are known, in bytes and seconds.

    ``network_bandwidth``: what a node sends each second, while it receives as much; ``latency``: of
    one message between nodes, software included; ``memory_bandwidth``: what all ranks of a node
    together read and write each second; ``flops``: floating-point operations of one rank each
    second. ``compute_seconds``: of one rank's forward and backward, instead of ``flops``.
    """

    network_bandwidth: float | None = None
    latency: float = 5e-6
    memory_bandwidth: float | None = None
    flops: float | None = None
    compute_seconds: float | None = None
