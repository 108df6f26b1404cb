"""The backend "mpizero" and gloo, side by side in one launch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch.distributed as dist

import mpizero_torch.distributed  # noqa: F401 (registers the backend)


@dataclass(frozen=True)
class Pair:
    """Groups of all ranks: the default one, which is ours, and gloo's."""

    ours: Any
    gloo: Any

    def __iter__(self) -> Iterator[Any]:
        return iter((self.ours, self.gloo))


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    dist.init_process_group("mpizero")
    yield Pair(dist.GroupMember.WORLD, dist.new_group(backend="gloo"))
    dist.barrier()
    dist.destroy_process_group()
