"""``value_and_grad`` and ``grad``: jax's own, but means over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from hashlib import blake2b
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from mpizero import ArgumentError, World
from mpizero.adapting import GradientReducer, Lane, ParameterSpec, Weight
from mpizero_jax.ordered import Collective, bind
from mpizero_jax.runtime import ranks

Weigh = Callable[..., Any]


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    allow_int: bool = False,
    weight: Weigh | None = None,
    world: World | None = None,
) -> Callable[..., Any]:
    """``jax.value_and_grad`` whose value and gradients are means over the ranks.

    ``fun(*args, **kwargs)`` is this rank's loss, of its part of the data; ``has_aux``: with
    something beside it, which stays this rank's. ``weight(*args, **kwargs)``: how much this rank
    counts, a number >= 0 (its samples, its tokens; 0: not at all); means are then
    sum(weight x ...) / sum(weight), and zeros where all weights are 0 (the value: NaN). By default
    all count the same. The same bits come out on every rank. Works inside ``jit``. Collective.
    """
    local = jax.value_and_grad(fun, argnums, has_aux, allow_int=allow_int)

    def averaged(*args: Any, **kwargs: Any) -> Any:
        found, gradients = local(*args, **kwargs)
        value, aux = found if has_aux else (found, None)
        own = None if weight is None else weight(*args, **kwargs)
        [value], gradients = _mean("value_and_grad()", [value], gradients, own, world)
        return ((value, aux), gradients) if has_aux else (value, gradients)

    return wraps(fun)(averaged)


def grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    allow_int: bool = False,
    weight: Weigh | None = None,
    world: World | None = None,
) -> Callable[..., Any]:
    """``jax.grad`` whose gradients are means over the ranks: as ``value_and_grad``'s."""
    both = value_and_grad(fun, argnums, has_aux, allow_int=allow_int, weight=weight, world=world)

    def averaged(*args: Any, **kwargs: Any) -> Any:
        found, gradients = both(*args, **kwargs)
        return (gradients, found[1]) if has_aux else gradients

    return wraps(fun)(averaged)


def mean_gradients(gradients: Any, *, weight: Any = None, world: World | None = None) -> Any:
    """The means over the ranks of gradients that something else has computed, as a pytree.

    For ``nnx.value_and_grad``, ``equinox.filter_value_and_grad``, and gradients that were added up
    over micro-batches. ``weight``: what this rank's count, as in ``value_and_grad``. Collective.
    """
    return _mean("mean_gradients()", [], gradients, weight, world)[1]


def _mean(
    function: str, values: list[Any], gradients: Any, weight: Any, world: World | None
) -> tuple[list[Any], Any]:
    of = ranks(world)
    if of.size == 1 and weight is None:
        return values, gradients
    named, tree = jax.tree_util.tree_flatten_with_path(gradients)
    names = [jax.tree_util.keystr(path) for path, _ in named]
    leaves = [leaf for _, leaf in named]
    some = [at for at, leaf in enumerate(leaves) if leaf.dtype != jax.dtypes.float0]
    weights = [] if weight is None else [jnp.asarray(weight)]
    if any(each.shape for each in weights):
        raise ArgumentError(
            function, "weight", f"an array of shape {weights[0].shape}", "one number for this rank"
        )
    if not some and not values:
        return values, gradients
    mean = _Mean(of, function, tuple(names[at] for at in some), len(values), len(weights))
    found = bind(mean, [*values, *weights, *(leaves[at] for at in some)])
    for at, leaf in zip(some, found[len(values) :], strict=True):
        leaves[at] = leaf
    return found[: len(values)], jax.tree_util.tree_unflatten(tree, leaves)


@dataclass(frozen=True)
class _Mean(Collective):
    """Operands: the values, the weight if one is stated, and the gradients."""

    function: str
    names: tuple[str, ...]
    values: int
    weights: int

    @property
    def name(self) -> str:
        return self.function

    def shape(self, operand: tuple[int, ...]) -> tuple[int, ...]:
        return operand

    def result_forms(self, operands: Sequence[Any]) -> list[Any]:
        forms = super().result_forms(operands)
        return [*forms[: self.values], *forms[self.values + self.weights :]]

    def carry_out(self, operands: Sequence[Any], results: Sequence[Any]) -> None:
        own = operands[self.values] if self.weights else None
        gradients = operands[self.values + self.weights :]
        specs = tuple(
            ParameterSpec(name, gradient.shape, gradient.dtype)
            for name, gradient in zip(self.names, gradients, strict=True)
        )
        with self.world.telling():
            weight = Weight() if own is None else Weight(float(own), stated=True)
            message = _message(operands[: self.values], weight, specs)
        everyones = self.world.allgather(message).reshape(self.world.size, -1)
        if (everyones[:, 0] != message[0]).any():
            self.world.agree([str(spec) for spec in specs], "the gradients")
        total = everyones[:, -1].sum() if weight.stated else self.world.size
        with np.errstate(all="ignore"):
            for at, result in enumerate(results[: self.values], 1):
                result[...] = everyones[:, at].sum() / total
        if gradients:
            try:
                buckets(self.world, specs).average(gradients, weight, results[self.values :])
            except Exception:
                _buckets.pop((self.world, specs), None)  # they are in the midst of a pass
                raise

    def derivative(
        self, operands: Sequence[Any], results: Sequence[Any], tangents: Sequence[Any]
    ) -> NoReturn:
        raise ArgumentError(
            self.function, "fun", "to be differentiated once more",
            "a first derivative",
            "Take the second one with jax.grad(), of a loss that allreduce(loss, 'mean') has "
            "averaged, and average that with mean_gradients().",
        )  # fmt: skip

    def adjoint(self) -> NoReturn:
        raise RuntimeError("it has no derivative")

    def check_batch(self) -> None:
        raise ArgumentError(
            self.function, "fun", "under jax.vmap()", "one loss for each rank and step",
            "Let the loss be the mean over a batch: jax.vmap() inside of it.",
        )  # fmt: skip


def _message(values: Sequence[Any], weight: Weight, specs: tuple[ParameterSpec, ...]) -> Any:
    """What this rank tells the others ahead: its gradients' forms, its values, and its weight."""
    counts = weight.value if weight.stated else 1.0
    own = [float(value) * counts if counts else 0.0 for value in values]  # 0 x NaN is NaN
    stated = [weight.value] if weight.stated else []
    return np.array([_digest(specs), *own, *stated], np.float64)


@cache
def _digest(specs: tuple[ParameterSpec, ...]) -> int:
    """A number for these forms, the same on every rank."""
    text = "\n".join(map(str, specs)).encode()
    return int.from_bytes(blake2b(text, digest_size=6).digest(), "little")


class GradientBuckets:
    """Gradients of one form, in the core's buckets while they are averaged."""

    def __init__(self, world: World, specs: Sequence[ParameterSpec]) -> None:
        self._gradients: Sequence[Any] = ()
        self._specs = specs
        self._reducer = GradientReducer(
            Lane(0, world), specs, world.allocate, overlap=False, fill=self._fill
        )

    def average(self, gradients: Sequence[Any], weight: Weight, means: Sequence[Any]) -> None:
        """Write the ranks' means. Collective."""
        reducer = self._reducer
        self._gradients = gradients
        try:
            reducer.open(reducer.plan(weight, kept=False))
            for index in reversed(range(len(gradients))):
                reducer.ready(index)
            reducer.close()
        finally:
            self._gradients = ()
        for index, mean in enumerate(means):
            mean[...] = reducer.view(index)

    def _fill(self, bucket: Any, members: Sequence[int]) -> list[bool]:
        for index in members:
            bucket.views[index][...] = self._gradients[index]
        return [True] * len(members)


_buckets: dict[Any, GradientBuckets] = {}


def buckets(world: World, specs: tuple[ParameterSpec, ...]) -> GradientBuckets:
    """The buckets for gradients of these names and forms, the same on all ranks. Collective."""
    key = (world, specs)
    if key not in _buckets:
        _buckets[key] = GradientBuckets(world, specs)
    return _buckets[key]
