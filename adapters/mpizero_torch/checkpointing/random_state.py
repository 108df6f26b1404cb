"""Every rank's random numbers: Python's, numpy's, torch's (CPU and this rank's GPU) and CuPy's.

CuPy's generator tells nobody its state (cuRAND has no call for it). So at every save it begins anew
from a seed, which is saved: a run that goes on and one that is resumed draw the same.
"""

from __future__ import annotations

import random
import sys
import zlib
from typing import Any

import numpy as np
import torch

from mpizero import World
from mpizero.checkpoint import Part, Piece, Readable, TensorSpec
from mpizero_torch.random_state import derive, seed_all

PART = "ranks"


def random_part(world: World) -> tuple[Part, list[Any]]:
    """This rank's states, and what of all ranks' is no array. Collective."""
    seed = None
    if (cupy := _cupy(world)) is not None:
        seed = int(torch.randint(2**32, ()))  # and so another one at the next save
        cupy.random.seed(seed)
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    arrays: dict[str, Any] = {
        "python": np.array(words, np.uint32),
        "numpy": np.asarray(keys),
        "torch": torch.get_rng_state().numpy(),
    }
    if world.device.kind == "cuda":
        arrays["cuda"] = torch.cuda.get_rng_state().numpy()
    plain = {
        "cupy": seed,
        "python": [version, None if gauss is None else gauss.hex()],
        "numpy": [int(position), int(has_gauss), float(cached).hex()],
        "arrays": {name: [str(a.dtype), list(a.shape)] for name, a in arrays.items()},
    }
    everyones = world.gather_objects(plain)
    specs = [
        TensorSpec(f"{rank}.{name}", np.dtype(dtype), tuple(shape))
        for rank, each in enumerate(everyones)
        for name, (dtype, shape) in each["arrays"].items()
    ]
    pieces = [Piece(f"{world.rank}.{name}", 0, array) for name, array in arrays.items()]
    return Part(PART, specs, pieces), everyones


def is_needed(part: str, tensor: str, *, ranks: int) -> bool:
    """Not the states of further ranks, where there are only so many."""
    return part != PART or int(tensor.partition(".")[0]) < ranks


def restore(checkpoint: Readable, world: World) -> None:
    """Go on with the states that this rank had; a further rank gets one of its own."""
    everyones = checkpoint.values[PART]
    if world.rank >= len(everyones):
        seed_all(derive(zlib.crc32(checkpoint.read(PART, "0.torch").tobytes()), world.rank))
        return
    plain, specs = everyones[world.rank], checkpoint.specs(PART)

    def array(name: str) -> Any:
        return checkpoint.read(PART, f"{world.rank}.{name}")

    version, gauss = plain["python"]
    words = tuple(array("python").tolist())
    random.setstate((version, words, None if gauss is None else float.fromhex(gauss)))
    position, has_gauss, cached = plain["numpy"]
    np.random.set_state(("MT19937", array("numpy"), position, has_gauss, float.fromhex(cached)))
    torch.set_rng_state(torch.from_numpy(array("torch")))
    if plain.get("cupy") is not None and (cupy := _cupy(world)) is not None:
        cupy.random.seed(plain["cupy"])
    if world.device.kind == "cuda" and f"{world.rank}.cuda" in specs:
        torch.cuda.set_rng_state(torch.from_numpy(array("cuda")))


def _cupy(world: World) -> Any:
    """CuPy, where the training may use it."""
    return sys.modules.get("cupy") if world.device.kind == "cuda" else None
