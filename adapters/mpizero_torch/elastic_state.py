"""``ElasticState``: a training that goes on when ranks die; under ``@mz.elastic``."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mpizero import ArgumentError, CheckpointError, World
from mpizero.checkpoint import Checkpoint, newest
from mpizero.elastic import Keeper, Snapshot
from mpizero_torch.checkpointing import random_state
from mpizero_torch.checkpointing.save import collect, restore
from mpizero_torch.data import ShardedLoader
from mpizero_torch.runtime import init

_COMMITTED = ("model", "optimizer", "scheduler", "loader")


class ElasticState:
    """What a training consists of, and how to build it on any number of ranks::

        def build(world):
            model = Net()
            optimizer = torch.optim.AdamW(model.parameters())
            model, optimizer = mz.zero(model, optimizer, stage=2)
            loader = mz.shard(data, batch_size=32)
            return {"model": model, "optimizer": optimizer, "loader": loader}

        @mz.elastic
        def train(state):
            while state.step < 1000:
                for x, y in state.loader:
                    ...
                    state.step += 1
                    state.commit()

        train(mz.ElasticState(build, step=0))

    ``build(world)`` makes everything anew, on the ranks that there are, and returns it by name:
    "model", "optimizer", "scheduler" and "loader" (any of them) are committed; others (a loss, a
    checkpoint manager) are just there. ``values`` are further ones that are committed: numbers,
    strings, tensors, lists and dicts of these, the same on all ranks. All are attributes.

    After a death everything is built again, and is as the last ``commit()`` found it: model and
    optimizer at any stage, the position in the data, random numbers, values. The global batch (the
    samples of a step over all ranks) of a loader that ``mz.shard`` made of a DataLoader or a
    dataset stays what it was.

    ``redundancy=1`` keeps a copy of each rank's commit in memory of another node, so that a whole
    node may die. ``checkpoints`` is the folder of a CheckpointManager, or a checkpoint: the
    training begins with the newest in there, if there is one, and goes back to it where commits
    have been lost with a node.

    Commits take memory: twice (the last, and the next) the model, the optimizer's state and the
    buffers. Of a node's ranks all together that is two copies of what is replicated, and two of the
    node's shards of what is sharded; ``redundancy=1`` doubles it. ``committed_bytes`` tells.

    Raises ArgumentError for other arguments, and for what ``build`` returns if it is no dict.
    """

    def __init__(
        self,
        build: Callable[[World], Mapping[str, Any]],
        *,
        redundancy: int = 0,
        checkpoints: str | os.PathLike[str] | None = None,
        **values: Any,
    ) -> None:
        if not callable(build):
            raise ArgumentError("ElasticState()", "build", repr(build), "a function of the World")
        own: dict[str, Any] = self.__dict__
        own.update(_build=build, _built={}, _values=dict(values), _world=None)
        own.update(_first_values=copy.deepcopy(values), _global_batch=None)
        own.update(_keeper=Keeper(redundancy))
        own.update(_checkpoints=None if checkpoints is None else Path(checkpoints))

    @property
    def world(self) -> World:
        """The ranks that there are."""
        return self._world or init()

    def commit(self) -> None:
        """This is the state to go back to. Collective, between two steps.

        When it returns, all ranks have committed. Whoever has died before then, all go on from the
        commit before. Copies this rank's part of the state; with one rank in the job it does
        nothing.
        """
        if self._survives:
            built = {name: self._built[name] for name in _COMMITTED if name in self._built}
            with self.world.telling():
                parts, values = collect(self.world, self.world.node, extra=self._values, **built)
                self._keeper.commit(parts, values)

    @property
    def committed_bytes(self) -> int:
        """Memory that this rank's commits take, and those that it keeps for another rank."""
        keeper: Keeper = self._keeper
        return keeper.nbytes

    def begin(self, world: World) -> None:
        """Build everything on ``world``, as it was last committed. Called by ``@mz.elastic``."""
        self.__dict__["_world"] = world
        built = self._build(world)
        if not isinstance(built, Mapping):
            raise ArgumentError(
                "ElasticState()", "build", f"a function that returns a {type(built).__name__}",
                "one that returns a dict: model, optimizer, ...",
            )  # fmt: skip
        self.__dict__["_built"] = dict(built)
        self._keep_global_batch()
        snapshot = self._keeper.begin(world, partial(random_state.is_needed, ranks=world.size))
        if snapshot is not None:
            self._values.update(self._restore(snapshot))
        else:
            self._values.update(copy.deepcopy(self._first_values))
            self._go_back_to_checkpoint()
        self.commit()

    def leave(self) -> None:
        """Let go of what was built for a world that is no more. Called by ``@mz.elastic``."""
        self.__dict__["_built"] = {}

    def __getattr__(self, name: str) -> Any:
        for table in ("_values", "_built"):
            if name in self.__dict__.get(table, ()):
                return self.__dict__[table][name]
        known = ", ".join([*self.__dict__.get("_values", ()), *self.__dict__.get("_built", ())])
        raise AttributeError(
            f"the state has no {name!r}; it has {known}. Give further values to ElasticState()."
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._values:
            raise AttributeError(
                f"the state has no value {name!r} to set; it has {', '.join(self._values)}. Give "
                f"it a first one: ElasticState(build, {name}=...)."
            )
        self._values[name] = value

    @property
    def _survives(self) -> bool:
        """Is there anybody who could go on, or has there been?"""
        return self.world.survives

    def _restore(self, snapshot: Snapshot) -> dict[str, Any]:
        built = {name: self._built[name] for name in _COMMITTED if name in self._built}
        if snapshot.is_scattered:
            # What each rank needs of other nodes is what it reads: the first time to know it.
            restore(snapshot, self.world, random=False, **built)
            snapshot.want(random_state.PART, f"{self.world.rank}.")
            snapshot.fetch(self.world)
        return restore(snapshot, self.world, **built)

    def _go_back_to_checkpoint(self) -> None:
        path, world = self._checkpoints, self.world
        if path is not None:
            path = world.broadcast_object(newest(path) if world.rank == 0 else None)
        there = path is not None and world.broadcast_object(
            (path / "manifest.json").exists() if world.rank == 0 else None
        )
        if path is not None and there:
            built = {name: self._built[name] for name in _COMMITTED if name in self._built}
            with Checkpoint(path, world) as checkpoint:
                extra = restore(checkpoint, world, **built)
            self._values.update({k: v for k, v in extra.items() if k in self._values})
        elif self._keeper.lost:
            raise CheckpointError(
                "What was committed has been lost with the ranks that died, and there is no "
                "checkpoint. redundancy=1 keeps a copy of each rank's commits on another node; "
                "checkpoints=FOLDER names what a CheckpointManager has saved."
            )

    def _keep_global_batch(self) -> None:
        loader = self._built.get("loader")
        if isinstance(loader, ShardedLoader) and loader.global_batch_size is not None:
            if self._global_batch is None:
                self.__dict__["_global_batch"] = loader.global_batch_size
            loader.global_batch_size = self._global_batch
