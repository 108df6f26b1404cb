"""The optimizer's state: from this rank's shards to whole parameters' and back.

Whole state has the form of the plain torch optimizer's ``state_dict``: parameters by number, in the
order of its groups. It travels in pieces, small ones together, so that no rank needs memory for
more than the result and one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from mpizero import ArgumentError
from mpizero.engine import ShardGroup
from mpizero_torch import slices
from mpizero_torch.sharding.runs import Run, not_by_element, split

_NUMBERED = "step"  # counts steps: never a number for each element, never rounded to another dtype

_PACK_BYTES = 4 << 20  # of small pieces of state that travel together


@dataclass(frozen=True)
class Held:
    """A tensor of state that some rank holds: of elements ``start`` to ``stop`` of a parameter.

    ``sliced``: one number for each element; else of any shape, for the parameter as a whole.
    """

    rank: int
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    sliced: bool


@dataclass(frozen=True)
class Stored:
    """A tensor of state that is not here as a whole: ``read(elements)`` gives some of it, 1-D.

    What it gives is overwritten by what is read next.
    """

    shape: tuple[int, ...]
    read: Callable[[slice], torch.Tensor]

    def whole(self) -> torch.Tensor:
        return self.read(slice(0, prod(self.shape))).view(self.shape).clone()


def consolidate(
    inner: torch.optim.Optimizer,
    runs: Sequence[Run],
    members: Sequence[Sequence[int]],
    shapes: Sequence[tuple[int, ...]],
    group: ShardGroup,
    root: int | None,
) -> dict[str, Any]:
    """The plain optimizer's state_dict, on every rank or on ``root``. Collective."""
    state = whole_state(inner, runs, _numbers(members), shapes, group, root)
    packed, at = [], 0
    for settings, indices in zip(inner.param_groups, members, strict=True):
        own = {key: value for key, value in settings.items() if key != "params"}
        packed.append({**own, "params": list(range(at, at + len(indices)))})
        at += len(indices)
    return {"state": state, "param_groups": packed}


def whole_state(
    inner: torch.optim.Optimizer,
    runs: Sequence[Run],
    numbers: Mapping[int, int],
    shapes: Sequence[tuple[int, ...]],
    group: ShardGroup,
    root: int | None,
) -> dict[int, dict[str, Any]]:
    """The state of parameters, under the ``numbers`` that are given for them. Collective."""
    tensors, others = own_state(inner, runs, group)
    everyones = group.world.gather_objects((_describe(tensors, group), others))
    others = merged([other for _, other in everyones])
    wanted = root is None or root == group.world.rank
    state: dict[int, dict[str, Any]] = {}
    wholes = _gather(tensors, [held for held, _ in everyones], numbers, shapes, group, wanted)
    for index, number in numbers.items():
        found: dict[str, Any] = wholes.get(index, {})
        found.update(others.get(index, {}))
        if found and wanted:
            state[number] = {key: found[key] for key in sorted(found, key=_like_torch)}
    return state


def merged(everyones: Iterable[dict[int, dict[str, Any]]]) -> dict[int, dict[str, Any]]:
    """What all ranks' state has for each parameter as a whole.

    Raises ArgumentError if ranks have different for parts of one parameter.
    """
    found: dict[int, dict[str, Any]] = {}
    for others in everyones:
        for index, values in others.items():
            own = found.setdefault(index, {})
            for key, value in values.items():
                if key in own and repr(own[key]) != repr(value):
                    raise ArgumentError(
                        "state_dict()", "partition", "'flat' for an optimizer whose state "
                        f"'{key}' differs between the parts of a parameter ({own[key]!r} and "
                        f"{value!r})", "partition='parameter'",
                        "Such an optimizer looks at more than one element at a time.",
                    )  # fmt: skip
                own[key] = value
    return found


def distribute(
    inner: torch.optim.Optimizer,
    runs: Sequence[Run],
    members: Sequence[Sequence[int]],
    shapes: Sequence[tuple[int, ...]],
    saved: dict[str, Any],
) -> list[Run]:
    """Let each run have its part of ``saved``; returns the runs, cut where their pasts differ.

    Raises ArgumentError if it is of other groups or of parameters of other shapes.
    """
    sizes = [len(each["params"]) for each in saved["param_groups"]]
    if sizes != [len(each) for each in members]:
        raise ArgumentError(
            "load_state_dict()", "state_dict", f"of groups of {sizes} parameters",
            f"of groups of {[len(each) for each in members]} parameters",
        )  # fmt: skip
    order = [number for each in saved["param_groups"] for number in each["params"]]
    indices = [index for each in members for index in each]
    state = {
        index: {key: _here(key, _own(value), shapes[index]) for key, value in found.items()}
        for index, number in zip(indices, order, strict=True)
        if (found := saved["state"].get(number)) is not None
    }
    for index, values in state.items():
        _check(index, values, shapes[index])

    def past(index: int) -> Hashable:
        """What must be equal for two parameters to go on together."""
        values = state.get(index)
        if values is None:
            return None
        return tuple(
            (key, None if _is_sliced(key, value, shapes[index]) else _plain(value))
            for key, value in sorted(values.items())
        )

    inner.state.clear()
    runs = split(runs, past, inner.state)
    for run in runs:
        if run.pieces and run.pieces[0].index in state:
            inner.state[run.parameter] = _state_of(run, state, shapes)
    for settings, theirs in zip(inner.param_groups, saved["param_groups"], strict=True):
        settings.update({key: value for key, value in theirs.items() if key != "params"})
    return list(runs)


def own_state(
    inner: torch.optim.Optimizer, runs: Sequence[Run], group: ShardGroup
) -> tuple[dict[tuple[int, str], dict[int, tuple[int, torch.Tensor, bool]]], dict[int, Any]]:
    """This rank's tensors by parameter, key and first element; and what is no tensor of size."""
    tensors: dict[tuple[int, str], dict[int, tuple[int, torch.Tensor, bool]]] = {}
    others: dict[int, dict[str, Any]] = {}
    if not group.is_holder:
        return tensors, others  # another rank holds the same
    for run in runs:
        for key, value in inner.state.get(run.parameter, {}).items():
            for piece in run.pieces:
                if not isinstance(value, torch.Tensor) or value.dim() == 0:
                    plain = value.clone() if isinstance(value, torch.Tensor) else value
                    others.setdefault(piece.index, {})[key] = plain
                    continue
                sliced = value.shape == run.parameter.shape
                if run.is_cut and not sliced and value.numel() > 1:
                    raise not_by_element("state_dict()", key, tuple(value.shape))
                part = value.reshape(-1)[piece.place] if sliced else value
                held = tensors.setdefault((piece.index, key), {})
                held[piece.elements.start] = (piece.elements.stop, part, sliced)
    return tensors, others


def _describe(tensors: dict[Any, Any], group: ShardGroup) -> dict[tuple[int, str], list[Held]]:
    rank = group.world.rank
    return {
        key: [
            Held(rank, start, stop, tuple(value.shape), value.dtype, sliced)
            for start, (stop, value, sliced) in sorted(pieces.items())
        ]
        for key, pieces in tensors.items()
    }


def _gather(
    tensors: Mapping[tuple[int, str], Mapping[int, tuple[int, torch.Tensor, bool]]],
    everyones: Sequence[Mapping[tuple[int, str], Sequence[Held]]],
    indices: Iterable[int],
    shapes: Sequence[tuple[int, ...]],
    group: ShardGroup,
    wanted: bool,
) -> dict[int, dict[str, Any]]:
    """The parameters' states by number and key, put together where they are ``wanted``."""
    holders: dict[tuple[int, str], list[Held]] = {}
    for theirs in everyones:
        for place, pieces_there in theirs.items():
            holders.setdefault(place, []).extend(pieces_there)
    known = set(indices)
    every = [
        (place, held)
        for place in sorted(holders)
        if place[0] in known
        for held in sorted(holders[place], key=lambda each: each.start)
    ]
    found: dict[int, dict[str, Any]] = {}
    device = torch.device(group.world.device.name)
    for pack in _packs(every):
        holder, dtype = pack[0][1].rank, pack[0][1].dtype
        if holder == group.world.rank:
            own = [tensors[place][held.start][1].reshape(-1) for place, held in pack]
            flat = own[0].contiguous() if len(own) == 1 else torch.cat(own)
        else:
            count = sum(prod(held.shape) for _, held in pack)
            flat = torch.empty(count, dtype=dtype, device=device)
        group.world.broadcast(flat, holder)
        pieces = flat.split([prod(held.shape) for _, held in pack]) if wanted else ()
        for (place, held), piece in zip(pack, pieces, strict=wanted):
            index, key = place
            state = found.setdefault(index, {})
            if not held.sliced:
                state[key] = piece.clone().view(held.shape)
                continue
            if key not in state:
                state[key] = torch.empty(shapes[index], dtype=dtype, device=device)
            state[key].view(-1)[held.start : held.stop] = piece
    return found


def _packs(
    every: Sequence[tuple[tuple[int, str], Held]],
) -> list[list[tuple[tuple[int, str], Held]]]:
    """What travels together: of one rank and dtype, up to so many bytes; larger ones alone."""
    packs: list[list[tuple[tuple[int, str], Held]]] = []
    filled: dict[tuple[int, torch.dtype], tuple[list[Any], int]] = {}
    for place, held in every:
        kind, nbytes = (held.rank, held.dtype), prod(held.shape) * held.dtype.itemsize
        pack, before = filled.get(kind, ([], _PACK_BYTES))
        if before + nbytes > _PACK_BYTES:
            pack, before = [], 0
            packs.append(pack)
        pack.append((place, held))
        filled[kind] = (pack, before + nbytes)
    return packs


def _state_of(run: Run, state: dict[int, Any], shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """The state of a run, whose parameters have the same past."""
    parameter, first = run.parameter, run.pieces[0].index
    result: dict[str, Any] = {}
    for key, value in state[first].items():
        if not _is_sliced(key, value, shapes[first]):
            if run.is_cut and isinstance(value, torch.Tensor) and value.numel() > 1:
                raise not_by_element("load_state_dict()", key, tuple(value.shape))
            result[key] = _as_torch_keeps(key, value, parameter)
            continue
        own = torch.zeros_like(parameter.detach())
        for piece in run.pieces:
            other = state[piece.index][key]
            stored = isinstance(other, Stored)
            theirs = other.read(piece.elements) if stored else other.reshape(-1)[piece.elements]
            own.view(-1)[piece.place] = theirs.to(own)
        result[key] = own
    return result


def _as_torch_keeps(key: str, value: Any, parameter: torch.Tensor) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if key == _NUMBERED or not parameter.is_floating_point():
        return value.clone()
    return value.to(dtype=parameter.dtype, device=parameter.device, copy=True)


def _here(key: str, value: Any, shape: tuple[int, ...]) -> Any:
    """What is not cut up is needed as a whole."""
    if isinstance(value, Stored) and not _is_sliced(key, value, shape):
        return value.whole()
    return value


def _own(value: Any) -> Any:
    """Of a DTensor the part that is on this rank, as its parameter's."""
    return slices.local(value) if isinstance(value, torch.Tensor) else value


def _is_sliced(key: str, value: Any, shape: tuple[int, ...]) -> bool:
    return (
        isinstance(value, torch.Tensor | Stored)
        and key != _NUMBERED
        and tuple(value.shape) == shape
    )


def _check(index: int, values: dict[str, Any], shape: tuple[int, ...]) -> None:
    """A first moment, for instance, has its parameter's shape: does this one?"""
    for key in ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum"):
        value = values.get(key)
        if isinstance(value, torch.Tensor | Stored) and tuple(value.shape) != shape:
            raise ArgumentError(
                "load_state_dict()", f"state of parameter {index}",
                f"'{key}' of shape {tuple(value.shape)}", f"shape {shape}",
            )  # fmt: skip


def _plain(value: Any) -> Hashable:
    return tuple(value.reshape(-1).tolist()) if isinstance(value, torch.Tensor) else repr(value)


def _like_torch(key: str) -> tuple[bool, str]:
    return key != _NUMBERED, key


def _numbers(members: Sequence[Sequence[int]]) -> dict[int, int]:
    """The plain optimizer's number of each parameter."""
    return {
        index: number for number, index in enumerate(index for each in members for index in each)
    }
