"""``gather_predictions``: what the ranks have found, as one process would have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mpizero import ArgumentError, World
from mpizero_torch.data import ShardedLoader, ShardedStream
from mpizero_torch.data.handed_out import HandedOut
from mpizero_torch.weighed_batches import stripped

_FUNCTION = "gather_predictions()"


def gather_predictions(values: Any, loader: Any) -> Any:
    """All ranks' ``values`` for the last loop over ``loader``, in the order of the data set.

    ``loader``: of ``shard(..., evaluation=True)``. ``values``: a list with one tensor or array for
    each batch that this rank was given, or one for all of them; one row (along the first axis) for
    each sample, of any dtype, with the same further axes on all ranks. Or lists of Python objects
    likewise, as of texts; or a dict or tuple of all that, for outputs and targets at once.

    Returns on every rank one CPU tensor, array or list, or a dict or tuple of them, with one row
    for each sample of all ranks: by index, as in the data set, whatever the order of the loop;
    where there are no indices, as in streams, in the order in which they were read. Collective: all
    ranks call it after the loop, those that were given nothing, too (with an empty list). Raises
    ArgumentError for values that are not one for each sample, and MismatchError where dtypes or
    shapes differ between the ranks.
    """
    handed_out = getattr(loader, "handed_out", None)
    if not isinstance(loader, ShardedLoader | ShardedStream) or handed_out is None:
        raise ArgumentError(
            _FUNCTION, "loader", f"a {type(loader).__name__} that is not for evaluation",
            "what shard(..., evaluation=True) gives",
        )  # fmt: skip
    world = loader.world
    with world.telling():
        order = None
        columns = dict(_columns(stripped(values), handed_out, ""))
        form = _form(stripped(values))
        own = {name: _of_rows(rows) for name, rows in columns.items()}
    everyones = world.gather_objects((form, own, handed_out.places(world.rank)))
    order = _order([place for _, _, places in everyones for place in places])
    with world.telling():
        form, kinds = _agreed(everyones)
    found = {name: _gathered(columns.get(name), kind, world, order) for name, kind in kinds.items()}
    return _built(form, found, "")


def _columns(values: Any, handed_out: HandedOut, name: str) -> Any:
    """This rank's rows for each leaf of ``values``, by the leaf's name."""
    if isinstance(values, Mapping):
        for key, each in values.items():
            yield from _columns(each, handed_out, f"{name}.{key}")
    elif isinstance(values, tuple):
        for at, each in enumerate(values):
            yield from _columns(each, handed_out, f"{name}.{at}")
    else:
        yield name, _rows(values, handed_out.sizes, name)


def _rows(values: Any, sizes: list[int], name: str) -> Any:
    """One array, or list, of a row for each sample."""
    what = f"values{name}"
    if isinstance(values, torch.Tensor | np.ndarray):
        values = [values]
        sizes = [sum(sizes)]
    if not isinstance(values, list):
        raise ArgumentError(
            _FUNCTION, what, f"a {type(values).__name__}", "tensors, arrays, or lists of them"
        )
    of_batches = all(isinstance(each, torch.Tensor | np.ndarray | list) for each in values)
    if not of_batches:
        values, sizes = [values], [sum(sizes)]
    found = [len(each) if getattr(each, "ndim", 1) else -1 for each in values]
    if found != sizes:
        raise ArgumentError(
            _FUNCTION, what, f"rows {_short(found)} for batches of {_short(sizes)} samples",
            "one row for each sample of each batch of the last loop",
        )  # fmt: skip
    if not values or not sum(sizes):
        return None
    if all(isinstance(each, torch.Tensor) for each in values):
        return torch.cat([each.detach().cpu() for each in values])
    if all(isinstance(each, np.ndarray) for each in values):
        return np.concatenate(values)
    return [row for each in values for row in each]


def _of_rows(rows: Any) -> Any:
    """What can be compared: the kind of rows, their dtype and shape."""
    if isinstance(rows, torch.Tensor):
        return ("tensor", rows.dtype, tuple(rows.shape[1:]))
    if isinstance(rows, np.ndarray):
        return ("array", rows.dtype, rows.shape[1:])
    return None if rows is None else ("list", None, ())


def _form(values: Any) -> Any:
    """The containers of ``values``, with None for each leaf."""
    if isinstance(values, Mapping):
        return {key: _form(each) for key, each in values.items()}
    if isinstance(values, tuple):
        return tuple(_form(each) for each in values)
    return None


def _agreed(everyones: Sequence[tuple[Any, dict[str, Any], Any]]) -> tuple[Any, dict[str, Any]]:
    """The form of the values, and the kind of rows of each leaf; of those ranks that have some."""
    having = [(form, own) for form, own, places in everyones if places]
    if not having:
        return everyones[0][0], dict.fromkeys(everyones[0][1])
    form, kinds = having[0]
    for rank, (other, own, places) in enumerate(everyones):
        if places and (other != form or own != kinds):
            raise ArgumentError(
                _FUNCTION, "values", f"{own} on rank {rank}, {kinds} on another",
                "the same dtype and shape of a row on all ranks",
            )  # fmt: skip
    return form, kinds


def _gathered(rows: Any, kind: Any, world: World, order: list[int]) -> Any:
    if kind is None:
        return []
    name, dtype, shape = kind
    if name == "list" or (name == "array" and dtype.hasobject):
        every = [row for rows in world.gather_objects(rows) if rows is not None for row in rows]
        ordered = [every[at] for at in order]
        return ordered if name == "list" else np.array(ordered, dtype)
    if name == "array":
        own = np.empty((0, *shape), dtype) if rows is None else rows
        return _bytes_of(own, world)[order]
    own = torch.empty((0, *shape), dtype=dtype) if rows is None else rows.contiguous()
    flat = own.reshape(len(own), -1).view(torch.uint8) if own.numel() else None
    return _tensor(own, flat, world)[order]


def _bytes_of(own: Any, world: World) -> Any:
    """All ranks' rows of an array of any dtype: they travel as bytes."""
    width = own.dtype.itemsize * int(np.prod(own.shape[1:]))
    flat = np.frombuffer(np.ascontiguousarray(own).tobytes(), np.uint8).reshape(len(own), width)
    every = world.allgather_uneven(flat)
    return np.frombuffer(every.tobytes(), own.dtype).reshape(len(every), *own.shape[1:])


def _tensor(own: torch.Tensor, flat: torch.Tensor | None, world: World) -> torch.Tensor:
    """All ranks' rows of a tensor of any dtype, bfloat16 too: as bytes."""
    width = own.dtype.itemsize * int(np.prod(own.shape[1:]))
    part = np.empty((0, width), np.uint8) if flat is None else flat.numpy()
    every = torch.from_numpy(world.allgather_uneven(part.reshape(len(own), width)))
    if not every.numel():
        return every.new_empty((len(every), *own.shape[1:]), dtype=own.dtype)
    return every.view(own.dtype).reshape(len(every), *own.shape[1:])


def _order(places: list[tuple[Any, Any]]) -> list[int]:
    """Where the rows lie that come first, second, ..."""
    by_index = all(isinstance(index, int | np.integer) for index, _ in places)
    return sorted(
        range(len(places)), key=(lambda at: places[at]) if by_index else lambda at: places[at][1]
    )


def _built(form: Any, found: dict[str, Any], name: str) -> Any:
    if isinstance(form, dict):
        return {key: _built(each, found, f"{name}.{key}") for key, each in form.items()}
    if isinstance(form, tuple):
        return tuple(_built(each, found, f"{name}.{at}") for at, each in enumerate(form))
    return found[name]


def _short(counts: list[int]) -> str:
    return str(counts) if len(counts) < 12 else f"[{', '.join(map(str, counts[:10]))}, ...]"
