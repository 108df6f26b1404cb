"""A loop over a DataLoader that loads the steps of a plan."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler, get_worker_info

from mpizero_torch.data.plans import Step
from mpizero_torch.data.workers import fork_server
from mpizero_torch.random_state import derive, seed_all


class Reading:
    """The steps of one loop: what a DataLoader has been asked to load, and is yet to give."""

    def __init__(self, steps: Iterator[Step], seed: tuple[int, ...] = ()) -> None:
        self._steps, self._seed = steps, seed
        self._asked: deque[Step] = deque()

    def __iter__(self) -> Reading:
        return self

    def __next__(self) -> list[Any]:
        step = next(self._steps)
        self._asked.append(step)
        return _Samples(step.samples, (*self._seed, step.stop))

    def take(self) -> Step:
        """The step whose data the DataLoader has given now: it keeps their order."""
        return self._asked.popleft()


class Source(Sampler[Any]):
    """The (batch) sampler of a DataLoader of ours: what the loop is to read that begins now."""

    def __init__(self) -> None:
        self.next: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.next)


class _Samples(list[Any]):
    """A batch's samples. A worker that looks them up draws its random numbers from here on.

    Otherwise what it drew would depend on how many batches it had before, and a run that is
    resumed within an epoch would see other augmentations. In the training process the generators
    are the training's, and are saved as such.
    """

    def __init__(self, samples: Iterable[Any], seed: tuple[int, ...] = ()) -> None:
        super().__init__(samples)
        self.seed = seed

    def __iter__(self) -> Iterator[Any]:
        if get_worker_info() is not None:
            seed_all(derive(*self.seed))
        return super().__iter__()


def iterates_as_dataloader(loader: DataLoader[Any]) -> bool:
    """Does it give what a DataLoader with its attributes gives?"""
    own = next(kind for kind in type(loader).__mro__ if "__iter__" in vars(kind))
    return own is DataLoader or f"{own.__module__}.{own.__name__}" in _ALIKE


# Loaders that can say where they are, as ours can. By name: nothing of them is imported.
_ALIKE = frozenset(["torchdata.stateful_dataloader.stateful_dataloader.StatefulDataLoader"])


def loader_like(
    loader: DataLoader[Any], generator: torch.Generator | None, **samplers: Any
) -> DataLoader[Any]:
    """A DataLoader like ``loader`` that loads what ``samplers`` (its arguments) say."""
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
    return DataLoader(loader.dataset, generator=generator, **samplers, **options)


# What a DataLoader can be asked for; what is made of one answers the same.
# fmt: off
ATTRIBUTES = frozenset([
    "batch_sampler", "batch_size", "collate_fn", "dataset", "drop_last", "generator", "in_order",
    "multiprocessing_context", "num_workers", "persistent_workers", "pin_memory",
    "pin_memory_device", "prefetch_factor", "sampler", "timeout", "worker_init_fn",
])
# fmt: on
