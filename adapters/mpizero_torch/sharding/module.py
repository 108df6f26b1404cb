"""``ShardedModule``: what ``mz.zero`` makes of a model, whose state is spread over the ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from mpizero import ArgumentError, World
from mpizero.engine import COMMON, SHARDED, GradientSharder, Lane, ShardGroup
from mpizero_torch import names, slices
from mpizero_torch.replicate import Buffers, Structure
from mpizero_torch.sharding.deferred import Initialise, Initialiser
from mpizero_torch.sharding.hooks import ShardHooks
from mpizero_torch.sharding.loss_scale import LossScale
from mpizero_torch.sharding.model_state import (
    close_after_loading,
    load_whole,
    open_for_loading,
    whole_state_dict,
)
from mpizero_torch.sharding.offload import StateOnDisk
from mpizero_torch.sharding.optimizer import ShardedOptimizer, no_gradients
from mpizero_torch.sharding.state import ShardedState, Sharding
from mpizero_torch.sharding.units import Unit, UnitSchedule, find_units
from mpizero_torch.wrapper import DistributedModule


class ShardedModule(DistributedModule):
    """A module that trains with its optimizer state, gradients and parameters sharded.

    Made by ``mz.zero``. Used like the module. After backward the gradients' mean is in the
    optimizer's shards, and ``.grad`` of the parameters is a stand-in that says so when it is read.
    """

    _hooks: ShardHooks

    def __init__(
        self,
        module: nn.Module,
        optimizer: ShardedOptimizer,
        groups: Sequence[Sequence[int]],
        world: World,
        lane: Lane,
        group: ShardGroup,
        sharding: Sharding,
        *,
        broadcast_buffers: bool,
        loss_scale: LossScale | None,
        aside: StateOnDisk | None,
        initialise: Initialise | None,
    ) -> None:
        super().__init__(module, world)
        self._lane = lane
        self._in_join = False
        self._named = list(names.named_parameters(module))
        initialiser = Initialiser(module, [p for _, p in self._named], self.world, initialise)
        self._optimizer, self._sharding = [optimizer], sharding
        self._loss_scale, self._aside = loss_scale, aside
        self._units, unit_of = self._find_units()
        self._state = ShardedState(
            self._named, groups, group, sharding, self._units, unit_of, initialiser.prepare, aside
        )
        self._schedule: UnitSchedule | None = None
        if self._units:
            parameters = [parameter for _, parameter in self._named]
            self._schedule = UnitSchedule(module, self._units, parameters, self._state.memory)
        self._hooks = self._make_hooks()
        optimizer.take(self, self._state.make_runs(self.sharder), groups)
        self._buffers_in_sync = Buffers(Structure(module), ()) if broadcast_buffers else None
        self._versions = self._current_versions()
        self._changes_when_summed: list[int] = []
        self._were_trainable: list[bool] = []
        self._announcing: Collection[int] = ()  # whose gradients announce themselves
        self._watch_parameters()
        self.loading: ExitStack | None = None  # while a bigger module is being loaded
        self.register_load_state_dict_post_hook(close_after_loading)  # type: ignore[no-untyped-call]

    @property
    def optimizer(self) -> ShardedOptimizer:
        """The optimizer that was made with this module."""
        return self._optimizer[0]

    @property
    def loss_scale(self) -> float:
        """What gradients are multiplied by on their way (float16), the same on all ranks; or 1."""
        return self._unscale()

    @property
    def sharder(self) -> GradientSharder:
        return self._hooks.sharder

    @property
    def scaling(self) -> LossScale | None:
        """The dynamic loss scale, under float16."""
        return self._loss_scale

    @property
    def state(self) -> ShardedState:
        return self._state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward on this rank's input. With ``precision``, in it."""
        self._check_unwritten()
        if self._sharding.precision is None:
            return super().forward(*args, **kwargs)
        args, kwargs = tree_map(self._narrow, (args, kwargs))
        return tree_map(self._widen, super().forward(*args, **kwargs))

    @contextmanager
    def join(self, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
        """For loops that may end earlier on some ranks: see ``DistributedDataParallel.join``.

        Ranks that are done take part in the others' updates too, so it wants the optimizer. Raises
        ArgumentError without it.
        """
        if optimizer is not self.optimizer:
            given = "nothing" if optimizer is None else "another optimizer"
            raise ArgumentError("join()", "optimizer", given, "the one that mz.zero() gave back")
        if self.world.size == 1:
            yield
            return
        self._in_join = True
        try:
            yield
            while self._hooks.shadow() or self._shadow_update():
                pass
        finally:
            self._in_join = False
        self._forget_gradients()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, as the optimizer's does."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self, *args: Any, root: int | None = None, **kwargs: Any) -> Any:
        """The plain module's state_dict, with whole parameters. Collective.

        On every rank, or on ``root`` only ({} elsewhere). With ``precision``, the float32 values
        that are trained. Takes memory for the result only, and for a piece of a parameter.
        """
        return whole_state_dict(self.module, self._state, root, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a plain module's state_dict; every rank must be given it. Collective."""
        return load_whole(self, state_dict, *args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        open_for_loading(self)
        super()._load_from_state_dict(*args, **kwargs)

    def hold_parameters(self) -> None:
        """Let all parameters be there until they are let go."""
        if self._schedule is not None:
            self._schedule.hold_all()

    def let_parameters_go(self) -> None:
        if self._schedule is not None:
            self._schedule.release_all()
        self._versions = self._current_versions()

    @property
    def held_bytes(self) -> int:
        """Bytes of gradients that were put aside on this rank, in memory of their own."""
        return self._hooks.held_bytes if self._sharding.stage > 1 else 0

    @property
    def gathered_bytes(self) -> int:
        """Bytes of parameters that are gathered at the moment."""
        return sum(unit.nbytes for unit in self._units)

    def own_gradients(self) -> list[torch.Tensor]:
        """This rank's part of the mean gradients."""
        return [run.gradient for run in self.optimizer.runs if run.has_gradient]

    def own_squares(self) -> float:
        """The sum of their squares: known since they were summed, unless they changed since."""
        gradients = self.own_gradients()
        if _changes(gradients) == self._changes_when_summed:
            return self.sharder.own_squares
        return sum(float(each.double().pow(2).sum()) for each in gradients)

    def gradient(self, name: str) -> torch.Tensor | None:
        """All of the mean gradient of a parameter, on every rank; None if it has none. Collective.

        To look at: it is a copy. Raises ArgumentError for a name that there is not.
        """
        names = [each for each, _ in self._named]
        if name not in names:
            raise ArgumentError("gradient()", "name", repr(name), ", ".join(names))
        index = names.index(name)
        dtype = next((r.gradient.dtype for r in self.optimizer.runs), None)
        shape = self._state.shapes[index]
        whole = torch.zeros(shape, dtype=dtype, device=self._state.device)
        has = 0
        for run in self.optimizer.runs:
            for piece in run.pieces:
                if piece.index == index and run.has_gradient:
                    has = 1
                    if self._state.group.is_holder:
                        part = run.gradient.reshape(-1)[piece.place]
                        whole.view(-1)[piece.elements] = part.to(whole)
        self.world.allreduce(whole)
        if not self.world.allreduce(has, "max"):
            return None
        return slices.wrap(whole, self._named[index][1])

    def _shadow_update(self) -> bool:
        """Take part in the others' update, if they have announced one."""
        if not self.sharder.told.updates:
            return False
        self._update_together(None)
        self._in_join = False  # the update itself is not announced once more
        self.optimizer.step()
        self._in_join = True
        return True

    def _update_together(self, mine: list[dict[str, Any]] | None) -> None:
        """Go by the settings (learning rates, ...) of the ranks that have them from their loop."""
        every = self._lane.world.gather_objects(mine)
        theirs = next(settings for settings in every if settings is not None)
        for group, settings in zip(self.optimizer.param_groups, theirs, strict=True):
            group.update(settings)

    def before_update(self) -> None:
        """All ranks have come to the update: none reads the old parameters any more. Collective."""
        if self._in_join:
            self.sharder.announce_update()
            self._update_together([_settings(group) for group in self.optimizer.param_groups])
        if self._hooks.has_unreduced and not self.optimizer.holds_gradients:
            raise no_gradients("optimizer.step()")
        if self._schedule is not None:
            self._schedule.release_all()
        self._state.memory.settle()

    def should_update(self) -> bool:
        """False if the gradients overflowed, on any rank, under a scaled loss."""
        return self._loss_scale is None or self._loss_scale.update(self.sharder.overflowed)

    def after_update(self) -> None:
        """This rank's shards have been updated: publish them. Collective."""
        self._state.memory.publish()

    @property
    def keeps_state_aside(self) -> bool:
        """Is the optimizer's state kept outside of memory?"""
        return self._aside is not None

    def put_state_aside(self, state: dict[str, Any]) -> None:
        """Let a run's state, in place, be where it is kept."""
        if self._aside is not None:
            self._aside.take(state)

    def add_group(self, group: dict[str, Any]) -> None:
        """Train further parameters of the model, with these settings (see the optimizer)."""
        names = {id(parameter): at for at, (_, parameter) in enumerate(self._named)}
        members: list[int] = []
        for parameter in group["params"]:
            index = names.get(id(parameter))
            if index is None or self.optimizer.has(index) or index in members:
                raise ArgumentError(
                    "add_param_group()", "params", f"a parameter of shape {tuple(parameter.shape)}",
                    "parameters of the model that are in no group of the optimizer",
                )  # fmt: skip
            members.append(index)
        self.world.agree([str(members)], "the parameters of the new group")
        optimizer = self.optimizer
        with self._whole_parameters():
            added = self._state.add(len(optimizer.param_groups), members)
        self._hooks.remove()
        self._hooks = self._make_hooks()
        self._state.rebase(optimizer.runs, self.sharder)
        optimizer.adopt(self._state.make_runs(self.sharder, added), group, members)
        self._were_trainable = []
        self._watch_parameters()

    @contextmanager
    def _whole_parameters(self) -> Iterator[None]:
        self.hold_parameters()
        try:
            yield
        finally:
            self.let_parameters_go()

    def forget_unreduced(self) -> None:
        """Drop the gradients that are still on this rank."""
        self._hooks.forget()

    def _watch_parameters(self) -> None:
        are_trainable = [parameter.requires_grad for _, parameter in self._named]
        if are_trainable != self._were_trainable:
            self._were_trainable = are_trainable
            kinds = zip(self._named, are_trainable, strict=True)
            self.world.agree(
                [f"{key}: {'trained' if trained else 'frozen'}" for (key, _), trained in kinds],
                "the parameters that are trained",
            )
            self.sharder.set_trained(are_trainable)
            self._announcing = ()
        announcing = self._hooks.announced
        if announcing != self._announcing:
            self._announcing = announcing
            managed = self._state.space_of
            self._hooks.watch(
                [
                    (index, parameter)
                    for index, (_, parameter) in enumerate(self._named)
                    if are_trainable[index] and managed[index].group >= 0
                ],
                announcing,
            )

    def _find_units(self) -> tuple[list[Unit], list[int]]:
        """What is gathered together, where parameters are sharded; and each parameter's unit."""
        if self._sharding.how != SHARDED:
            return [], [0] * len(self._named)
        found = find_units(self.module, self._sharding.segment_bytes)
        units = [Unit(name, root) for name, root, _ in found]
        of = {id(p): at for at, (_, _, parameters) in enumerate(found) for p in parameters}
        return units, [of[id(parameter)] for _, parameter in self._named]

    def _make_hooks(self) -> ShardHooks:
        return ShardHooks(
            self,
            self._named,
            lambda fill, left, has: self._state.make_sharder(
                self._lane, fill, left, has, self._unscale
            ),
            hold=self._memory_to_hold(),
            on_reduced=self._take_gradients,
            before_pass=self._prepare_pass,
            schedule=self._schedule,
        )

    def _memory_to_hold(self) -> Any:
        """Where gradients that stay on this rank are added up; None: where autograd puts them."""
        if self._sharding.stage == 1:
            return lambda index: self._state.gradient_view(self.sharder, index)
        if self._sharding.accumulate_in_float32:
            named = self._named
            return lambda index: torch.empty_like(
                slices.local(named[index][1]), dtype=torch.float32
            )
        return None

    def _unscale(self) -> float:
        return 1.0 if self._loss_scale is None else self._loss_scale.value

    def _prepare_pass(self) -> None:
        optimizer, sharder = self.optimizer, self.sharder
        sharder.keeps = optimizer.holds_gradients
        if sharder.keeps:
            for run in optimizer.runs:
                if not run.has_gradient:
                    run.gradient.zero_()

    def _take_gradients(self, anywhere: list[bool]) -> None:
        if self._schedule is not None:
            self._schedule.end_of_backward()
        self.optimizer.receive(anywhere.__getitem__)
        if self.sharder.overflowed and self._loss_scale is None:
            # A GradScaler looks at this rank's shards alone; every rank's must tell it.
            for gradient in self.own_gradients():
                gradient.view(-1)[:1] = torch.inf
        self._changes_when_summed = _changes(self.own_gradients())

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad()

    def _narrow(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(self._sharding.precision)
        return value

    def _widen(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype == self._sharding.precision:
            value = value.float()
            if self._loss_scale is not None:
                value = self._loss_scale.apply(value)
        return value

    def _current_versions(self) -> list[int]:
        # Writing to a DTensor counts for its own part, and for itself.
        return [0 if p.is_inference() else slices.local(p)._version for _, p in self._named]

    def _check_unwritten(self) -> None:
        """Shared memory written to by every rank would have been written to n times."""
        if self._sharding.how != COMMON or self._state.group.inner.size == 1:
            return
        versions = self._current_versions()
        if versions != self._versions:
            pairs = zip(self._versions, versions, strict=True)
            at = next(at for at, (old, new) in enumerate(pairs) if old != new)
            raise ArgumentError(
                "forward()", "parameters",
                f"'{self._named[at][0]}' was written to in place after mz.zero()",
                "parameters that only the optimizer changes",
                "The ranks of a node share one copy, so every rank's write was applied to it. "
                "Initialise before mz.zero(), write inside `with mz.gathered(model):`, or give "
                "every rank a copy with share_parameters=False.",
            )  # fmt: skip


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _changes(gradients: Sequence[torch.Tensor]) -> list[int]:
    """How often torch has written to each."""
    return [gradient._version for gradient in gradients]
