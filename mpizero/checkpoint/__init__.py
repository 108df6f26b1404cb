"""Checkpoints: standard safetensors files that all ranks write at once, and any number can read.

A checkpoint is a folder::

    model.safetensors        tensors under their own names (several files and their index, if large)
    optimizer.safetensors    ... and of other parts
    checksums.bin            of every range of the files that was written by one rank at a time
    manifest.json            files, checksums, and all that is no tensor

It is there wholly or not at all (``folder``), is cut anew for whoever reads it (``read``), and
holds no pickles (``tree``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpizero.api import World
from mpizero.checkpoint import tree
from mpizero.checkpoint.background import PendingSave, carry_out
from mpizero.checkpoint.box import Box, read_box
from mpizero.checkpoint.export import export_safetensors
from mpizero.checkpoint.foreign import SafetensorsFiles
from mpizero.checkpoint.format import TensorSpec
from mpizero.checkpoint.notes import leftovers
from mpizero.checkpoint.read import Checkpoint, agreed, exists, newest
from mpizero.checkpoint.readable import Readable
from mpizero.checkpoint.write import LARGEST_FILE, Part, Piece, Save, shared_part
from mpizero.sharded import ShardedState

__all__ = [
    "LARGEST_FILE",
    "Box",
    "Checkpoint",
    "Part",
    "PendingSave",
    "Piece",
    "Readable",
    "SafetensorsFiles",
    "Save",
    "TensorSpec",
    "agreed",
    "carry_out",
    "exists",
    "export_safetensors",
    "leftovers",
    "load",
    "newest",
    "read_box",
    "save",
    "shared_part",
    "tree",
]

_PART = "state"
_SHARDED = "$sharded"


def save(
    path: str | os.PathLike[str],
    values: Mapping[str, Any],
    world: World,
    *,
    asynchronous: bool = False,
    largest_file: int = LARGEST_FILE,
    writer: str = "auto",
) -> PendingSave | None:
    """Save named values: ``ShardedState``, arrays, and nested plain values. Collective.

    Arrays and plain values must be the same on all ranks; each rank writes a part of them.
    ``asynchronous`` copies this rank's bytes and returns what to ``wait()`` for. ``writer`` is
    "posix", "mpi-io", or "auto", by the file system. Raises CheckpointError on every rank if one
    cannot write, and ArgumentError for values that would need a pickle.
    """
    with world.together("save()"):
        part, plain = _collect(values, world)
        job = Save(Path(path), world, [part], plain, largest_file=largest_file, writer=writer)
        return carry_out(job, world, asynchronous)


def _collect(values: Mapping[str, Any], world: World) -> tuple[Part, dict[str, Any]]:
    """The tensors, with this rank's pieces, and what is none."""
    arrays: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    specs: list[TensorSpec] = []
    pieces: list[Piece] = []
    for key, value in values.items():
        if isinstance(value, ShardedState):
            plain[key] = {_SHARDED: [[name, f"{key}.{name}"] for name in value.names]}
            for name in value.names:
                own, elements = value.piece(name)
                specs.append(TensorSpec(f"{key}.{name}", np.dtype(own.dtype), value.shape(name)))
                if own.size:
                    pieces.append(Piece(f"{key}.{name}", elements.start, own))
        else:
            plain[key] = tree.encode(value, key, arrays)
    shared = shared_part(_PART, arrays, world)
    return Part(_PART, [*specs, *shared.specs], [*pieces, *shared.pieces]), plain


def load(path: str | os.PathLike[str], world: World) -> dict[str, Any]:
    """What ``save`` was given, on any number of ranks: sharded states are cut for these.

    Collective. Raises CheckpointError, naming file and tensor, if there is none, or a damaged one:
    on every rank, whichever read it.
    """
    with Checkpoint(path, world) as checkpoint, agreed(world):

        def array(name: str) -> Any:
            return checkpoint.read(_PART, name)

        return {
            key: (
                _sharded(checkpoint, value[_SHARDED], world)
                if isinstance(value, Mapping) and _SHARDED in value
                else tree.decode(value, array)
            )
            for key, value in checkpoint.values.items()
        }


def _sharded(checkpoint: Checkpoint, names: Any, world: World) -> ShardedState:
    specs = {name: checkpoint.spec(_PART, stored) for name, stored in names}
    state = ShardedState.empty({n: (s.shape, s.dtype) for n, s in specs.items()}, world)
    for name, stored in names:
        own, elements = state.piece(name)
        if own.size:
            checkpoint.read_into(_PART, stored, elements.start, own)
    return state
