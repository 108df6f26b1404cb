"""``ShardedLoader``: this rank's batches of a DataLoader, from wherever a loop has stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler

from mpizero import ArgumentError, World
from mpizero.sampling import ShardedBatches, Share
from mpizero_torch.batch_weight import Loop
from mpizero_torch.data.handed_out import HandedOut
from mpizero_torch.data.plans import FollowedBatches, FollowedSamples, Plan, SeededPlan
from mpizero_torch.data.position import Position
from mpizero_torch.data.reading import ATTRIBUTES, Reading, Source, loader_like
from mpizero_torch.data.sampler import is_plain, refuse_dealt
from mpizero_torch.data.workers import begin
from mpizero_torch.random_state import derive
from mpizero_torch.weighed_tensor import Outlet


class ShardedLoader:
    """This rank's batches of a DataLoader over a map-style dataset; see ``shard``.

    ``state_dict()`` is the position in the data, over all ranks: another number of ranks can go on
    from there, and each sample is still seen once. What a dataset draws at random in worker
    processes follows from seed, epoch, step and rank alone. What a DataLoader can be asked for
    (``batch_size``, ``num_workers``, ``collate_fn``, ...) is answered as by the one it was made of.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        world: World,
        *,
        shuffle: bool | None,
        seed: int,
        speeds: Sequence[float] | None,
        evaluation: bool = False,
    ) -> None:
        self.dataset: Any = loader.dataset
        self.world = world
        self._given, self._seed = loader, seed
        self._plan = _plan_of(loader, world, shuffle, seed, speeds)
        self._position = Position()
        self._outlet = Outlet(evaluation)
        self._weight = 1.0
        self.handed_out = HandedOut() if evaluation else None
        # A generator of our own: one less that begins an epoch with a draw from torch's global one.
        self._generator = torch.Generator() if loader.generator is None else None
        self._source = Source()
        generator = self._generator or loader.generator
        self._loader = loader_like(loader, generator, batch_sampler=self._source)

    def __len__(self) -> int:
        """Steps in a whole epoch: the same on every rank, but for evaluation."""
        return len(self._plan) if self.handed_out is None else self._plan.own_steps()

    def __getattr__(self, name: str) -> Any:
        if name in ATTRIBUTES:
            return getattr(self._given, name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute {name!r}")

    @property
    def weight(self) -> float:
        """What the batch counts that was handed out last: 1 where all ranks have equally much."""
        return self._weight

    @property
    def global_batch_size(self) -> int | None:
        """Samples of a step over all ranks: each rank's batch size times their number at first.

        May be set between two loops, to the same on all ranks: they share it out as evenly as can
        be, and each batch's weight makes the mean gradient that over its samples. None where a
        batch sampler decides.
        """
        return self._plan.width

    @global_batch_size.setter
    def global_batch_size(self, samples: int) -> None:
        if self._plan.width is None:
            raise ArgumentError(
                "ShardedLoader", "global_batch_size", f"{samples} for a loader with a batch "
                "sampler", "what the batch sampler draws",
            )  # fmt: skip
        if samples < 1:
            raise ArgumentError("ShardedLoader", "global_batch_size", str(samples), "1 or more")
        self._plan.set_width(samples)

    @property
    def epoch(self) -> int:
        """The epoch under way; between two loops, the next."""
        return self._position.epoch

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter()`` begin epoch number ``epoch``; a sampler of one's own is told.

        After ``load_state_dict`` in that very epoch, the loop goes on where it was.
        """
        if self._position.set_epoch(epoch):
            self._plan.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the loop is: behind the batch that it was given last. The same on all ranks.

        Nothing of it depends on the number of ranks. A loop that was left by ``break`` is where it
        was left.
        """
        plan = self._plan
        where = {"epoch": self._position.epoch, plan.unit: self._position.done}
        return {**where, **plan.data, **plan.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next ``iter()`` go on where ``state_dict()`` was asked for.

        Raises ArgumentError if within the epoch this loader would go on with other samples: if its
        data are more or fewer, or in another order.
        """
        plan = self._plan
        own = plan.data
        saved = {name: state.get(name) for name in own}
        if state.get("samples", state.get("batches")) and own != saved:
            raise ArgumentError(
                "load()", "loader", f"one with {_listed(own)}", f"{_listed(saved)}, as was saved",
                "Leave loader= out to begin with the data anew.",
            )  # fmt: skip
        self._position.restore(state, plan.unit)
        plan.restore(state)

    def __iter__(self) -> Iterator[Any]:
        self._position.begin()
        epoch, done = self._position.epoch, self._position.done
        steps, uneven = self._plan.begin(epoch, done)
        if self.handed_out is not None:
            self.handed_out.clear()
            steps = (step for step in steps if step.weight)
        rank = self.world.rank
        self._source.next = reading = Reading(steps, (self._seed, epoch, rank))
        if self._generator is not None:
            self._generator.manual_seed(derive(self._seed, epoch, done, rank))
        return _Batches(self, epoch, reading, begin(self._loader), Loop(self._outlet, uneven))

    def _take(self, epoch: int, reading: Reading) -> float:
        """A batch is handed out: keep count of it."""
        step = reading.take()
        self._position.advance(epoch, step.stop)
        self._plan.handed_out(step)
        self._weight = step.weight
        if self.handed_out is not None:
            self.handed_out.add(step.stop, step.samples)
        return step.weight

    def _end(self, epoch: int) -> None:
        """All of an epoch has been handed out, and its loop has ended."""
        self._position.finish(epoch)
        self._plan.end_epoch()


class _Batches(Iterator[Any]):
    """One loop over a ShardedLoader. No generator: that would have something to do at exit."""

    def __init__(
        self,
        loader: ShardedLoader,
        epoch: int,
        reading: Reading,
        loaded: Iterator[Any],
        loop: Loop,
    ) -> None:
        self._loader, self._epoch = loader, epoch
        self._reading, self._loop = reading, loop
        self._loaded: Iterator[Any] | None = loaded

    def __next__(self) -> Any:
        if self._loaded is None:
            raise StopIteration
        try:
            batch = next(self._loaded)
        except StopIteration:
            self.close()
            self._loader._end(self._epoch)
            raise
        except BaseException:
            self._loop.end()  # the batch before is not at hand any more
            raise
        return self._loop.hand_out(batch, self._loader._take(self._epoch, self._reading))

    def close(self) -> None:
        """End the loop where it is."""
        self._loaded = None
        self._loop.end()


def _plan_of(
    loader: DataLoader[Any],
    world: World,
    shuffle: bool | None,
    seed: int,
    speeds: Sequence[float] | None,
) -> Plan:
    rank, size = world.rank, world.size
    refuse_dealt(loader.sampler)
    refuse_dealt(loader.batch_sampler)
    by_batches = loader.batch_size is None
    if by_batches or not is_plain(loader.sampler):
        what = "a batch sampler" if by_batches else f"a {type(loader.sampler).__name__}"
        given = {"shuffle": shuffle, "speeds": speeds if by_batches else None}
        for name, value in given.items():
            if value is not None:
                raise ArgumentError(
                    "shard()", name, f"{value} beside {what}, which decides", "None"
                )
        if by_batches:
            return FollowedBatches(loader.batch_sampler, world)
        share = Share.of(rank, size, speeds, "shard()")
        return FollowedSamples(
            loader.sampler, world, share, loader.batch_size or 1, loader.drop_last
        )
    batches = ShardedBatches(
        len(loader.sampler),  # type: ignore[arg-type]
        loader.batch_size or 1,
        rank,
        size,
        shuffle=isinstance(loader.sampler, RandomSampler) if shuffle is None else shuffle,
        seed=seed,
        drop_last=loader.drop_last,
        speeds=speeds,
    )
    return SeededPlan(batches)


def _listed(values: Mapping[str, Any]) -> str:
    samples = "samples" if values.get("of") is None else f"{values['of']} samples"
    return ", ".join([samples, *(f"{k}={v}" for k, v in values.items() if k != "of")])
