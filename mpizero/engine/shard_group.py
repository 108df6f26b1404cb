"""``ShardGroup``: which ranks hold the parts of one sharded state, and which hold copies of it.

A group works on two levels. Inside (a node, usually) ranks combine and exchange through shared
memory; each of them has a *region* of a segment, which then goes to its counterparts in the other
inside groups: cut once more among them, or summed as copies of one another (what others call HSDP,
MiCS or hpZ). So only node-level sums travel between nodes, each byte once a node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpizero.api import World
from mpizero.collectives.dispatch import Dispatch, Parts
from mpizero.errors import ArgumentError
from mpizero.memory.arrays import StreamOf, empty_like
from mpizero.memory.dtypes import is_half
from mpizero.memory.order import NOTHING, on_stream
from mpizero.progress import Handle
from mpizero.reduction.operation import SUM


class ShardGroup:
    """The ranks among which ``world`` shards. Collective.

    ``shard_group``: "world" (all ranks hold one part each), "node" (each node holds the whole
    state, its ranks a part each), or a number k (each k ranks do, counted node by node). Raises
    ArgumentError for a k that does not divide the ranks.
    """

    def __init__(self, world: World, shard_group: str | int = "world") -> None:
        self.world = world
        self._splits = False
        self.outer: World | None = None
        # Are sums made in the same order everywhere? Not, perhaps, where parameters are gathered
        # in between, by modules that ranks call differently: then they are compared.
        self.is_sure = True
        even = world.even_nodes
        if shard_group == "world" and (world.node_count == 1 or not even):
            self.inner = world
        elif shard_group == "world":
            self.inner, self._splits = world.node, True
        elif shard_group == "node" and even:
            self.inner = world.node
        elif isinstance(shard_group, int) and shard_group > 0 and not world.size % shard_group:
            if shard_group == world.size:
                self.inner = world
            else:
                # Ranks of a node next to each other, whatever the launcher's order.
                order = [rank for ranks in world.nodes for rank in ranks]
                number = order.index(world.rank) // shard_group
                self.inner = world.part(f"groups of {shard_group}", number)
        else:
            raise ArgumentError(
                "zero()",
                "shard_group",
                repr(shard_group),
                f"'world', 'node' where all nodes have equally many ranks, or a divisor of the "
                f"{world.size} ranks",
            )
        if self.inner.size < world.size:
            inside = "nodes" if self.inner is world.node else f"groups of {shard_group}"
            self.outer = world.part(f"across {inside}", self.inner.rank)
        self._across = self.outer.size if self.outer is not None and self._splits else 1
        self.parts = self.inner.size * self._across
        self.copies = world.size // self.parts
        at = self.outer.rank if self.outer is not None and self._splits else 0
        self.part = self.inner.rank * self._across + at
        shares = self.inner.node_count == 1 and self.inner.device.kind != "cuda"
        parts, sharing = zip(*world.gather_objects((self.part, shares)), strict=True)
        # The rank that speaks for each part: the first that holds it.
        self.holders = [parts.index(part) for part in range(self.parts)]
        # Do all inside groups share nodes, so that ranks can share parameters? Where some could
        # and others not, none does: parameters lie in one way everywhere.
        self.one_memory = all(sharing)

    @property
    def gatherers(self) -> World:
        """The ranks that gather a space together, where that takes messages."""
        return self.world if self._splits else self.inner

    @property
    def is_holder(self) -> bool:
        """Does this rank speak for its part (others may hold copies of it)?"""
        return self.holders[self.part] == self.world.rank

    def combine(
        self,
        what: str,
        flat: Any,
        blocks: Sequence[slice],
        use: Callable[[list[Any]], None],
        stream: StreamOf,
        into: Sequence[Any] = (),
        prepare: Callable[[], None] | None = None,
    ) -> Handle:
        """Sum ``flat`` over all ranks; ``use(rows)`` gets what makes up this rank's block.

        See ``Algorithm.combine_block``. ``blocks``: one for each part. ``into``: what ``use``
        writes. Device memory is used on the raw ``stream()``. ``prepare`` is carried out first,
        before others read ``flat``.
        """

        def work(run: Dispatch, parts: Parts) -> None:
            if self.outer is None:
                run.combine_block(flat, blocks, SUM, parts, use)
            else:
                run.combine_block(flat, self.regions(blocks), SUM, parts, across)

        def across(rows: list[Any]) -> None:
            dtype = np.float32 if is_half(flat.dtype) else flat.dtype
            total = empty_like(rows[0], rows[0].shape, dtype)
            SUM.accumulate(rows, total)
            outer = self.outer
            if outer is None:
                raise RuntimeError("there are no counterparts to sum with")
            if self._splits:
                within = self._within_region(blocks)
                outer.submit(
                    what,
                    lambda run, parts: run.combine_block(total, within, SUM, parts, use),
                    on_stream(_here, total, *into, counterpart=False),
                    sure=self.is_sure,
                ).wait()
            else:
                outer.submit(
                    what,
                    lambda run, parts: run.all_reduce(total, SUM, parts=parts),
                    on_stream(_here, total, counterpart=False),
                    sure=self.is_sure,
                ).wait()
                use([total])

        return self.inner.submit(
            what, work, on_stream(stream, flat, *into), sure=self.is_sure, prepare=prepare
        )

    def gather(
        self,
        what: str,
        flat: Any,
        segments: Sequence[tuple[slice, Sequence[slice]]],
        stream: StreamOf,
    ) -> Handle:
        """Fill this rank's ``flat``, of which it holds its block in every segment."""

        return self.inner.submit(
            what,
            lambda run, parts: self.gather_now(run, flat, segments, parts),
            on_stream(stream, flat),
        )

    def gather_now(
        self,
        run: Dispatch,
        flat: Any,
        segments: Sequence[tuple[slice, Sequence[slice]]],
        parts: Parts = None,
        *,
        what: str = "a region",
        sure: bool = True,
    ) -> None:
        """``gather`` as a part of other work of the inside ranks.

        Not ``sure``: other ranks may be doing something else, and shall hear of it.
        """
        for place, blocks in segments:
            self._gather_across(what, flat[place], blocks, sure)
        if self.outer is not None:
            run.barrier()  # the others read this rank's region, now complete
        for place, blocks in segments:
            rows = None if parts is None else [part[place] for part in parts]
            run.gather_blocks(flat[place], self.regions(blocks), rows)

    def publish(
        self, what: str, flat: Any, segments: Sequence[tuple[slice, Sequence[slice]]]
    ) -> Handle:
        """The same where ``flat`` is one memory of all inside ranks: only counterparts send."""

        def work(run: Dispatch, parts: Parts) -> None:
            for place, blocks in segments:
                self._gather_across(what, flat[place], blocks)
            run.barrier()

        return self.inner.submit(what, work, NOTHING)  # that is host memory

    def _gather_across(
        self, what: str, segment: Any, blocks: Sequence[slice], sure: bool = True
    ) -> None:
        if self.outer is None or not self._splits:
            return
        region, within = segment[self.own_region(blocks)], self._within_region(blocks)
        self.outer.submit(
            what,
            lambda run, parts: run.gather_blocks(region, within, parts),
            on_stream(_here, region),
            sure=sure,
        ).wait()

    def regions(self, blocks: Sequence[slice]) -> list[slice]:
        """What each inside rank and its counterparts have together."""
        firsts, lasts = blocks[:: self._across], blocks[self._across - 1 :: self._across]
        return [slice(a.start, b.stop) for a, b in zip(firsts, lasts, strict=True)]

    def own_region(self, blocks: Sequence[slice]) -> slice:
        return self.regions(blocks)[self.inner.rank]

    def _within_region(self, blocks: Sequence[slice]) -> list[slice]:
        """The counterparts' blocks, counted from the start of this rank's region."""
        first = self.inner.rank * self._across
        start = blocks[first].start
        own = blocks[first : first + self._across]
        return [slice(block.start - start, block.stop - start) for block in own]


def _here() -> None:
    """Within the work of the inside ranks: on the stream of that work, CuPy's current one."""
