"""Meshes: ranks in a grid, whose axes are sub-worlds."""

from __future__ import annotations

from math import prod

import pytest

import mpizero
from mpizero.api.mesh import AXES
from support.placements import HERE, Placement, placed

ranks = pytest.mark.parallel([1, 2, 3, 4])
SHAPES = [
    {"dp": 1},
    {"dp": 2},
    {"tp": 2},
    {"pp": 2},
    {"sp": 2},
    {"dp": 3},
    {"tp": 3},
    {"dp": 2, "tp": 2},
    {"pp": 2, "tp": 2},
    {"dp": 2, "pp": 2},
    {"sp": 2, "tp": 2},
    {"dp": 2, "sp": 2},
    {"tp": 4},
]


@ranks
def test_the_axes_are_worlds_of_those_who_differ_along_them_alone() -> None:
    world = mpizero.init()
    for asked in SHAPES:
        if prod(asked.values()) != world.size:
            continue
        mesh = mpizero.mesh(**asked)
        places = world.gather_objects(dict(mesh.coordinates))
        for axes in [(axis,) for axis in AXES] + [("dp", "sp"), ("pp", "tp"), ("pp", "dp")]:
            rest = [axis for axis in AXES if axis not in axes]
            mine = [
                (tuple(place[axis] for axis in AXES), rank)
                for rank, place in enumerate(places)
                if all(place[axis] == mesh.coordinates[axis] for axis in rest)
            ]
            expected = [rank for _, rank in sorted(mine)]
            part = mesh[axes]
            assert part.gather_objects(world.rank) == expected
            assert part.allreduce(1) == prod(mesh.shape[axis] for axis in axes)
        assert [mesh.dp, mesh.tp, mesh.pp, mesh.sp] == [mesh[a] for a in ("dp", "tp", "pp", "sp")]
        assert mesh.replicas is mesh["dp", "sp"] and mesh.model is mesh["tp", "pp"]
        assert (mesh.dp.rank, mesh.tp.rank) == (mesh.coordinates["dp"], mesh.coordinates["tp"])
        for axis in AXES:
            assert mesh[axis].mesh is mesh or mesh[axis] is world
        mesh.close()
        assert world.allreduce(1) == world.size


@pytest.mark.parallel([4])
@pytest.mark.parametrize("placement", HERE, ids=str)
def test_fast_axes_are_inside_nodes_whatever_the_order_of_ranks(placement: Placement) -> None:
    names = placement.node_of
    with placed(placement) as world:
        mesh = mpizero.mesh(dp=2, tp=2, world=world)
        flat = mesh.ranks.reshape(-1).tolist()
        assert flat == sorted(range(4), key=lambda rank: (names.index(names[rank]), rank))
        lines = {"tp": [flat[:2], flat[2:]], "dp": [flat[::2], flat[1::2]]}
        for axis, ranks_of in lines.items():
            within = all(len({names[rank] for rank in line}) == 1 for line in ranks_of)
            assert mesh.is_within_nodes(axis) == within
            mine = next(line for line in ranks_of if world.rank in line)
            assert mesh[axis].gather_objects(world.rank) == mine
            assert mesh[axis].node_count == len({names[rank] for rank in mine})
        if sorted(names) == ["A", "A", "B", "B"]:
            assert "tensor within a node" in repr(mesh) and "data across nodes" in repr(mesh)
        mesh.close()


@ranks
def test_what_is_left_is_data_parallel_and_repr_tells_where_one_is() -> None:
    world = mpizero.init()
    mesh = mpizero.mesh(pp=world.size)
    assert mesh.shape == {"pp": world.size, "dp": 1, "sp": 1, "tp": 1}
    text = repr(mesh)
    assert text.startswith(f"Mesh(pp={world.size}, dp=1, sp=1, tp=1; rank {world.rank} of ")
    assert (f"pp {world.rank}" in text) == (world.size > 1)
    mesh.close()
    mesh = mpizero.mesh()
    assert mesh.dp is world and mesh.shape["dp"] == world.size and mesh.dp.mesh is None
    mesh.close()


@ranks
def test_sizes_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    world = mpizero.init()
    with pytest.raises(mpizero.ArgumentError, match=f"dp=2 x sp=1 x tp={world.size} = "):
        mpizero.mesh(dp=2, tp=world.size)
    with pytest.raises(mpizero.ArgumentError, match=f"a product of {world.size}, the ranks"):
        mpizero.mesh(tp=7)
    for wrong in (0, -1, 2.0, True, "2"):
        with pytest.raises(mpizero.ArgumentError, match=r"'pp' is .* integer >= 1"):
            mpizero.mesh(pp=wrong)  # type: ignore[arg-type]
    if world.size > 1:
        with pytest.raises(mpizero.MismatchError, match="the mesh"):
            mpizero.mesh(tp=world.size if world.rank else 1)
    mesh = mpizero.mesh()
    for axes in ("xp", (), ("dp", "xp")):
        with pytest.raises(mpizero.ArgumentError, match="one or more of 'pp', 'dp', 'sp', 'tp'"):
            mesh[axes]
    monkeypatch.setattr(mpizero.World, "survives", True)
    with pytest.raises(mpizero.ArgumentError, match="elastic"):
        mpizero.mesh()


def test_every_place_has_one_rank() -> None:
    from mpizero.api.mesh import _grid

    grid = _grid([(0, 3, 4, 7), (1, 2, 5, 6)], (1, 2, 2, 2))
    assert sorted(grid.reshape(-1).tolist()) == list(range(8))
    assert {*grid[0, 0].reshape(-1).tolist()} == {0, 3, 4, 7}
