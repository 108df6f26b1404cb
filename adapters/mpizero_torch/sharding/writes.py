"""What a program does to the parameters after ``mz.zero``: found, and followed or refused.

The optimizer updates memory of its own, and float32 copies of what is in 16 bits. So that neither
goes on with what the program has replaced, parameters are compared with what they were: the object
in its module, the address of its memory, and how often torch has written there. No value is read
unless one has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError, MpizeroError
from mpizero.engine import COMMON, SHARDED
from mpizero_torch import slices
from mpizero_torch.sharding.mean_gradients import digest_of, octets
from mpizero_torch.sharding.state import ShardedState


class WatchedParameter(nn.Parameter):
    """A parameter whose ``.data`` shares its count of writes, so that none goes unseen."""

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            values = self.detach().clone(memory_format=torch.preserve_format)
            memo[id(self)] = nn.Parameter(values, self.requires_grad)
        found: nn.Parameter = memo[id(self)]
        return found


class Writes:
    """Compares the parameters of ``state`` with what they were; ``module`` holds them."""

    def __init__(self, module: nn.Module, state: ShardedState) -> None:
        self._state = state
        self._names = [name for name, _ in state.named]
        self._parameters = [parameter for _, parameter in state.named]
        number = {id(parameter): at for at, parameter in enumerate(self._parameters)}
        self._slots = [
            (part._parameters, key, number[id(parameter)])
            for part in module.modules()
            for key, parameter in part._parameters.items()
            if parameter is not None
        ]
        self._comes_and_goes = state.sharding.how == SHARDED
        self._is_shared = state.sharding.how == COMMON and state.group.inner.size > 1
        if not self._comes_and_goes:
            for parameter in self._parameters:
                if type(parameter) is nn.Parameter:
                    parameter.__class__ = WatchedParameter
        self._dtypes = [parameter.dtype for parameter in self._parameters]
        self.watches = True  # not while they may be written to
        self.settle()

    def settle(self) -> None:
        """What there is now is what the optimizer knows."""
        self._versions, self._addresses = self._now()

    def check(self) -> None:
        """Before a forward. Sends nothing: parameters that were replaced are put back, with values.

        Raises ArgumentError if memory that ranks share was written to.
        """
        self._put_back()
        dtypes = [parameter.dtype for parameter in self._parameters]
        if dtypes != self._dtypes:
            pairs = enumerate(zip(dtypes, self._dtypes, strict=True))
            error = self._refusal([index for index, (now, before) in pairs if now != before])
        else:
            error = self._refusal([]) if self._is_shared and self.watches else None
        if error is not None:
            raise error

    def find(self) -> tuple[list[int], int, ArgumentError | None]:
        """(what has changed, a number that all ranks must have, what cannot be followed)."""
        error: ArgumentError | None = None
        changed: list[int] = []
        try:
            self._put_back()
        except ArgumentError as found:
            error = found
        if not self.watches:
            return [], 0, error
        if not self._comes_and_goes:
            versions, addresses = self._now()
            if versions != self._versions or addresses != self._addresses:
                pairs = zip(versions, self._versions, addresses, self._addresses, strict=True)
                changed = [at for at, (v, w, a, b) in enumerate(pairs) if v != w or a != b]
        error = error or self._refusal(changed)
        if not changed and error is None:
            return [], 0, None
        return changed, digest_of([str(error is not None), *map(str, changed)]), error

    def take_over(self, changed: Sequence[int]) -> None:
        """Let what was written be what is trained. Collective: the same on all ranks."""
        state, own = self._state, [self._parameters[index] for index in changed]
        with torch.no_grad():
            values = [slices.local(parameter).detach() for parameter in own]
            state.group.world.agree(
                [
                    f"'{self._names[index]}': {digest_of([octets(value)]):x}"
                    for index, value in zip(changed, values, strict=True)
                ],
                "what was written into parameters (on all ranks it must be the same: write inside "
                "`with mz.gathered(model, modify=True):`, where rank 0's values hold)",
            )
            state.adopt(changed)
            state.memory.settle()
            for index, parameter in zip(changed, own, strict=True):
                if slices.local(parameter).data_ptr() != self._addresses[index]:
                    state.place_again(index)
        self.settle()

    def describe(self, changed: Sequence[int], error: MpizeroError | None) -> str:
        """What this rank has found, for an error that compares."""
        if error is not None:
            return str(error)
        written = [f"'{self._names[index]}'" for index in changed]
        return f"wrote to {', '.join(written[:8])}" if written else "wrote to no parameters"

    def _now(self) -> tuple[list[int], list[int]]:
        if self._comes_and_goes:
            return [], []
        own = [slices.local(p) if type(p) is not WatchedParameter else p for p in self._parameters]
        versions = [0 if p.is_inference() else p._version for p in own]
        return versions, [p.data_ptr() for p in own]

    def _refusal(self, changed: Sequence[int]) -> ArgumentError | None:
        for index in changed:
            parameter = slices.local(self._parameters[index])
            shape, dtype = tuple(parameter.shape), parameter.dtype
            form = self._state.form(index)
            if (shape, dtype) != form:
                return ArgumentError(
                    "parameters", "data", f"{dtype} of shape {shape} for '{self._names[index]}'",
                    f"{form[1]} of shape {form[0]}, as mz.zero() has made it",
                    "Change the form of a model before mz.zero(); mz.set_parameter(p, values) "
                    "takes values of any dtype.",
                )  # fmt: skip
        if not self._is_shared:
            return None
        versions, addresses = self._now()
        if versions == self._versions:
            return None
        for index, (old, new) in enumerate(zip(self._versions, versions, strict=True)):
            if old != new and addresses[index] == self._addresses[index]:
                return ArgumentError(
                    "forward()", "parameters",
                    f"'{self._names[index]}' was written to in place after mz.zero()",
                    "parameters that only the optimizer changes",
                    "The ranks of a node share one copy, so every rank's write was applied to it. "
                    "Initialise before mz.zero(), write inside `with mz.gathered(model, "
                    "modify=True):`, or give every rank a copy with share_parameters=False.",
                )  # fmt: skip
        return None

    def _put_back(self) -> None:
        """Parameters that were replaced in their modules (assign=True): take their values."""
        replaced: dict[int, nn.Parameter] = {}
        for held, key, index in self._slots:
            found: Any = dict.get(held, key)
            if found is self._parameters[index]:
                continue
            self._check_replacement(index, found, replaced.get(index))
            replaced[index] = found
        for index, new in replaced.items():
            with torch.no_grad():
                slices.local(self._parameters[index]).data = slices.local(new).detach()
            self._parameters[index].requires_grad_(new.requires_grad)
        for held, key, index in self._slots:
            if index in replaced:
                dict.__setitem__(held, key, self._parameters[index])

    def _check_replacement(self, index: int, new: Any, before: nn.Parameter | None) -> None:
        name, old = self._names[index], self._parameters[index]
        same = isinstance(new, nn.Parameter) and slices.is_slice(new) == slices.is_slice(old)
        if same and not self._comes_and_goes and new.grad is None and not new.is_meta:
            form = tuple(slices.local(new).shape), slices.local(new).dtype
            if form == self._state.form(index) and (
                before is None or slices.local(before).data_ptr() == slices.local(new).data_ptr()
            ):
                return
        raise ArgumentError(
            "parameters", f"'{name}'", "another parameter in its place than mz.zero() was given",
            "the parameters that mz.zero() was given",
            "The optimizer goes on with the one it knows. Replace parameters before mz.zero(), "
            "give values with mz.set_parameter(p, values), or load them with "
            "model.load_state_dict(state) of the sharded model.",
        )  # fmt: skip
