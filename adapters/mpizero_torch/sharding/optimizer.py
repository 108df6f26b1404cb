"""``ShardedOptimizer``: a torch optimizer whose parameters are this rank's shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpizero import MpizeroError
from mpizero.diagnostics import recorder
from mpizero_torch import slices
from mpizero_torch.sharding.offload import with_gradients
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
        # The numbers of each group's parameters, in the order of the plain optimizer's.
        self._members: list[list[int]] = []
        super().__init__([{"params": [nn.Parameter(torch.empty(0))]}], inner.defaults)
        self.param_groups = inner.param_groups
        self.state = inner.state

    def take(
        self, module: ShardedModule, runs: Sequence[Run], members: Sequence[Sequence[int]]
    ) -> None:
        """Update these runs, of ``module``; ``members``: the plain optimizer's groups."""
        self._module = module
        self._members = [list(each) for each in members]
        self._runs = list(runs)
        self._regroup()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update this rank's shards with their gradients, and every rank's parameters. Collective.

        Raises MpizeroError if gradients have only been accumulated under ``no_sync``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with recorder().span("optimizer"):
            self._module.before_update()
            if self._module.should_update():
                if self._at_once:
                    self._step_at_once()
                else:
                    self._step_by_run()
            self._module.after_update()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, of the shards and those still on this rank; or let them be zero."""
        self._module.forget_gradients(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the wrapped model, which were in no group before. Collective."""
        if not hasattr(self, "_runs"):  # called by Optimizer.__init__
            super().add_param_group(param_group)
            return
        given = param_group["params"]
        parameters = [given] if isinstance(given, torch.Tensor) else list(given)
        self._module.add_group({**param_group, "params": parameters})

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
            indices = [index for members in self._members for index in members]
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

    def adopt(self, runs: Sequence[Run], group: dict[str, Any], members: Sequence[int]) -> None:
        """A further group, whose parameters are these runs'."""
        self._runs = [*self._runs, *runs]
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

    def has(self, index: int) -> bool:
        """Is this parameter in one of its groups?"""
        return any(index in members for members in self._members)

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

    @property
    def _at_once(self) -> bool:
        return all(run.is_direct for run in self._runs) and not self._module.keeps_state_aside

    def _step_at_once(self) -> None:
        for run in self._runs:
            run.lend()
        self._inner.step()
        self._show_gradients()

    def _show_gradients(self) -> None:
        for run in self._runs:
            if run.has_gradient:
                run.receive()

    def _step_by_run(self) -> None:
        """One run after the other, so that what it needs beside the shards is one run's."""
        for run in self._runs:
            run.parameter.grad = None
        for run, gradient in with_gradients(self._runs):
            run.parameter.grad = gradient
            self._inner.step()
            run.parameter.grad = None
            self._module.put_state_aside(self.state.get(run.parameter, {}))
        self._show_gradients()

    def _regroup(self) -> None:
        for number, group in enumerate(self.param_groups):
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
