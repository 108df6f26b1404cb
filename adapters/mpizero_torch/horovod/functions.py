"""Models, optimizers and objects from one rank, or from each, to all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from mpizero import ArgumentError, World
from mpizero_torch.horovod.negotiation import Handle
from mpizero_torch.horovod.process_set import ProcessSet, global_process_set
from mpizero_torch.replicate import broadcast_tensors


def broadcast_parameters(
    params: Any, root_rank: int, process_set: ProcessSet = global_process_set
) -> None:
    """Give every rank the parameters of ``root_rank``, in place. Collective.

    ``params``: a dict (``model.state_dict()``), or pairs of names and tensors
    (``model.named_parameters()``); the same names, shapes and dtypes on all ranks.
    """
    kind, function = "broadcast_parameters", "hvd.broadcast_parameters()"
    with process_set.negotiation.refusing(kind, None):
        tensors = _named_tensors(function, params)
        root = process_set.local(root_rank, function)

    def work(world: World) -> None:
        words = [f"{n}: {t.dtype}, shape {tuple(t.shape)}" for n, t in tensors.items()]
        world.agree(words, "parameters")
        broadcast_tensors(list(tensors.values()), world, root)

    _do(process_set, kind, None, f"root_rank {root_rank}", work)


def _named_tensors(function: str, params: Any) -> dict[str, torch.Tensor]:
    """What there is to broadcast, by name. ArgumentError for what is no tensor."""
    if isinstance(params, Mapping):
        pairs = sorted(params.items())
    elif isinstance(params, Iterable):
        pairs = [
            each if isinstance(each, tuple) else (str(i), each) for i, each in enumerate(params)
        ]
    else:
        raise ArgumentError(
            function, "params", f"a {type(params).__name__}", "a dict, or pairs of name and tensor"
        )
    tensors = {}
    for name, each in pairs:
        if isinstance(each, torch.Tensor):
            tensors[name] = each
        elif each is not None:
            raise ArgumentError(
                function, "params", f"a {type(each).__name__} at {name!r}", "tensors",
                "Take broadcast_object() for the rest.",
            )  # fmt: skip
    return tensors


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer,
    root_rank: int,
    model: torch.nn.Module | None = None,
    process_set: ProcessSet = global_process_set,
) -> None:
    """Give every rank the state and the options of the optimizer of ``root_rank``. Collective.

    Any of ``torch.optim``; what the root has no state for has none on the others either. ``model``
    is taken, and not needed.
    """
    kind = "broadcast_optimizer_state"
    with process_set.negotiation.refusing(kind, None):
        root = process_set.local(root_rank, f"hvd.{kind}()")

    def work(world: World) -> None:
        with world.together(f"hvd.{kind}()"):
            send(world)

    def send(world: World) -> None:
        is_root = world.rank == root
        state: Any = optimizer.state_dict() if is_root else None
        found: list[torch.Tensor] = []

        def place(tensor: torch.Tensor) -> _Place:
            found.append(tensor)
            return _Place(tensor.dtype, tuple(tensor.shape), tensor.device.type)

        def tensor(place: _Place) -> torch.Tensor:
            found.append(torch.empty(place.shape, dtype=place.dtype, device=place.device))
            return found[-1]

        form = world.broadcast_object(tree_map_only(torch.Tensor, place, state), root)
        if not is_root:
            state = tree_map_only(_Place, tensor, form)
        broadcast_tensors(found, world, root)
        if not is_root:
            optimizer.load_state_dict(state)

    _do(process_set, kind, None, f"root_rank {root_rank}", work)


def broadcast_object(
    obj: Any,
    root_rank: int = 0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """The picklable object of ``root_rank``, on every rank. Collective."""
    kind = "broadcast_object"
    with process_set.negotiation.refusing(kind, name):
        root = process_set.local(root_rank, f"hvd.{kind}()")
    return _do(
        process_set, kind, name, f"root_rank {root_rank}",
        lambda world: world.broadcast_object(obj, root),
    )  # fmt: skip


def allgather_object(
    obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Any]:
    """Every rank's picklable object, in the order of ranks, on every rank. Collective."""
    found: list[Any] = _do(
        process_set, "allgather_object", name, "objects", lambda world: world.gather_objects(obj)
    )
    return found


@dataclass(frozen=True)
class _Place:
    """Where a tensor belongs, for those who have not got it yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    device: str


def _do(process_set: ProcessSet, kind: str, name: str | None, form: str, work: Any) -> Any:
    negotiation = process_set.negotiation
    return negotiation.submit(Handle(kind, negotiation.name(kind, name), form, work)).wait()
