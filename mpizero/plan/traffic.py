"""What a training step moves: bytes between nodes, messages, and bytes through a node's memory.

Between nodes only node-level sums and shards travel, each byte once a node, however many ranks it
has (``mpizero.collectives.hierarchical``, ``mpizero.engine.shard_group``). A reduce-scatter, or an
all-gather, of b bytes over m nodes sends (m-1)/m b from each, and an all-reduce twice that; less is
not possible (Patarasuk and Yuan 2009, section 3). How many messages follow one another is that of
the ring, m-1 (ibid.), or of recursive halving, ceil(log2 m) (Thakur, Rabenseifner, Gropp 2005,
section 4.5), for each piece that is reduced or gathered by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mpizero.engine.reducer import FIRST_BUCKET_BYTES
from mpizero.memory.board import PAYLOAD_BYTES
from mpizero.plan.job import FLOAT, Model, Ranks, Settings

# Of what goes over the network: read to be sent; written when it comes, and read to be used.
_COPIES = 3

# Beside its update, an element with a float32 copy: its gradient is widened (2 read, 4 written),
# the parameter rounded (4 read, 2 written).
_CONVERSIONS = 12


@dataclass(frozen=True)
class Phase:
    """A part of a step. ``network``: bytes that each node sends; ``messages``: how many of them
    follow one another on a rank; ``memory``: bytes that the ranks of a node read and write."""

    network: float = 0.0
    messages: int = 0
    memory: float = 0.0


@dataclass(frozen=True)
class Traffic:
    """Of one step and node: summing ``gradients``, the ``update``, handing out ``parameters``.

    ``control``: what the ranks tell each other of the pass. ``pieces``: into how many the gradients
    are cut, which are summed one after the other.
    """

    gradients: Phase
    update: Phase
    parameters: Phase
    control: Phase
    pieces: int

    @property
    def network(self) -> float:
        """Bytes that each node sends in a step."""
        return sum(phase.network for phase in self._phases)

    @property
    def memory(self) -> float:
        """Bytes that the ranks of a node read and write in a step, beside forward and backward."""
        return sum(phase.memory for phase in self._phases)

    @property
    def messages(self) -> int:
        return sum(phase.messages for phase in self._phases)

    @property
    def _phases(self) -> tuple[Phase, ...]:
        return self.gradients, self.update, self.parameters, self.control


def traffic(model: Model, settings: Settings, ranks: Ranks, stage: int) -> Traffic:
    """Of a step of ``ranks`` at ``stage``: one forward, one backward, one update."""
    if stage == 0:
        return _of_replicas(model, settings, ranks)
    itemsize = settings.itemsize(stage)
    held, m, k = model.parameters * itemsize, ranks.nodes, ranks.local
    pieces = ceil(held / settings.segment_bytes)
    by_unit = stage == 3 and not settings.share
    if by_unit:  # each is laid out by itself
        pieces = max(pieces, model.unit_count)
    crossing = (m - 1) / m
    # Sums of 16-bit gradients travel unrounded. Every rank fills its segments (read, write), then
    # each reads its blocks of all of them, and writes them once.
    sums = crossing * model.parameters * FLOAT
    gradients = Phase(sums, pieces * (m - 1), 3 * k * held + held + _COPIES * sums)
    gathers, copies = 1, 0 if settings.share else 2 * k * held
    turns = m - 1
    if by_unit:
        gathers = 2  # for forward, and again for backward
        turns += 2 * _log2(m)  # do all ranks need the same unit?
    sent = gathers * crossing * held
    parameters = Phase(sent, gathers * pieces * turns, gathers * copies + _COPIES * sent)
    each = settings.optimizer.update_bytes
    if settings.has_masters(stage):
        each += _CONVERSIONS
    update = Phase(memory=each * model.parameters / m)
    # Who takes part; how backward ended.
    return Traffic(gradients, update, parameters, Phase(messages=4 * _log2(m)), pieces)


def _of_replicas(model: Model, settings: Settings, ranks: Ranks) -> Traffic:
    held, m, k = model.parameters * FLOAT, ranks.nodes, ranks.local
    update = Phase(memory=settings.optimizer.update_bytes * model.parameters * k)
    if ranks.size == 1:
        return Traffic(Phase(), update, Phase(), Phase(), 0)
    sent = 2 * (m - 1) / m * held
    # The hierarchical all-reduce goes chunk by chunk, each rank with its slice of it: whole chunks
    # go round the ring, slices are halved and doubled.
    chunk = PAYLOAD_BYTES[0]
    steps = 2 * (m - 1 if k == 1 else _log2(m))
    # Every rank fills its buckets (read, write), reads its slice of all, writes it to all.
    gradients = Phase(sent, ceil(held / chunk) * steps, 4 * k * held + _COPIES * sent)
    rest = max(0, held - FIRST_BUCKET_BYTES)
    pieces = 1 + ceil(rest / settings.bucket_bytes)
    return Traffic(gradients, update, Phase(), Phase(messages=2 * _log2(m)), pieces)


def _log2(nodes: int) -> int:
    """ceil(log2(nodes))"""
    return (nodes - 1).bit_length()
