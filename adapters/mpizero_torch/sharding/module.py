"""``ShardedModule``: what ``mz.zero`` makes of a model, whose state is spread over the ranks."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError, MpizeroError, World
from mpizero.engine import SHARDED, GradientSharder, Lane, ShardGroup
from mpizero_torch import names, slices
from mpizero_torch.compiling import as_it_is
from mpizero_torch.replicate import Buffers, Structure
from mpizero_torch.sharding import access
from mpizero_torch.sharding.boundary import Boundary
from mpizero_torch.sharding.comparison import compare
from mpizero_torch.sharding.deferred import Initialise, Initialiser
from mpizero_torch.sharding.hooks import ShardHooks
from mpizero_torch.sharding.loss_scale import LossScale
from mpizero_torch.sharding.mean_gradients import MeanGradients
from mpizero_torch.sharding.model_state import (
    close_after_loading,
    load_whole,
    open_for_loading,
    whole_state_dict,
)
from mpizero_torch.sharding.offload import StateOnDisk
from mpizero_torch.sharding.optimizer import ShardedOptimizer, no_gradients
from mpizero_torch.sharding.precision import Layers
from mpizero_torch.sharding.runs import Run
from mpizero_torch.sharding.schedule import UnitSchedule
from mpizero_torch.sharding.state import ShardedState, Sharding
from mpizero_torch.sharding.units import Unit, find_units
from mpizero_torch.sharding.writes import Writes
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
        optimizers: Sequence[ShardedOptimizer],
        groups: Sequence[Sequence[Sequence[int]]],
        partitions: Sequence[str],
        world: World,
        lane: Lane,
        group: ShardGroup,
        sharding: Sharding,
        *,
        broadcast_buffers: bool,
        layers: Layers | None,
        boundary: Boundary | None,
        loss_scale: LossScale | None,
        aside: StateOnDisk | None,
        initialise: Initialise | None,
        whole: Sequence[Any] = (),
    ) -> None:
        super().__init__(module, world)
        self._lane = lane
        self._in_join = False
        self._named = list(names.named_parameters(module))
        initialiser = Initialiser(module, [p for _, p in self._named], self.world, initialise)
        self._boundary = boundary
        if layers is not None:
            layers.convert_buffers()
            layers.hook()
        if boundary is not None:
            boundary.hook()
        self._optimizers, self._partitions = list(optimizers), list(partitions)
        self._sharding = sharding
        self._loss_scale, self._aside = loss_scale, aside
        self._units, unit_of = self._find_units(whole)
        every = [members for each in groups for members in each]
        cuts = [cut for each, cut in zip(groups, partitions, strict=True) for _ in each]
        self._state = ShardedState(
            self._named, every, cuts, group, sharding, self._units, unit_of, initialiser.prepare,
            aside,
        )  # fmt: skip
        self._schedule: UnitSchedule | None = None
        if self._units:
            parameters = [parameter for _, parameter in self._named]
            memory = self._state.memory
            self._schedule = UnitSchedule(
                module, self._units, parameters, memory, group.gatherers, bool(whole)
            )
            group.is_sure = group.one_memory  # the same on all ranks
        self.gradients = MeanGradients(
            self._named,
            self._optimizers,
            lambda index: bool(self.sharder.segments_of(index)),
            lambda: self._hooks.here(),
            self._come_unannounced(),
        )
        self._hooks = self._make_hooks()
        runs, number = self._state.make_runs(self.sharder), 0
        for optimizer, members in zip(optimizers, groups, strict=True):
            optimizer.take(self, runs, range(number, number + len(members)), members)
            number += len(members)
        self._buffers_in_sync = Buffers(Structure(module), ()) if broadcast_buffers else None
        self.writes = Writes(module, self._state)
        self._changes_when_summed: list[int] = []
        self._were_trainable: list[bool] = []
        self._announcing: Collection[int] = ()  # whose gradients announce themselves
        self._watch_parameters()
        access.register(self)
        self.loading: ExitStack | None = None  # while a bigger module is being loaded
        self.register_load_state_dict_post_hook(close_after_loading)  # type: ignore[no-untyped-call]

    @property
    def optimizers(self) -> list[ShardedOptimizer]:
        """The optimizers that were made with this module."""
        return list(self._optimizers)

    @property
    def optimizer(self) -> ShardedOptimizer:
        """The optimizer that was made with this module, where there is one only."""
        only: ShardedOptimizer
        (only,) = self._optimizers
        return only

    @property
    def runs(self) -> list[Run]:
        """This rank's shards, as its optimizers have them."""
        return [run for optimizer in self._optimizers for run in optimizer.runs]

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

    @functools.partial(as_it_is, recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward on this rank's input. With ``precision``, in it."""
        self.writes.check()
        if self._boundary is None:
            return super().forward(*args, **kwargs)
        with self._boundary.crossed():
            args, kwargs = self._boundary.taken_in(args, kwargs)
            output = super().forward(*args, **kwargs)
            return self._boundary.given_out(output)

    @contextmanager
    def join(self, optimizer: Any = None) -> Iterator[None]:
        """For loops that may end earlier on some ranks: see ``DistributedDataParallel.join``.

        Ranks that are done take part in the others' updates too, so it wants the optimizer, or the
        list of them. Raises ArgumentError without it.
        """
        every = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
        if {id(each) for each in every} != {id(each) for each in self._optimizers}:
            given = "nothing" if optimizer is None else "another optimizer"
            raise ArgumentError("join()", "optimizer", given, "what mz.zero() gave back")
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
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self, *args: Any, root: int | None = None, **kwargs: Any) -> Any:
        """The plain module's state_dict, with whole parameters. Collective.

        On every rank, or on ``root`` only ({} elsewhere). With ``precision``, the float32 values
        that are trained. Takes memory for the result only, and for a piece of a parameter.
        """
        self.follow("state_dict()")
        return whole_state_dict(self.module, self._state, root, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a plain module's state_dict; every rank must be given it. Collective."""
        return load_whole(self, state_dict, *args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        open_for_loading(self)
        super()._load_from_state_dict(*args, **kwargs)

    def hold(self, indices: Collection[int]) -> Callable[[], None]:
        """Let these parameters be there until what is returned is called."""
        return (lambda: None) if self._schedule is None else self._schedule.hold(indices)

    def after_change(self) -> None:
        """Values have been stored: what has been gathered before is old. Collective."""
        if self._schedule is not None:
            self._schedule.before_update()
            self._schedule.after_update()

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
        self.gradients.follow()
        return self.gradients.own

    def own_squares(self) -> float:
        """The sum of their squares: known since they were summed, unless they changed since."""
        gradients = self.own_gradients()
        if self.gradients.as_summed and _changes(gradients) == self._changes_when_summed:
            return self.sharder.own_squares
        return sum(float(each.double().pow(2).sum()) for each in gradients)

    def gradient(self, name: str) -> torch.Tensor | None:
        """All of the mean gradient of a parameter, on every rank; None if it has none. Collective.

        To look at: it is a copy. Raises ArgumentError for a name that there is not.
        """
        names = [each for each, _ in self._named]
        if name not in names:
            raise ArgumentError("gradient()", "name", repr(name), ", ".join(names))
        return access.whole_gradient(self, names.index(name))

    def _shadow_update(self) -> bool:
        """Take part in the others' update, if they have announced one."""
        if not self.sharder.told.updates:
            return False
        optimizer = self._update_together(None)
        self._in_join = False  # the update itself is not announced once more
        optimizer.step()
        self._in_join = True
        return True

    def _update_together(self, mine: ShardedOptimizer | None) -> ShardedOptimizer:
        """Whose update it is, with the settings (learning rates, ...) of the ranks that make it.

        ``mine``: this rank's, from its loop.
        """
        said = None
        if mine is not None:
            settings = [_settings(group) for group in mine.param_groups]
            said = self._optimizers.index(mine), settings
        every = self._lane.world.gather_objects(said)
        number, theirs = next(each for each in every if each is not None)
        optimizer: ShardedOptimizer = self._optimizers[number]
        for group, settings in zip(optimizer.param_groups, theirs, strict=True):
            group.update(settings)
        return optimizer

    def before_update(self, optimizer: ShardedOptimizer) -> None:
        """All ranks have come to the update: none reads the old parameters any more. Collective."""
        if self._in_join:
            self.sharder.announce_update()
            self._update_together(optimizer)
        self.check_reduced("optimizer.step()")
        if self._schedule is not None:
            self._schedule.before_update()
        self.follow("optimizer.step()", sure=True)

    def check_reduced(self, where: str) -> None:
        """Raise MpizeroError if there are gradients that no pass has averaged."""
        if self._hooks.here():
            raise no_gradients(where)

    def follow(self, where: str, *, sure: bool = False) -> None:
        """What the program has done to gradients and parameters holds from here on. Collective.

        All ranks must have done the same, and none reads the old parameters any more then.
        ``where``: in which call, which all must have made; ``sure``: it is not compared at a cost.
        """
        failed: MpizeroError | None = None
        try:
            self.gradients.follow()
        except MpizeroError as found:  # perhaps on this rank alone: the others must hear of it
            failed = found
        changed, number, refused = self.writes.find()
        error = failed or refused
        said = f"{self.gradients.description}; {self.writes.describe(changed, error)}"
        digests = [self.gradients.digest, number, int(failed is not None)]
        compare(self._lane.world, digests, said, where, sure)
        if error is not None:
            raise error
        self.gradients.agree()
        if changed:
            self.writes.take_over(changed)

    def should_update(self) -> bool:
        """False if the gradients overflowed, on any rank, under a scaled loss."""
        scale = self._loss_scale
        return scale is None or scale.should_step(self.sharder.overflowed, self.world.rank)

    @contextmanager
    def changing(self, where: str, optimizer: ShardedOptimizer | None = None) -> Iterator[None]:
        """While this rank's shards are changed outside of an update, in the call ``where``.

        ``optimizer``: by which, if its own alone are. Collective.
        """
        if self._schedule is not None:
            self._schedule.before_update()
        self.follow(where, sure=True)
        yield
        self.after_update(optimizer)

    def after_update(self, optimizer: ShardedOptimizer | None) -> None:
        """This rank's shards have been updated, by it or all: publish them. Collective."""
        every = [each for each in self._optimizers if optimizer in (None, each)]
        numbers = {number for each in every for number in each.numbers}
        self._state.memory.publish(
            {own.number for own in self._state.trained if own.group in numbers}
        )
        if self._schedule is not None:
            self._schedule.after_update()

    @property
    def aside(self) -> StateOnDisk | None:
        """Where the optimizer's state is kept, if that is outside of memory."""
        return self._aside

    def add_group(self, optimizer: ShardedOptimizer, group: dict[str, Any]) -> None:
        """Train further parameters of the model, with these settings (see the optimizer)."""
        names = {id(parameter): at for at, (_, parameter) in enumerate(self._named)}
        taken = {index for each in self._optimizers for index in each.members}
        members: list[int] = []
        for parameter in group["params"]:
            index = names.get(id(parameter))
            if index is None or index in taken or index in members:
                raise ArgumentError(
                    "add_param_group()", "params", f"a parameter of shape {tuple(parameter.shape)}",
                    "parameters of the model that are in no group of the optimizer",
                )  # fmt: skip
            members.append(index)
        self.world.agree([str(members)], "the parameters of the new group")
        partition = self._partitions[self._optimizers.index(optimizer)]
        self.follow("add_param_group()")
        let_go = self.hold(range(len(self._named)))
        try:
            number, added = self._state.add_group(members, partition)
        finally:
            let_go()
        self.writes.settle()
        before = self._hooks
        before.remove()
        self._hooks = self._make_hooks()
        self._hooks.inherit(before)
        self._state.rebase(self.runs, self.sharder)
        optimizer.adopt(self._state.make_runs(self.sharder, added), number, group, members)
        self._were_trainable = []
        self._watch_parameters()

    def forget_gradients(self, optimizer: ShardedOptimizer, set_to_none: bool) -> None:
        """Forget the gradients of an optimizer, and of none, or let those there are be zero.

        Also those that are still on this rank.
        """
        others = {
            index for each in self._optimizers if each is not optimizer for index in each.members
        }
        members = [index for index in range(len(self._named)) if index not in others]
        if set_to_none:
            self._hooks.forget(members)
            self.gradients.clear(members)
        else:
            self.gradients.follow()
            self._hooks.zero(members)
            self.sharder.zero_kept(members)
            self.gradients.zero(members)

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

    def _find_units(self, whole: Sequence[Any]) -> tuple[list[Unit], list[int]]:
        """What is gathered together, where parameters are sharded; and each parameter's unit."""
        if self._sharding.how != SHARDED:
            return [], [0] * len(self._named)
        found = find_units(self.module, self._sharding.segment_bytes, whole)
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
            gradients=self.gradients,
        )

    def _come_unannounced(self) -> Callable[[], None]:
        found = weakref.ref(self)  # torch would keep the model with the parameters' hooks

        def come() -> None:
            module = found()
            if module is not None:
                module._hooks.come_unannounced()

        return come

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
        sharder, runs = self.sharder, self.runs
        if self._loss_scale is not None:
            self._loss_scale.check_pass({id(parameter) for _, parameter in self._named})
        sharder.keeps = bool(self.gradients.marks)
        sharder.marks, sharder.described = self.gradients.digest, self.gradients.description
        if sharder.keeps and not sharder.mean_is_aside:  # else gradients of this rank lie there
            for run in runs:
                if not run.has_gradient:
                    run.gradient.zero_()

    def _take_gradients(self, anywhere: list[bool]) -> None:
        if self._schedule is not None:
            self._schedule.end_of_backward()
        for optimizer in self._optimizers:
            optimizer.receive(anywhere.__getitem__)
        if self._loss_scale is not None:
            self._loss_scale.gradients_changed()
        if self.sharder.overflowed and self._loss_scale is None:
            # A GradScaler looks at this rank's shards alone; every rank's must tell it.
            for gradient in self.gradients.own:
                gradient.view(-1)[:1] = torch.inf
        self._changes_when_summed = _changes(self.gradients.own)

    def _forget_gradients(self) -> None:
        self.zero_grad()


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _changes(gradients: Sequence[torch.Tensor]) -> list[int]:
    """How often torch has written to each."""
    return [gradient._version for gradient in gradients]
