"""The random numbers of this process: Python's, numpy's and torch's global generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Let all three begin anew; ``seed`` may be any count below 2^63."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derive(*counts: int) -> int:
    """A seed that follows from some counts; others give another one."""
    return int(np.random.SeedSequence(counts).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def unchanged(active: bool = True) -> Iterator[None]:
    """What is drawn in here was not drawn, if ``active``: afterwards all go on as before."""
    if not active:
        yield
        return
    python, numbers, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        torch.set_rng_state(own)
