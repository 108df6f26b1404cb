"""``ShardedOptimizer``: a torch optimizer whose parameters are this rank's shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpizero import MpizeroError
from mpizero.diagnostics import recorder
from mpizero_torch import slices
from mpizero_torch.sharding.offload import StateOnDisk, States, with_gradients
from mpizero_torch.sharding.optimizer_state import consolidate, distribute, whole_state
from mpizero_torch.sharding.runs import Run, split

if TYPE_CHECKING:
    from mpizero_torch.sharding.module import ShardedModule
    from mpizero_torch.sharding.state import ShardedState


class ShardedOptimizer(torch.optim.Optimizer):
    """What ``mz.zero`` gives back for ``inner``: it updates this rank's part, and shows it to all.

    ``param_groups`` are the inner optimizer's, with this rank's shards for parameters (1-D slices,
    or whole parameters; their ``.grad`` is the mean over the ranks), so that schedulers, hooks,
    ``GradScaler`` and everything that changes hyper-parameters work as ever. ``step`` is
    collective. ``state_dict`` and ``load_state_dict`` speak of the whole parameters, in the form
    of the plain optimizer's.
    """

    _module: ShardedModule

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self._inner = inner
        self._numbers: list[int] = []
        # The numbers of each group's parameters, in the order of the plain optimizer's.
        self._members: list[list[int]] = []
        self._was_skipped = False
        super().__init__([{"params": [nn.Parameter(torch.empty(0))]}], inner.defaults)
        self.param_groups = inner.param_groups
        self.state = inner.state

    def take(
        self,
        module: ShardedModule,
        runs: Sequence[Run],
        numbers: Sequence[int],
        members: Sequence[Sequence[int]],
    ) -> None:
        """Update those of the runs of ``module`` that are in one of its groups.

        ``numbers``: of its groups among all optimizers'; ``members``: the parameters of each.
        """
        self._module = module
        if module.aside is not None:
            self.state = self._inner.state = States(module.aside, self._inner.state)
        self._members = [list(each) for each in members]
        self._numbers = list(numbers)
        self._runs = [run for run in runs if run.group in self._numbers]
        self._regroup()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update this rank's shards with their gradients, and every rank's parameters. Collective.

        The inner optimizer's ``step`` is called once, or, if gradients overflowed under a loss
        scale, not at all: see ``step_was_skipped``.

        Raises MpizeroError if gradients have only been accumulated under ``no_sync``, or if they
        overflow whatever the loss scale.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with recorder().span("optimizer"):
            self._module.before_update(self)
            self._was_skipped = not self._module.should_update()
            if not self._was_skipped:
                self._step_inner()
            self._module.after_update(self)
        return loss

    @property
    def step_was_skipped(self) -> bool:
        """Was the last ``step`` left out, since gradients overflowed? The same on all ranks.

        For learning rate schedules, which go on with the steps that are made.
        """
        return self._was_skipped

    def __getattr__(self, name: str) -> Any:
        if name in ("train", "eval") and hasattr(vars(self).get("_inner"), name):
            return partial(self._change, name)
        raise AttributeError(
            f"'{type(self).__name__}' object has no attribute '{name}'", name=name, obj=self
        )

    def _change(self, name: str) -> None:
        """Let the inner optimizer go over to other parameters, and publish them. Collective."""
        with self._module.changing(f"optimizer.{name}()", self):
            getattr(self._inner, name)()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, of the shards and those still on this rank; or let them be zero."""
        self._module.forget_gradients(self, set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the wrapped model, which were in no group before. Collective."""
        if not hasattr(self, "_runs"):  # called by Optimizer.__init__
            super().add_param_group(param_group)
            return
        given = param_group["params"]
        parameters = [given] if isinstance(given, torch.Tensor) else list(given)
        self._module.add_group(self, {**param_group, "params": parameters})

    def state_dict(self, root: int | None = None) -> dict[str, Any]:
        """The plain optimizer's state_dict, of whole parameters. Collective.

        On every rank, or on ``root`` only (elsewhere the state is empty). Takes the result's memory
        and, for a moment, one piece of a parameter's state.
        """
        state = self._module.state
        with state.group.world.together("state_dict()"):
            found = consolidate(
                self._inner, self._runs, self._members, state.shapes, state.group, root
            )
            indices = self.members
            for number, values in found["state"].items():
                _as_placed(values, state.named[indices[number]][1])
            return found

    def state_of(self, index: int) -> dict[str, Any]:
        """The whole state of one parameter of the model, on every rank. Collective."""
        state = self._module.state
        runs = [run for run in self._runs if any(each.index == index for each in run.pieces)]
        found = whole_state(self._inner, runs, {index: 0}, state.shapes, state.group, None)
        values = found.get(0, {})
        _as_placed(values, state.named[index][1])
        return values

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state_dict of a plain optimizer, or ``state_dict()``'s, on every rank.

        Each keeps its part. Raises ArgumentError if it is of other groups or parameters.
        """
        self._runs = distribute(
            self._inner, self._runs, self._members, self._module.state.shapes, state_dict
        )
        self._regroup()

    def adopt(
        self, runs: Sequence[Run], number: int, group: dict[str, Any], members: Sequence[int]
    ) -> None:
        """A further group, whose parameters are these runs'."""
        self._runs = [*self._runs, *runs]
        self._numbers.append(number)
        self._members.append(list(members))
        # An optimizer refuses a group without parameters, which a rank may have.
        placeholder = [nn.Parameter(torch.empty(0))]
        own = [run.parameter for run in runs] or placeholder
        self._inner.add_param_group({**group, "params": own})
        self._regroup()

    def receive(self, has_gradient: Callable[[int], bool]) -> None:
        """The shards hold new gradients: let the optimizer see those of parameters that have one.

        ``has_gradient(index)``: has any rank one for this parameter, from this pass?
        """

        waiting = [run for run in self._runs if not run.has_gradient]
        runs = split(waiting, has_gradient, self.state)
        if len(runs) > len(waiting):
            self._runs = [run for run in self._runs if run.has_gradient] + runs
            self._regroup()
        for run in runs:
            # Padding alone is updated with the rest, so that every rank has something to update.
            if not run.pieces or has_gradient(run.pieces[0].index):
                run.receive()

    def forget(self, is_forgotten: Callable[[int], bool]) -> None:
        """Leave these parameters without a gradient, wherever there are others in a shard."""
        holding = [run for run in self._runs if run.has_gradient]
        runs = split(holding, is_forgotten, self.state)
        if len(runs) > len(holding):
            self._runs = [*runs, *(run for run in self._runs if not run.has_gradient)]
            self._regroup()
        for run in runs:
            if run.pieces and is_forgotten(run.pieces[0].index):
                run.forget()

    @property
    def numbers(self) -> Sequence[int]:
        """Of its groups, among all optimizers' of the model."""
        return self._numbers

    @property
    def members(self) -> list[int]:
        """The numbers of its parameters."""
        return [index for members in self._members for index in members]

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer that was given, which updates this rank's shards."""
        return self._inner

    @property
    def names(self) -> list[list[str]]:
        """The names of each group's parameters, in the order of the plain optimizer's."""
        named = self._module.state.named
        return [[named[index][0] for index in members] for members in self._members]

    @property
    def sharded_state(self) -> ShardedState:
        """The parameters' and gradients' memory."""
        return self._module.state

    @property
    def runs(self) -> Sequence[Run]:
        return self._runs

    def _step_inner(self) -> None:
        """Once, with all gradients where and in the dtype that it works in."""
        aside = self._module.aside
        copied = [run for run in self._runs if not run.is_direct]
        for run in self._runs:
            run.lend()
        for run, gradient in with_gradients(copied):
            run.parameter.grad = gradient if aside is None else self._in_file(run, gradient, aside)
        try:
            self._inner.step()
        finally:
            for run in self._runs:
                run.show()

    def _in_file(self, run: Run, gradient: torch.Tensor, aside: StateOnDisk) -> torch.Tensor:
        """A copy of a gradient that takes no memory: the same file at every step."""
        if run.copy is None:
            run.copy = aside.empty_like(gradient)
        run.copy.copy_(gradient)
        return run.copy

    def _regroup(self) -> None:
        for number, group in zip(self._numbers, self.param_groups, strict=True):
            group["params"] = [run.parameter for run in self._runs if run.group == number]


def _as_placed(values: dict[str, Any], parameter: torch.Tensor) -> None:
    """Let state that was put together for a slice of a parameter be a slice, as torch has it."""
    if slices.is_slice(parameter):
        shape = slices.local(parameter).shape
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape == shape:
                values[key] = slices.wrap(value, parameter)


def no_gradients(where: str) -> MpizeroError:
    """The error for an update with gradients that were never averaged."""
    return MpizeroError(
        f"{where}: the gradients have only been accumulated on this rank, under no_sync(), and "
        "never averaged. Let the last backward() before a step run outside no_sync()."
    )
