"""Optimizers whose state is sharded: for training without a framework, with numpy or CuPy.

Each rank holds the parameters' state, and updates the parameters, of its own shard only: stage 1 of
ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054). What is updated is a ``ShardedState``; gathering
it gives the parameters to compute with. The formulas are those of ``torch.optim``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from mpizero.errors import ArgumentError
from mpizero.memory.arrays import empty_like
from mpizero.memory.dtypes import is_half, kind_of
from mpizero.sharded import ShardedState


@dataclass(frozen=True)
class _Run:
    """A contiguous range of a shard whose elements have the same hyper-parameters."""

    dtype: np.dtype[Any]
    place: slice
    group: dict[str, Any]


class ShardedOptimizer:
    """What the optimizers share: groups, master weights, the averaging of gradients.

    ``groups``: hyper-parameters of their own for some parameters (``[{"names": ["w"], "lr": 1}]``);
    the others have the defaults. They may be changed between steps (``optimizer.groups[0]["lr"]``;
    the last group is that of the others). 16-bit parameters are updated in float32 copies and
    rounded once a step. Raises ArgumentError for unknown or repeated names and options, and for
    parameters that are no floating-point numbers.
    """

    _STATE: tuple[str, ...] = ()  # what is kept for each element

    def __init__(
        self, parameters: ShardedState, groups: Sequence[Mapping[str, Any]] = (), **defaults: Any
    ) -> None:
        self.parameters = parameters
        for dtype in parameters.layouts:
            if kind_of(dtype) != "float":
                allowed = "floating-point arrays"
                raise ArgumentError(self._name, "parameters", f"arrays of {dtype}", allowed)
        self.steps = 0
        self.groups = _complete(self._name, groups, defaults, parameters.names)
        self._runs = list(_runs(parameters, self.groups))
        self._masters = {
            dtype: flat.astype(np.float32)
            for dtype, flat in parameters.flats.items()
            if is_half(dtype)
        }
        self._state = {
            kind: {dtype: _zeros_like(self._weights(dtype)) for dtype in parameters.flats}
            for kind in self._STATE
        }

    @property
    def _name(self) -> str:
        return f"{type(self).__name__}()"

    def step(self, gradients: Mapping[str, Any]) -> None:
        """Average the ranks' ``gradients`` and update this rank's shard with them. Collective.

        ``gradients``: by parameter's name, arrays of its shape and dtype, of this rank's batch.
        Raises ArgumentError for missing names and for other shapes and dtypes, on the other ranks a
        MismatchError that quotes it; nothing has changed then.
        """
        world = self.parameters.world
        with world.telling():
            self._check(gradients)
        world.agree([], "the gradients")
        means = {dtype: self._mean_gradient(dtype, gradients) for dtype in self.parameters.layouts}
        self.steps += 1
        for run in self._runs:
            state = [self._state[kind][run.dtype][run.place] for kind in self._STATE]
            weights = self._weights(run.dtype)[run.place]
            self._update(weights, means[run.dtype][run.place], state, run.group)
        for dtype, master in self._masters.items():
            self.parameters.flats[dtype][...] = master

    def state_dict(self) -> dict[str, Any]:
        """Steps, hyper-parameters, and the whole state by kind and parameter. Collective."""
        groups = [dict(group) for group in self.groups]
        with self.parameters.world.together("state_dict()"):
            state = {kind: shards.gather() for kind, shards in self._shards().items()}
        return {"steps": self.steps, "groups": groups, "state": state}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave, on any number of ranks.

        Raises ArgumentError if it is of another method, or of other groups or shapes.
        """
        names = [list(group["names"]) for group in saved["groups"]]
        if names != [group["names"] for group in self.groups]:
            own = str([group["names"] for group in self.groups])
            raise ArgumentError("load_state_dict()", "groups", str(names), own)
        kinds = self._shards()
        if saved["state"].keys() != kinds.keys():
            raise ArgumentError(
                "load_state_dict()", "state", ", ".join(saved["state"]), ", ".join(kinds)
            )
        for name in self.parameters.names:
            shape = self.parameters.shape(name)
            for arrays in saved["state"].values():
                if name in arrays and tuple(arrays[name].shape) != shape:
                    given = f"shape {tuple(arrays[name].shape)}"
                    raise ArgumentError("load_state_dict()", name, given, f"shape {shape}")
        self.steps = int(saved["steps"])
        for group, theirs in zip(self.groups, saved["groups"], strict=True):
            group.update(theirs)
        for kind, shards in kinds.items():
            for name in shards.names:
                piece, elements = shards.piece(name)
                piece[...] = saved["state"][kind][name].reshape(-1)[elements]

    def _update(
        self, weights: Any, gradient: Any, state: list[Any], group: Mapping[str, Any]
    ) -> None:
        """One step of the method, in place, on matching 1-D ranges."""
        raise NotImplementedError

    def _weights(self, dtype: np.dtype[Any]) -> Any:
        """What is updated: the shard itself, or its float32 copy."""
        return self._masters.get(dtype, self.parameters.flats[dtype])

    def _check(self, gradients: Mapping[str, Any]) -> None:
        """Are they of the parameters' names, shapes and dtypes?"""
        for dtype, layout in self.parameters.layouts.items():
            for name, entry in layout.entries.items():
                given = gradients.get(name)
                shape, of = getattr(given, "shape", None), getattr(given, "dtype", None)
                if shape is None or tuple(shape) != entry.shape or of != dtype:
                    what = "nothing" if given is None else f"{of}, shape {shape}"
                    if shape is None and given is not None:
                        what = f"a {type(given).__name__}"
                    expected = f"{dtype}, shape {entry.shape}"
                    raise ArgumentError("step()", f"gradients[{name!r}]", what, expected)

    def _mean_gradient(self, dtype: np.dtype[Any], gradients: Mapping[str, Any]) -> Any:
        """This rank's shard of the mean over the ranks, as wide as what it updates."""
        layout, world = self.parameters.layouts[dtype], self.parameters.world
        with world.telling():
            size = layout.shard_size(world.size)
            whole = _zeros_like(self.parameters.flats[dtype], size * world.size)
            for name, entry in layout.entries.items():
                whole[entry.place] = gradients[name].reshape(-1)
        mean = world.reduce_scatter(whole, "mean")
        return mean.astype(np.float32) if is_half(dtype) else mean

    def _shards(self) -> dict[str, ShardedState]:
        """The state, and the float32 copies, as sharded arrays of the parameters' names."""
        world, layouts = self.parameters.world, self.parameters.layouts
        found = {kind: ShardedState(world, layouts, flats) for kind, flats in self._state.items()}
        copied = {dtype: layouts[dtype] for dtype in self._masters}
        return {**found, "master": ShardedState(world, copied, self._masters)}


class SGD(ShardedOptimizer):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013), as torch.optim.SGD."""

    _STATE = ("momentum",)

    def __init__(
        self,
        parameters: ShardedState,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        groups: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(
            parameters,
            groups,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
        )

    def _update(
        self, weights: Any, gradient: Any, state: list[Any], group: Mapping[str, Any]
    ) -> None:
        (velocity,) = state
        if group["weight_decay"]:
            gradient = gradient + group["weight_decay"] * weights
        velocity *= group["momentum"]
        velocity += gradient
        direction = gradient + group["momentum"] * velocity if group["nesterov"] else velocity
        weights -= group["lr"] * direction


class AdamW(ShardedOptimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), as torch.optim.AdamW."""

    _STATE = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        parameters: ShardedState,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        groups: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(parameters, groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _update(
        self, weights: Any, gradient: Any, state: list[Any], group: Mapping[str, Any]
    ) -> None:
        mean, square = state
        beta_1, beta_2 = group["betas"]
        weights *= 1 - group["lr"] * group["weight_decay"]
        mean *= beta_1
        mean += (1 - beta_1) * gradient
        square *= beta_2
        square += (1 - beta_2) * gradient * gradient
        rate = group["lr"] / (1 - beta_1**self.steps)
        weights -= rate * mean / (np.sqrt(square) / sqrt(1 - beta_2**self.steps) + group["eps"])


def _complete(
    function: str,
    groups: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any],
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Groups with all options, and one more for the parameters that none of them names."""
    left = list(names)
    found = []
    for group in groups:
        for option in group:
            if option != "names" and option not in defaults:
                raise ArgumentError(function, "groups", repr(option), ", ".join(defaults))
        for name in group["names"]:
            if name not in left:
                hint = "Each parameter belongs to one group."
                raise ArgumentError(function, "groups", repr(name), ", ".join(left), hint)
            left.remove(name)
        found.append({**defaults, **group, "names": list(group["names"])})
    return [*found, {**defaults, "names": left}]


def _runs(parameters: ShardedState, groups: Sequence[dict[str, Any]]) -> Iterator[_Run]:
    """This rank's shards, cut where hyper-parameters change. Padding goes with what it follows."""
    group_of = {name: group for group in groups for name in group["names"]}
    for dtype, layout in parameters.layouts.items():
        own = parameters.own_place(layout)
        start, current = 0, None
        for name in layout.entries:
            found = layout.overlap(name, own)
            if found is None:
                continue
            group, place = group_of[name], found[1]
            if current is not None and group is not current:
                yield _Run(dtype, slice(start, place.start), current)
                start = place.start
            current = group
        if current is not None:
            yield _Run(dtype, slice(start, own.stop - own.start), current)


def _zeros_like(flat: Any, count: int | None = None) -> Any:
    zeros = empty_like(flat, (flat.size if count is None else count,))
    zeros[...] = 0
    return zeros
