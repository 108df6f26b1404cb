"""``hvd.elastic``: trainings that go on when ranks die.

As in Horovod a state is committed in each rank's memory, and comes from rank 0 when the ranks
begin anew. What notices a death, and forms the ranks that are left into a World, is mpizero's own
elastic layer, which needs Open MPI with ULFM. Ranks leave; none come.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import nn

from mpizero import LaunchError, World
from mpizero.elastic import elastic
from mpizero_torch.horovod import process_set as sets
from mpizero_torch.horovod.elastic_sampler import ElasticSampler
from mpizero_torch.horovod.functions import (
    allgather_object,
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
)
from mpizero_torch.horovod.optimizer import _Distributed
from mpizero_torch.horovod.process_set import global_process_set
from mpizero_torch.sync_batch_norm import SyncBatchNorm

__all__ = ["ElasticSampler", "ObjectState", "State", "TorchState", "run"]

S = TypeVar("S", bound="State")
T = TypeVar("T")


class State:
    """What must be the same on all ranks, and what to go back to when one dies.

    Derive from it, with ``save``, ``restore`` and ``sync``, for values of a kind of one's own.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._reset_callbacks: list[Callable[[], None]] = []

    def register_reset_callbacks(self, callbacks: Iterable[Callable[[], None]]) -> None:
        """Call these when ranks have died, before the state is that of rank 0 on all."""
        self._reset_callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """Ranks have died, and the others have formed a new world."""
        self.reset()
        for each in self._reset_callbacks:
            each()

    def on_hosts_updated(self, timestamp: Any, update_res: Any) -> None:
        """Never called: hosts are not discovered here."""

    def commit(self) -> None:
        """Keep a copy in memory: this is the state to go back to."""
        self.save()
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Nothing: no ranks join a job that runs."""

    def save(self) -> None:
        """Keep a copy of the state on this rank."""
        raise NotImplementedError

    def restore(self) -> None:
        """Be as the last copy is."""
        raise NotImplementedError

    def sync(self) -> None:
        """Be as rank 0's is, on all ranks. Collective."""
        raise NotImplementedError

    def reset(self) -> None:
        """Be ready on the ranks that there are."""


class ObjectState(State):
    """Values that can be copied and pickled: ``ObjectState(epoch=0)``, then ``state.epoch``."""

    def __init__(
        self,
        bcast_object: Callable[..., Any] = broadcast_object,
        get_rank: Callable[[], int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._bcast_object = bcast_object
        self._names = list(kwargs)
        for name, value in kwargs.items():
            setattr(self, name, value)
        self._saved = copy.deepcopy(kwargs)

    def save(self) -> None:
        self._saved = copy.deepcopy({name: getattr(self, name) for name in self._names})

    def restore(self) -> None:
        for name, value in copy.deepcopy(self._saved).items():
            setattr(self, name, value)

    def sync(self) -> None:
        if self._names:
            values = {name: getattr(self, name) for name in self._names}
            for name, value in self._bcast_object(values).items():
                setattr(self, name, value)
        self._saved = copy.deepcopy({name: getattr(self, name) for name in self._names})


class TorchState(ObjectState):
    """A model, an optimizer, and values: ``TorchState(model, optimizer, epoch=0, batch=0)``.

    All are attributes. Beside ``model`` and ``optimizer`` any value may be a module, an optimizer,
    or an ``ElasticSampler``. Each rank keeps one copy of the model's and the optimizer's state in
    memory. Where a rank has died, ``.grad`` is None on the others afterwards.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        given = {"model": model, "optimizer": optimizer, **kwargs}
        kinds = (nn.Module, torch.optim.Optimizer, ElasticSampler)
        self._kept = {name: each for name, each in given.items() if isinstance(each, kinds)}
        for name, each in self._kept.items():
            self.__dict__[name] = each
        super().__init__(**{name: v for name, v in kwargs.items() if name not in self._kept})
        self._copies: dict[str, Any] = {}
        self.save()

    def save(self) -> None:
        self._copies = {
            name: copy.deepcopy(each.state_dict()) for name, each in self._all().items()
        }
        super().save()

    def restore(self) -> None:
        for name, each in self._all().items():
            each.load_state_dict(copy.deepcopy(self._copies[name]))
        super().restore()

    def sync(self) -> None:
        for each in self._all().values():
            if isinstance(each, nn.Module):
                broadcast_parameters(each.state_dict(), root_rank=0)
            elif isinstance(each, torch.optim.Optimizer):
                broadcast_optimizer_state(each, root_rank=0)
            else:
                each.take_over(allgather_object(each.state_dict()))
        super().sync()
        self.save()

    def reset(self) -> None:
        world = global_process_set.world
        for each in self._all().values():
            if isinstance(each, nn.Module):
                for part in each.modules():
                    if isinstance(part, SyncBatchNorm):
                        part.world = world
                for parameter in each.parameters():
                    parameter.grad = None  # what half a step has left there
            elif isinstance(each, _Distributed):
                each._hvd_start()
            elif isinstance(each, ElasticSampler):
                each.reset()

    def _all(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._kept}


def run(func: Callable[..., T]) -> Callable[..., T]:
    """Let ``func(state, ...)`` survive the death of ranks.

    Before it begins ``state`` is made rank 0's on all ranks. When a rank dies the others leave
    ``func`` where they are, go back to their last ``commit()``, form a new world, call the reset
    callbacks, take rank 0's state, and call ``func`` again. It returns when it has on all ranks.

    Raises LaunchError where the MPI, or the way that the job was started, does not allow that.
    """

    @wraps(func)
    def wrapper(state: State, *args: Any, **kwargs: Any) -> T:
        world = global_process_set.world
        if world.size > 1 and not world.survives:
            raise LaunchError(
                "hvd.elastic.run: this job does not survive a rank's death. Start it with Open MPI "
                "5's `mpirun --with-ft ulfm -n N python ...`, and let hvd.init() be what starts "
                "MPI. To train without, call state.sync(), and the function without the decorator."
            )
        if world.size == 1:
            state.sync()
            return func(state, *args, **kwargs)
        return elastic(partial(_train, func, args, kwargs))(_Beginning(state))

    return wrapper


class _Beginning:
    """The state as mpizero's elastic layer asks for it."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._has_begun = False

    def begin(self, world: World) -> None:
        if self._has_begun:
            self.state.restore()
            sets.begin(world)
            self.state.on_reset()
        self._has_begun = True
        self.state.sync()

    def leave(self) -> None:
        """What is under way belongs to the world of before."""


def _train(
    func: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any], beginning: _Beginning
) -> T:
    return func(beginning.state, *args, **kwargs)
