"""``node_shared``: one copy of a data set for all ranks of a node."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mpizero import ArgumentError, World
from mpizero_torch.runtime import init

_FUNCTION = "node_shared()"


def node_shared(source: Any, *, writable: bool = False, world: World | None = None) -> Any:
    """The array or CPU tensor ``source``, once in the memory of each node for all of its ranks.

    ``source``: an array or tensor of the node's first rank (what others give is not looked at, so
    they may give None), or a function without arguments that returns one and is called on that rank
    alone: then there never is more than one copy while it is made. Any shape and dtype but objects.

    Returns an array or tensor of that shape and dtype on every rank. Arrays cannot be written to
    unless ``writable``. torch knows no memory that cannot: what a rank writes into a tensor, or
    into a writable array, the node's other ranks read, at the latest after the next collective
    call; other nodes never do. Two ranks that write to the same place at once leave either's.

    Collective. The memory is given back when all ranks have let go of it. Where /dev/shm has no
    room for it, each rank gets a copy of its own, with a warning; if ``writable`` that would not do
    what it says, so ArgumentError. What fails on a node's first rank is told to all ranks.
    """
    everyone = world if world is not None else init()
    node = everyone.node
    with everyone.together(_FUNCTION):
        value, form = None, None
        with node.telling():
            if node.rank == 0:
                value = source() if callable(source) else source
                form = _form(value)
        form = node.broadcast_object(form)
        return _share(node, value, form, writable)


def _form(value: Any) -> tuple[bool, Any, tuple[int, ...]]:
    """Is it a tensor, its dtype and its shape."""
    if isinstance(value, torch.Tensor) and value.device.type == "cpu" and not value.is_sparse:
        return True, value.dtype, tuple(value.shape)
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return False, value.dtype, value.shape
    what = f"a {type(value).__name__}"
    if isinstance(value, np.ndarray):
        what = f"an array of dtype {value.dtype}"
    elif isinstance(value, torch.Tensor):
        what = f"a tensor on {value.device}, {value.layout}"
    raise ArgumentError(
        _FUNCTION, "source", what, "an array of numbers or a dense CPU tensor, or what makes one"
    )


def _share(node: World, value: Any, form: tuple[bool, Any, tuple[int, ...]], writable: bool) -> Any:
    is_tensor, dtype, shape = form
    itemsize = dtype.itemsize
    nbytes = int(np.prod(shape, dtype=np.int64)) * itemsize
    memory = node.allocate_common(nbytes, np.uint8) if nbytes else np.empty(0, np.uint8)
    is_common = memory is not None
    if memory is None:
        if writable and node.size > 1:
            raise ArgumentError(
                _FUNCTION, "writable", f"True for {nbytes} bytes, for which /dev/shm has no room",
                "what one copy in memory can be of", "Enlarge /dev/shm, or share it read-only.",
            )  # fmt: skip
        memory = np.empty(nbytes, np.uint8)
    found = _viewed(memory, is_tensor, dtype, shape)
    if node.rank == 0:
        if is_tensor:
            found.copy_(value.detach())
        else:
            found[...] = value
    if is_common:
        node.barrier()
    else:
        node.broadcast(memory)
    if not is_tensor:
        found.flags.writeable = writable
    return found


def _viewed(memory: Any, is_tensor: bool, dtype: Any, shape: tuple[int, ...]) -> Any:
    if not is_tensor:
        return memory.view(dtype).reshape(shape) if memory.size else np.empty(shape, dtype)
    if not memory.size:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(memory).view(dtype).reshape(shape)
