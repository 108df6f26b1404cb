"""Sharding a stream of batches whose order only the stream itself knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from mpizero import World
from mpizero_torch.batch_weight import Loop
from mpizero_torch.data.handed_out import HandedOut
from mpizero_torch.data.plans import FollowedItems
from mpizero_torch.data.position import Position
from mpizero_torch.data.reading import (
    ATTRIBUTES,
    Reading,
    Source,
    iterates_as_dataloader,
    loader_like,
)
from mpizero_torch.data.sampler import refuse_dealt
from mpizero_torch.data.workers import begin
from mpizero_torch.random_state import derive, unchanged
from mpizero_torch.weighed_tensor import Outlet


class ShardedStream:
    """Every size-th batch of ``source``, from the rank-th on; see ``shard``.

    All ranks read the whole stream, which must be the same on each (a dataset that knows how
    to read only its rank's part need not be sharded). Batches of one step weigh what they count in
    samples (the first axis of their first tensor); when the stream ends within a step, the ranks
    left over get the step's first batch with weight 0.
    """

    def __init__(self, source: Iterable[Any], world: World, *, evaluation: bool = False) -> None:
        self._source, self.world = source, world
        self.handed_out = HandedOut() if evaluation else None
        self._order = _Order.of(source, world)
        self._position = Position()
        self._outlet = Outlet(evaluation)
        self._weight = 1.0
        self._told: int | None = None  # the epoch that the source was told last

    def __len__(self) -> int:
        """Steps of a whole epoch, if the source knows how many batches it has; else TypeError."""
        batches = len(self._source)  # type: ignore[arg-type]
        whole, rest = divmod(batches, self.world.size)
        return whole + (rest > (0 if self.handed_out is None else self.world.rank))

    def __getattr__(self, name: str) -> Any:
        if name in ATTRIBUTES and isinstance(self._source, DataLoader):
            return getattr(self._source, name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute {name!r}")

    @property
    def weight(self) -> float:
        """What the batch counts that was handed out last: 1 where all ranks have equally much."""
        return self._weight

    @property
    def epoch(self) -> int:
        """The epoch under way; between two loops, the next."""
        return self._position.epoch

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter()`` begin epoch number ``epoch``, and tell the source or its dataset.

        After ``load_state_dict`` in that very epoch, the loop goes on where it was.
        """
        if self._position.set_epoch(epoch):
            self._tell(epoch)
            if self._order is not None:
                self._order.plan.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the loop is, in batches of the source; for any number of ranks."""
        order = {} if self._order is None else {"order": self._order.plan.state}
        return {
            "epoch": self._position.epoch, "batches": self._position.done, "told": self._told,
            **order,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next ``iter()`` go on where ``state_dict()`` was asked for.

        The stream is read from its beginning again, and what was trained on is passed over.
        """
        self._position.restore(state, "batches")
        if state["told"] is not None:
            self._tell(state["told"])
        if self._order is not None:
            self._order.plan.restore(state.get("order") or {})

    def __iter__(self) -> Iterator[Any]:
        self._position.begin()
        if self.handed_out is not None:
            self.handed_out.clear()
        epoch, done = self._position.epoch, self._position.done
        reading = None
        if self._order is not None:
            batches, reading = self._order.begin(epoch, done)
        else:
            # What passing over draws at random was drawn before the state was saved.
            with unchanged(done > 0):
                batches = iter(self._source)
                for _ in islice(batches, done):
                    pass
        # How many batches there are shows at the end only: the last ones may be fewer.
        loop = Loop(self._outlet, uneven=self.world.size > 1)
        return _Batches(self, epoch, done, batches, reading, loop)

    def _take(self, step: list[Any]) -> tuple[Any, float]:
        """This rank's batch of a step, and its weight."""
        size, rank = self.world.size, self.world.rank
        counts = [_samples(batch) for batch in step]
        active = rank < len(step)
        self._weight = counts[rank] * size / sum(counts) if active else 0.0
        if active and self.handed_out is not None:
            self.handed_out.add(self._position.done, [None] * counts[rank])
        return step[rank] if active else step[0], self._weight

    def _tell(self, epoch: int) -> None:
        each: Any
        for each in (self._source, getattr(self._source, "dataset", None)):
            if hasattr(each, "set_epoch"):
                each.set_epoch(epoch)
                self._told = epoch
                return


class _Batches(Iterator[Any]):
    """One loop over a ShardedStream. No generator: that would have something to do at exit."""

    def __init__(
        self,
        stream: ShardedStream,
        epoch: int,
        done: int,
        batches: Iterator[Any],
        reading: Reading | None,
        loop: Loop,
    ) -> None:
        self._stream, self._epoch, self._done = stream, epoch, done
        self._batches: Iterator[Any] | None = batches
        self._reading, self._loop = reading, loop

    def __next__(self) -> Any:
        stream = self._stream
        if self._batches is None:
            raise StopIteration
        try:
            step = [*islice(self._batches, stream.world.size)]
        except BaseException:
            self._loop.end()  # the batch before is not at hand any more
            raise
        none_here = stream.handed_out is not None and len(step) <= stream.world.rank
        if not step or none_here:
            self.close()
            stream._position.finish(self._epoch)
            if stream._order is not None:
                stream._order.plan.end_epoch()
            raise StopIteration
        self._done += len(step)
        stream._position.advance(self._epoch, self._done)
        if self._reading is not None and stream._order is not None:
            for _ in step:
                stream._order.plan.handed_out(self._reading.take())
        return self._loop.hand_out(*stream._take(step))

    def close(self) -> None:
        """End the loop where it is."""
        self._batches = None
        self._loop.end()


class _Order:
    """The order of a DataLoader without batching, whose items are batches, as rank 0 draws it."""

    def __init__(self, loader: DataLoader[Any], world: World) -> None:
        self.plan = FollowedItems(loader.sampler, world)
        self._source = Source()
        # A generator of our own: what workers draw at random is the same on all ranks.
        self._generator = torch.Generator() if loader.generator is None else None
        generator = self._generator or loader.generator
        self._loader = loader_like(loader, generator, sampler=self._source, batch_size=None)

    @classmethod
    def of(cls, source: Any, world: World) -> _Order | None:
        """For such a loader; None for other sources, and where its items come in their order."""
        if not isinstance(source, DataLoader) or isinstance(source.dataset, IterableDataset):
            return None
        sampler = source.sampler
        if not iterates_as_dataloader(source) or type(sampler) is SequentialSampler:
            return None
        refuse_dealt(sampler)
        return cls(source, world)

    def begin(self, epoch: int, done: int) -> tuple[Iterator[Any], Reading]:
        """What is left of the epoch, and what of it is asked for."""
        steps, _ = self.plan.begin(epoch, done)
        if self._generator is not None:
            self._generator.manual_seed(derive(epoch, done))
        reading = Reading(steps)
        self._source.next = (item for samples in reading for item in samples)
        return begin(self._loader), reading


def _samples(batch: Any) -> int:
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.ndim:
            return int(leaf.shape[0])
    return 1
