"""Who writes what of a checkpoint, where a mesh has cut the model along several axes.

A checkpoint has whole tensors under the model's names, whatever has cut them up: slices of tensor
parallelism are written as the strips of the whole that they are, stages of a pipeline add up to all
the names, and what several ranks hold is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from mpizero import Mesh, World
from mpizero.checkpoint import (
    Box,
    Part,
    Piece,
    Readable,
    TensorSpec,
    read_box,
    shared_part,
)
from mpizero_torch import slices, tensors


@dataclass(frozen=True)
class Axes:
    """Ranks by what they hold: of a mesh, or, without one, ``everyone`` the same."""

    everyone: World
    stage: World  # those that hold the same layers
    copies: World  # those that hold the same part of them
    mesh: Mesh | None = None

    @classmethod
    def of(cls, world: World, sharers: World | None = None) -> Axes:
        """Those of the mesh that ``world`` belongs to. Collective the first time.

        ``sharers``: without a mesh, the ranks among whom is dealt out what all have.
        """
        mesh = world.mesh
        if mesh is None:
            return cls(world, sharers or world, sharers or world)
        return cls(mesh.world, mesh["dp", "sp", "tp"], mesh.replicas, mesh)

    def part_of(self, name: str, arrays: Mapping[str, torch.Tensor | Any]) -> Part:
        """A part of tensors that replicas have: each rank writes some of its slices."""
        whole: dict[str, Any] = {}
        cut: dict[str, torch.Tensor] = {}
        for key, value in arrays.items():
            if isinstance(value, torch.Tensor) and not slices.box(value).is_whole:
                cut[key] = value
            else:
                tensor = isinstance(value, torch.Tensor)
                whole[key] = tensors.as_array(slices.local(value)) if tensor else value
        slices.check("save()", list(cut.items()), self.copies)
        own = {key: tensors.as_array(slices.local(value)) for key, value in cut.items()}
        among_copies = shared_part(name, own, self.copies)
        among_stage = shared_part(name, whole, self.stage)
        boxes = {key: slices.box(value) for key, value in cut.items()}
        specs = [replace(spec, shape=boxes[spec.name].shape) for spec in among_copies.specs]
        pieces = [
            strip
            for piece in among_copies.pieces
            if slices.copy_number(cut[piece.name], self.copies) == 0
            for strip in strips(piece, boxes[piece.name])
        ]
        return Part(name, [*specs, *among_stage.specs], [*pieces, *among_stage.pieces])

    def all_stages(self, part: Part) -> Part:
        """The part with the other stages' tensors; of those that several have, the first's."""
        stages = self._stages
        if stages is None:
            return part
        everyones = stages.gather_objects((list(part.specs), part.metadata or {}))
        specs: list[TensorSpec] = []
        aliases: dict[str, str] = {}
        mine: set[str] = set()
        seen: set[str] = set()
        for rank, (theirs, metadata) in enumerate(everyones):
            fresh = [spec for spec in theirs if spec.name not in seen]
            seen.update(spec.name for spec in fresh)
            specs += fresh
            aliases.update(metadata)
            if rank == stages.rank:
                mine = {spec.name for spec in fresh}
        pieces = [piece for piece in part.pieces if piece.name in mine]
        metadata = {key: value for key, value in aliases.items() if key not in seen}
        return Part(part.name, specs, pieces, metadata or None)

    def gather_stages(self, value: Any) -> list[Any]:
        """Every stage's picklable ``value``, in order; this rank's alone without stages."""
        return [value] if self._stages is None else self._stages.gather_objects(value)

    @property
    def _stages(self) -> World | None:
        return self.mesh.pp if self.mesh is not None and self.mesh.pp.size > 1 else None


def merged(tables: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """All entries of tables; of a key that several have, the first's."""
    found: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            found.setdefault(key, value)
    return found


def strips(piece: Piece, box: Box) -> Iterator[Piece]:
    """A piece of what a rank has of a tensor, as pieces of the whole tensor."""
    if box.is_whole:
        yield piece
        return
    elements = slice(piece.start, piece.start + piece.values.size)
    for start, which in box.strips(elements):
        values = piece.values[which.start - piece.start : which.stop - piece.start]
        yield Piece(piece.name, start, values)


def reader(checkpoint: Readable, part: str, name: str, box: Box) -> Callable[[slice], torch.Tensor]:
    """What reads elements of this rank's part of a stored tensor, 1-D, in memory that is lent."""
    return lambda elements: tensors.as_tensor(read_box(checkpoint, part, name, box, elements))


def read_own(checkpoint: Readable, part: str, name: str, box: Box) -> torch.Tensor:
    """This rank's part of a stored tensor, in its shape, in memory that is lent."""
    count = prod(box.sizes)
    return reader(checkpoint, part, name, box)(slice(0, count)).view(box.sizes)
