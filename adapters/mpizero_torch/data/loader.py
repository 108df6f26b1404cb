"""``ShardedLoader``: this rank's batches of a DataLoader, from wherever a loop has stopped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler, Sampler, get_worker_info

from mpizero import ArgumentError, World
from mpizero.sampling import Batch, ShardedBatches
from mpizero_torch import batch_weight
from mpizero_torch.data.position import Position
from mpizero_torch.data.sampler import is_plain
from mpizero_torch.data.workers import fork_server
from mpizero_torch.random_state import derive, seed_all


class ShardedLoader:
    """This rank's batches of a DataLoader over a map-style dataset; see ``shard``.

    ``state_dict()`` is the position in the data, in samples of the epoch over all ranks: another
    number of ranks can go on from there, and each sample is still seen once. What a dataset draws
    at random in worker processes follows from seed, epoch, step and rank alone.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        world: World,
        *,
        shuffle: bool | None,
        seed: int,
        speeds: Sequence[float] | None,
    ) -> None:
        if not isinstance(loader.dataset, Sized):
            raise ArgumentError("shard()", "source", "a dataset without a length", "one with it")
        self.dataset: Any = loader.dataset
        self.world = world
        self._position = Position()
        self._own_sampler = None if is_plain(loader.sampler) else loader.sampler
        self._order: list[int] | None = None  # of the epoch under way, as the own sampler drew it
        count = len(self.dataset if self._own_sampler is None else loader.sampler)  # type: ignore[arg-type]
        self._batches = ShardedBatches(
            count,
            loader.batch_size or 1,
            world.rank,
            world.size,
            shuffle=isinstance(loader.sampler, RandomSampler) if shuffle is None else shuffle,
            seed=seed,
            drop_last=loader.drop_last,
            speeds=speeds,
        )
        self._plan = _Plan()
        # A generator of our own: one less that begins an epoch with a draw from torch's global one.
        self._generator = torch.Generator() if loader.generator is None else None
        self._loader = _with_batches(loader, self._plan, self._generator)

    def __len__(self) -> int:
        """Steps in a whole epoch: the same on every rank."""
        return len(self._batches)

    @property
    def global_batch_size(self) -> int:
        """Samples of a step over all ranks: each rank's batch size times their number at first.

        May be set between two loops, to the same on all ranks: they share it out as evenly as can
        be, and each batch's weight makes the mean gradient that over its samples.
        """
        return self._batches.width

    @global_batch_size.setter
    def global_batch_size(self, samples: int) -> None:
        if samples < 1:
            raise ArgumentError("ShardedLoader", "global_batch_size", str(samples), "1 or more")
        self._batches.width = samples

    @property
    def epoch(self) -> int:
        """The epoch under way; between two loops, the next."""
        return self._position.epoch

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter()`` begin epoch number ``epoch``.

        After ``load_state_dict`` in that very epoch, the loop goes on where it was.
        """
        if self._position.set_epoch(epoch):
            self._order = None

    def state_dict(self) -> dict[str, Any]:
        """Where the loop is: behind the batch that it was given last. The same on all ranks.

        Nothing of it depends on the number of ranks. A loop that was left by ``break`` is where it
        was left.
        """
        batches = self._batches
        return {
            "epoch": self._position.epoch,
            "samples": self._position.done,
            "of": batches.count,
            "shuffle": batches.shuffle,
            "seed": batches.seed,
            "order": None if self._order is None else np.asarray(self._order, np.int64),
            "sampler": _generator_state(self._own_sampler),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next ``iter()`` go on where ``state_dict()`` was asked for.

        Raises ArgumentError if within the epoch this loader would go on with other samples: if its
        data are more or fewer, or in another order.
        """
        batches = self._batches
        own = {"of": batches.count, "shuffle": batches.shuffle, "seed": batches.seed}
        saved = {name: state.get(name) for name in own}
        if state.get("samples") and own != saved:
            raise ArgumentError(
                "load()", "loader", f"one with {_listed(own)}", f"{_listed(saved)}, as was saved",
                "Leave loader= out to begin with the data anew.",
            )  # fmt: skip
        self._position.restore(state, "samples")
        order = state.get("order")
        if order is not None and np.shape(order) != (batches.count,):
            raise ArgumentError("load()", "loader", f"an order of {np.size(order)} samples",
                                f"one of {batches.count}")  # fmt: skip
        self._order = None if order is None else [int(each) for each in order]
        if state.get("sampler") is not None:
            _generator_of(self._own_sampler).set_state(torch.as_tensor(state["sampler"]))

    def __iter__(self) -> Iterator[Any]:
        self._position.begin()
        epoch, skip = self._position.epoch, self._position.done
        if self._own_sampler is not None and self._order is None:
            everyone = self.world if self.world.mesh is None else self.world.mesh.world
            with everyone.telling():
                order = [int(index) for index in self._own_sampler]
            self._order = everyone.broadcast_object(order)
        batches = list(self._batches.epoch(epoch, self._order, skip))
        self._plan.begin(batches, (self._batches.seed, epoch, self.world.rank))
        if self._generator is not None:
            self._generator.manual_seed(derive(self._batches.seed, epoch, skip, self.world.rank))
        return self._handed_out(iter(self._loader), batches, epoch)

    def _handed_out(
        self, loaded: Iterator[Any], batches: Sequence[Batch], epoch: int
    ) -> Iterator[Any]:
        """Announce each batch's weight while it is at hand, and keep count."""
        with batch_weight.loop():
            for batch, data in zip(batches, loaded, strict=True):
                batch_weight.set_relative(batch.weight)
                self._position.advance(epoch, batch.stop)
                yield data
        self._position.finish(epoch)
        self._order = None


class _Plan(Sampler[list[int]]):
    """The batch sampler of a sharded loader: what ``batches`` says, in its order."""

    def __init__(self) -> None:
        self._batches: list[Batch] = []
        self._seed: tuple[int, ...] = ()

    def begin(self, batches: list[Batch], seed: tuple[int, ...]) -> None:
        self._batches, self._seed = batches, seed

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches:
            yield _Indices(batch.indices.tolist(), (*self._seed, batch.stop))

    def __len__(self) -> int:
        return len(self._batches)


class _Indices(list[int]):
    """A batch's samples. A worker that looks them up draws its random numbers from here on.

    Otherwise what it drew would depend on how many batches it had before, and a run that is
    resumed within an epoch would see other augmentations. In the training process the generators
    are the training's, and are saved as such.
    """

    def __init__(self, indices: Iterable[int], seed: tuple[int, ...] = ()) -> None:
        super().__init__(indices)
        self.seed = seed

    def __iter__(self) -> Iterator[int]:
        if get_worker_info() is not None:
            seed_all(derive(*self.seed))
        return super().__iter__()


def _with_batches(
    loader: DataLoader[Any], plan: Sampler[list[int]], generator: torch.Generator | None
) -> DataLoader[Any]:
    """A DataLoader like ``loader`` that loads the batches of ``plan``."""
    options: dict[str, Any] = {
        name: getattr(loader, name)
        for name in (
            "num_workers",
            "pin_memory",
            "timeout",
            "worker_init_fn",
            "collate_fn",
            "persistent_workers",
            "pin_memory_device",
        )
    }
    if loader.num_workers > 0:
        options["prefetch_factor"] = loader.prefetch_factor
        options["multiprocessing_context"] = loader.multiprocessing_context or fork_server()
    generator = generator or loader.generator
    return DataLoader(loader.dataset, batch_sampler=plan, generator=generator, **options)


def _generator_of(sampler: Any) -> Any:
    found = getattr(sampler, "generator", None)
    return found if isinstance(found, torch.Generator) else None


def _generator_state(sampler: Any) -> Any:
    """What a sampler with a generator of its own will draw next epoch."""
    generator = _generator_of(sampler)
    return None if generator is None else generator.get_state().numpy()


def _listed(values: Mapping[str, Any]) -> str:
    return f"{values['of']} samples, shuffle={values['shuffle']}, seed={values['seed']}"
