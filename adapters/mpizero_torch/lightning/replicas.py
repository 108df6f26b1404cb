"""``MpiStrategy``: a replica on each rank, and what Lightning asks about ranks and nodes."""

from __future__ import annotations

import importlib
import importlib.util
import socket
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mpizero import ArgumentError, LaunchError
from mpizero_torch import runtime
from mpizero_torch.distributed import BACKEND
from mpizero_torch.process_group import TIMEOUT, ensure_process_group, keep_threads

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _find() -> str:
    for name in _PACKAGES:
        if name in sys.modules:
            return name
    for name in _PACKAGES:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            return name
    raise ModuleNotFoundError("mpizero_torch.lightning needs Lightning: pip install lightning")


_PACKAGE = _find()
_strategies: Any = importlib.import_module(f"{_PACKAGE}.strategies")
_environments: Any = importlib.import_module(f"{_PACKAGE}.plugins.environments")
_rank_zero: Any = importlib.import_module(f"{_PACKAGE}.utilities.rank_zero")


class MpiEnvironment(_environments.ClusterEnvironment):  # type: ignore[misc]
    """Lightning's view of the job: ranks, nodes and the process group are what MPI says.

    Under any launcher that MPI knows. Making one starts MPI and the process group "mpizero", so
    that a strategy finds it: collective. ``timeout``: of torch's monitored barriers.
    """

    def __init__(self, timeout: timedelta = TIMEOUT) -> None:
        self.world = runtime.init()
        _rank_zero.rank_zero_only.rank = self.world.rank  # others say nothing from now on
        keep_threads()
        ensure_process_group(self.world, timeout)

    @property
    def creates_processes_externally(self) -> bool:
        """The launcher has started all ranks."""
        return True

    @property
    def main_address(self) -> str:
        """Rank 0's host. Collective."""
        return str(self.world.broadcast_object(socket.gethostname()))

    @property
    def main_port(self) -> int:
        """A port that was free on rank 0's host when it was asked for. Collective."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(self.world.broadcast_object(probe.getsockname()[1]))

    @staticmethod
    def detect() -> bool:
        """Whether there are several ranks. Starts MPI."""
        return runtime.init().size > 1

    def world_size(self) -> int:
        """How many ranks there are."""
        return self.world.size

    def global_rank(self) -> int:
        """This process's rank."""
        return self.world.rank

    def local_rank(self) -> int:
        """Its number on its node."""
        return self.world.local_rank

    def node_rank(self) -> int:
        """Its node's number."""
        return self.world.node_index

    def set_world_size(self, size: int) -> None:
        """Nothing: MPI has said it."""

    def set_global_rank(self, rank: int) -> None:
        """Nothing: MPI has said it."""


class MpiStrategy(_strategies.DDPStrategy):  # type: ignore[misc]
    """Lightning's DDP strategy on the backend "mpizero": a replica on each rank of the job.

    The launcher has said how many ranks there are: leave ``devices`` and ``num_nodes`` out of the
    ``Trainer``, or say the same. Takes ``DDPStrategy``'s other options (``find_unused_parameters``,
    ``static_graph``, ``bucket_cap_mb``...). ``world`` is the World. Collective. The trainer raises
    ArgumentError for ``devices`` or ``num_nodes`` that are not the job's, and LaunchError if it is
    to use GPUs and mpizero sees none.
    """

    strategy_name = BACKEND

    def __init__(self, *, timeout: timedelta = TIMEOUT, **options: Any) -> None:
        environment = MpiEnvironment(timeout)
        self.world = environment.world
        super().__init__(
            cluster_environment=environment,
            process_group_backend=BACKEND,
            timeout=timeout,
            **options,
        )

    @property
    def root_device(self) -> torch.device:
        """The device of this rank."""
        (kind,) = {device.type for device in self.parallel_devices or [torch.device("cpu")]}
        if kind != "cpu" and kind != self.world.device.kind:
            raise LaunchError(
                f"Trainer(): Lightning is to use {kind} devices, mpizero's device here is "
                f"{self.world.device.name}. Install CuPy (pip install 'mpizero[cuda12]'), or give "
                "the Trainer accelerator='cpu'."
            )
        return torch.device("cpu" if kind == "cpu" else self.world.device.name)

    @property
    def num_processes(self) -> int:
        """How many ranks this node has."""
        return self.world.local_size

    @property
    def num_nodes(self) -> int:
        """How many nodes the job has."""
        return self.world.node_count

    @num_nodes.setter
    def num_nodes(self, given: int) -> None:
        self._check("num_nodes", given, self.world.node_count)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which part of the samples is this rank's."""
        return {"num_replicas": self.world.size, "rank": self.world.rank}

    def reduce(
        self, tensor: Any, group: Any = None, reduce_op: dist.ReduceOp | str | None = "mean"
    ) -> Any:
        """Combine a tensor over the ranks; the mean of integers is cut to an integer."""
        exact = isinstance(tensor, torch.Tensor) and not tensor.dtype.is_floating_point
        if exact and reduce_op in ("mean", "avg"):
            total = super().reduce(tensor, group, "sum")
            return total.copy_(total / dist.get_world_size(group))
        return super().reduce(tensor, group, reduce_op)

    def setup_distributed(self) -> None:
        """Make the process group again, if it has been destroyed since; then as Lightning does."""
        ensure_process_group(self.world, self._timeout)
        super().setup_distributed()

    def set_world_ranks(self) -> None:
        """Check what the trainer was given; then as Lightning does."""
        devices = self.parallel_devices or []
        if devices and devices[0].type == "cpu":
            self._check("devices", len(devices), self.world.local_size)
        super().set_world_ranks()

    def _check(self, argument: str, given: int, actual: int) -> None:
        # 1 is what Lightning says where nothing was given.
        if given not in (1, actual):
            hint = "The launcher has started that many: leave the argument out."
            raise ArgumentError("Trainer()", argument, str(given), str(actual), hint)


_strategies.StrategyRegistry.register(
    BACKEND, MpiStrategy, "data-parallel training over MPI", override=True
)
