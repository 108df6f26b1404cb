"""``mesh``: the core's, with torch's ``DeviceMesh`` for the axes that torch works along."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import mpizero
from mpizero import ArgumentError, World
from mpizero.api.mesh import AXES
from mpizero_torch.runtime import init

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Mesh(mpizero.Mesh):
    """Ranks in a grid of ``pp`` x ``dp`` x ``sp`` x ``tp``, to us and to torch.

    ``mesh.dp``, ``mesh.tp``, ``mesh.pp``, ``mesh.sp`` and ``mesh["dp", "sp"]`` are Worlds;
    ``mesh.device_mesh`` is torch's DeviceMesh of the same ranks, with the same names.
    """

    _device_mesh: DeviceMesh | None = None

    @property
    def device_mesh(self) -> DeviceMesh:
        """torch's DeviceMesh: for ``parallelize_module``, DTensor and pipelining.

        Collective when it is first asked for; its groups stay, and meshes that are alike have one.
        Works over the process group that there is, or
        starts ``mpizero``'s. Raises ArgumentError if the process group has other ranks.
        """
        if self._device_mesh is None:
            self._device_mesh = self._make_device_mesh()
        return self._device_mesh

    def _make_device_mesh(self) -> DeviceMesh:
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh

        if not dist.is_initialized():
            import mpizero_torch.distributed  # noqa: F401  registers the backend

            dist.init_process_group("mpizero")
        own = self.world.job_ranks[self.world.rank]
        if dist.get_rank() != own:
            raise ArgumentError(
                "mesh.device_mesh", "the process group", f"one where this is {dist.get_rank()}",
                f"one where it has its number in the job, {own}",
            )  # fmt: skip
        ranks = torch.as_tensor([self.world.job_ranks[rank] for rank in self.ranks.reshape(-1)])
        shape = tuple(self.shape.values())
        kind = self.world.device.kind
        # One for all meshes that are alike: torch takes equal ones for one another, and goes on
        # with the groups of the first.
        global _made_of
        if _made_of is not dist.GroupMember.WORLD:
            _made.clear()
            _made_of = dist.GroupMember.WORLD
        key = kind, shape, tuple(ranks.tolist())
        if key not in _made:
            _made[key] = DeviceMesh(kind, ranks.reshape(shape), mesh_dim_names=AXES)
        return _made[key]


# The DeviceMeshes of the default process group that there is.
_made: dict[Any, DeviceMesh] = {}
_made_of: Any = None


def mesh(
    *, dp: int | None = None, sp: int = 1, tp: int = 1, pp: int = 1, world: World | None = None
) -> Mesh:
    """Arrange the ranks for several kinds of parallelism at once. Collective.

    ``dp``: ranks (or groups of them) with whole copies of the model, on other data; by default as
    many as the others leave. ``tp``: ranks that each hold slices of every layer. ``pp``: stages
    of layers. ``sp``: ranks that share out each sequence. Ranks next to each other along ``tp`` are
    next to each other in a node; then come ``sp``, ``dp`` and ``pp``, whatever the launcher's
    order. ``world``: ``mz.init()``'s by default.

    Raises ArgumentError if the product is not the number of ranks, MismatchError if ranks differ.
    """
    return Mesh(world if world is not None else init(), dp=dp, sp=sp, tp=tp, pp=pp)
