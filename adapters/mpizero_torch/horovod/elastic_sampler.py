"""``ElasticSampler``: which samples a rank trains on, where the ranks may become fewer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from mpizero_torch.horovod.process_set import global_process_set


class ElasticSampler(torch.utils.data.Sampler[int]):
    """Deals a dataset to the ranks, and what is left of it anew when ranks have died.

    Like ``DistributedSampler``: every rank gets as many, some of them twice where they do not
    divide. Make it part of a ``TorchState``; call ``record_batch`` (or ``record_indices``) after
    each batch, and ``set_epoch`` at the end of each epoch, which forgets what has been recorded.
    """

    def __init__(self, dataset: Any, shuffle: bool = True, seed: int = 0) -> None:
        self.dataset = dataset
        self.shuffle, self.seed = shuffle, seed
        self.epoch = 0
        self.processed_indices: set[int] = set()
        self.processed_num = 0  # by all ranks, as far as `record_batch` tells
        self.reset()

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch, with another order and all samples."""
        self.epoch = epoch
        self.processed_indices = set()
        self.processed_num = 0
        self.reset()

    def record_batch(self, batch_idx: int, batch_size: int) -> None:
        """The batch of this number, since the last reset, has been trained on."""
        self.processed_num += batch_size * self.num_replicas
        start = batch_idx * batch_size
        self.record_indices(self.indices[start : start + batch_size])

    def record_indices(self, indices: Iterable[int]) -> None:
        """These samples have been trained on."""
        self.processed_indices.update(int(each) for each in indices)

    def reset(self) -> None:
        """Deal out, among the ranks that there are, what has not been trained on."""
        self.rank, self.num_replicas = global_process_set.rank(), global_process_set.size()
        left = [i for i in range(len(self.dataset)) if i not in self.processed_indices]
        self.remaining_indices = left
        self.num_samples = -(-len(left) // self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas
        self._deal()

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and what this rank has recorded of it."""
        return {
            "epoch": self.epoch,
            "processed_indices": set(self.processed_indices),
            "processed_num": self.processed_num,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict()`` was called."""
        self.epoch = state_dict["epoch"]
        self.processed_indices = set(state_dict["processed_indices"])
        self.processed_num = state_dict.get("processed_num", len(self.processed_indices))
        self.reset()

    def take_over(self, everyones: Sequence[dict[str, Any]]) -> None:
        """Be at rank 0's epoch, with what any rank has recorded of it."""
        epoch = everyones[0]["epoch"]
        recorded = (s["processed_indices"] for s in everyones if s["epoch"] == epoch)
        self.load_state_dict({"epoch": epoch, "processed_indices": set().union(*recorded)})

    def __iter__(self) -> Iterator[int]:
        self._deal()
        return iter(self.indices)

    def __len__(self) -> int:
        return self.num_samples

    def _deal(self) -> None:
        order = list(self.remaining_indices)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = [order[i] for i in torch.randperm(len(order), generator=generator).tolist()]
        if order:
            order = (order * -(-self.total_size // len(order)))[: self.total_size]
        self.indices = order[self.rank : self.total_size : self.num_replicas]
