"""``Mesh``: the ranks of a World as a grid, whose axes are sub-worlds for kinds of parallelism."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np

from mpizero.api.init import init
from mpizero.api.world import World
from mpizero.errors import ArgumentError

# Outermost first. What talks most is innermost, so that it stays within a node: tensor parallelism
# in every layer, sequence parallelism in every attention, data parallelism once a step; pipeline
# stages only hand activations on. (Narayanan et al. 2021, arXiv 2104.04473, section 3.)
AXES = ("pp", "dp", "sp", "tp")
_KIND = {"pp": "pipeline", "dp": "data", "sp": "sequence", "tp": "tensor"}


class Mesh:
    """The ranks of ``world`` in a grid of ``pp`` x ``dp`` x ``sp`` x ``tp``; made by ``mesh()``.

    ``mesh.dp``, ``mesh.tp``, ``mesh.pp`` and ``mesh.sp`` are Worlds: this rank and those that
    differ from it along that axis alone. ``mesh["dp", "tp"]`` is the World of those that differ
    along these axes; ``replicas`` (dp and sp) has those who hold the same part of the model,
    ``model`` (pp and tp) those who see the same data. A World of a mesh knows it: ``world.mesh``.
    """

    def __init__(
        self,
        world: World | None = None,
        *,
        dp: int | None = None,
        sp: int = 1,
        tp: int = 1,
        pp: int = 1,
    ) -> None:
        self.world = world = world if world is not None else init()
        shape = _sizes(world, {"pp": pp, "dp": dp, "sp": sp, "tp": tp})
        self.shape: Mapping[str, int] = MappingProxyType(shape)
        self._node_of = {rank: at for at, ranks in enumerate(world.nodes) for rank in ranks}
        self.ranks = _grid(world.nodes, tuple(self.shape.values()))
        at = np.argwhere(self.ranks == world.rank)[0].tolist()
        self.coordinates: Mapping[str, int] = MappingProxyType(dict(zip(AXES, at, strict=True)))
        self._worlds: dict[tuple[str, ...], World] = {tuple(self._long(AXES)): world}
        self._own: list[World] = []
        # All that is usually asked for is made now, so that asking for it talks to nobody.
        for axis in AXES:
            self._find((axis,))
        self.replicas, self.model = self["dp", "sp"], self["pp", "tp"]

    @property
    def dp(self) -> World:
        """Data parallelism: ranks with the same part of the model, on other data."""
        return self._find(("dp",))

    @property
    def tp(self) -> World:
        """Tensor parallelism: ranks that hold slices of the same layers."""
        return self._find(("tp",))

    @property
    def pp(self) -> World:
        """Pipeline parallelism: ranks that hold the model's stages, in order."""
        return self._find(("pp",))

    @property
    def sp(self) -> World:
        """Sequence parallelism: ranks that hold stretches of the same sequences, in order."""
        return self._find(("sp",))

    def __getitem__(self, axes: str | tuple[str, ...]) -> World:
        """The ranks that differ from this one along these axes only, in the mesh's order.

        Collective when a combination is asked for the first time, except for single axes,
        ("dp", "sp") and ("pp", "tp"). Raises ArgumentError for axes that there are not.
        """
        names = (axes,) if isinstance(axes, str) else tuple(axes)
        unknown = [name for name in names if name not in AXES]
        if unknown or not names:
            raise ArgumentError(
                "Mesh[...]", "axes", repr(axes), f"one or more of {', '.join(map(repr, AXES))}"
            )
        return self._find(names)

    def close(self) -> None:
        """Give the sub-worlds back. Collective over the mesh's World, which stays."""
        while self._own:
            own = self._own.pop()
            if not own.closed:
                own.close()

    def is_within_nodes(self, axis: str) -> bool:
        """Do the ranks along ``axis`` share a node, wherever in the mesh?"""
        lines = np.moveaxis(self.ranks, AXES.index(axis), -1).reshape(-1, self.shape[axis])
        return all(len({self._node_of[rank] for rank in line}) == 1 for line in lines.tolist())

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis}={size}" for axis, size in self.shape.items())
        long = [axis for axis, size in self.shape.items() if size > 1]
        place = ", ".join(f"{axis} {self.coordinates[axis]}" for axis in long)
        where = ", ".join(
            f"{_KIND[axis]} {'within a node' if self.is_within_nodes(axis) else 'across nodes'}"
            for axis in long
        )
        text = f"Mesh({sizes}; rank {self.world.rank} of {self.world.size}"
        return text + (f" at {place}; parallel: {where})" if long else ")")

    def _long(self, axes: tuple[str, ...]) -> list[str]:
        """Those of the axes along which there is more than one rank, in the mesh's order."""
        return [axis for axis in AXES if axis in axes and self.shape[axis] > 1]

    def _find(self, axes: tuple[str, ...]) -> World:
        key = tuple(self._long(axes))
        if key not in self._worlds:
            rest = [axis for axis in AXES if axis not in key]
            # Ranks that agree in all other coordinates are one sub-world.
            color = int(
                np.ravel_multi_index(
                    [self.coordinates[axis] for axis in rest], [self.shape[axis] for axis in rest]
                )
            )
            order = int(np.argwhere(self.ranks.reshape(-1) == self.world.rank)[0, 0])
            found = self.world.split(color, order)
            if found is None:
                raise RuntimeError("every rank has a place in the mesh")
            found.mesh = self
            self._worlds[key] = found
            self._own.append(found)
        return self._worlds[key]


def mesh(
    *, dp: int | None = None, sp: int = 1, tp: int = 1, pp: int = 1, world: World | None = None
) -> Mesh:
    """Arrange the ranks of ``world`` for several kinds of parallelism at once. Collective.

    ``dp``: ranks (or groups of them) with whole copies of the model, on other data; by default as
    many as the others leave. ``tp``: ranks that each hold slices of every layer. ``pp``: stages
    of layers. ``sp``: ranks that share out each sequence. Ranks next to each other along ``tp`` are
    next to each other in a node; then come ``sp``, ``dp`` and ``pp``, whatever the launcher's
    order. ``world``: ``init()``'s by default.

    Raises ArgumentError if the product is not the number of ranks, MismatchError if ranks differ.
    """
    return Mesh(world, dp=dp, sp=sp, tp=tp, pp=pp)


def _sizes(world: World, given: Mapping[str, int | None]) -> dict[str, int]:
    """The size of each axis, checked. Collective."""
    world.agree([", ".join(f"{axis}={size!r}" for axis, size in given.items())], "the mesh")
    sizes = {axis: _count(axis, size) for axis, size in given.items() if size is not None}
    sizes.setdefault("dp", max(1, world.size // prod(sizes.values())))
    if prod(sizes.values()) != world.size:
        shape = " x ".join(f"{axis}={sizes[axis]}" for axis in AXES)
        raise ArgumentError(
            "mesh()", "the sizes", f"{shape} = {prod(sizes.values())} ranks",
            f"a product of {world.size}, the ranks that there are",
            f"dp may be left out: it is what the others leave, where they divide {world.size}.",
        )  # fmt: skip
    if world.survives:
        raise ArgumentError(
            "mesh()", "world", "that of init(elastic=True)", "one of a job that is not elastic",
            "When a rank dies, those who are left do not fill a mesh.",
        )  # fmt: skip
    return {axis: sizes[axis] for axis in AXES}


def _count(axis: str, value: int) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if isinstance(value, bool) or count < 1:
        raise ArgumentError("mesh()", axis, repr(value), "an integer >= 1")
    return count


def _grid(nodes: Sequence[Sequence[int]], shape: tuple[int, ...]) -> Any:
    """The rank at each place: node by node, whatever order the launcher gave them."""
    return np.array([rank for ranks in nodes for rank in ranks], np.int64).reshape(shape)
