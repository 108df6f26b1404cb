"""How fast 16-bit floats are converted: numpy's way and torch's, on one core.

python benchmarks/half_conversions.py
"""

from __future__ import annotations

import timeit
from functools import partial

import numpy as np
import torch

from mpizero.reduction import half
from mpizero.reduction.operation import BLOCK
from mpizero_torch import half_kernels


def main() -> None:
    torch.set_num_threads(1)
    wide = np.random.default_rng(0).normal(size=BLOCK).astype(np.float32)
    print(f"microseconds for {BLOCK} numbers, best of 5")
    for dtype, torchs in half_kernels.TORCH.items():
        narrow = wide.astype(dtype)
        for name, each in (("numpy", half.BUILT_IN[dtype]), ("torch", torchs)):
            to = min(timeit.repeat(partial(each.widen, narrow), number=100))
            back = min(timeit.repeat(partial(each.narrow, wide, narrow), number=100))
            print(f"{dtype.name:9} {name}: to float32 {to * 1e4:6.1f}, back {back * 1e4:6.1f}")


if __name__ == "__main__":
    main()
