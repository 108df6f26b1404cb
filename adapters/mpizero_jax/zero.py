"""``zero``: an Optax transformation of whose state every rank keeps its part (ZeRO's stage 1).

Which part is found from the transformation itself, as jax traces it: what an update depends on is
written there. The owner of a parameter's state computes its update from the very operations of the
transformation, on whole arrays, so the outcome is that of the transformation alone, whatever it
does: element by element, by rows and columns, by norms of layers or of everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpizero import ArgumentError, MismatchError, World
from mpizero_jax.dependence import dependence, evaluate_part
from mpizero_jax.ordered import Collective, bind
from mpizero_jax.ownership import EVERYWHERE, Ownership
from mpizero_jax.runtime import ranks

_SAMPLES = 8  # of each gradient: do all ranks have the same?


def zero(
    transformation: optax.GradientTransformation,
    stage: int = 1,
    *,
    extra: Mapping[str, Any] | None = None,
    world: World | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The ``transformation``, with its state spread over the ranks.

    ``init`` and ``update`` are used as any other transformation's, by all ranks; ``update`` takes
    gradients that are the same on all of them, as ``value_and_grad`` gives them, and returns all
    updates on every rank. They are those of the transformation alone: clipping by the global norm,
    masks, schedules and layer-wise norms in it are right. ``extra``: examples of the further
    arguments that the transformation's ``update`` needs, if any (``{"value": 0.0}``).

    Raises ArgumentError for a transformation whose state cannot be parted, and for stages other
    than 1; ``update`` raises MismatchError where the ranks' gradients differ.
    """
    if stage != 1:
        raise ArgumentError(
            "zero()", "stage", str(stage), "1",
            "It spreads the optimizer's state; gradients and parameters stay whole.",
        )  # fmt: skip
    inner = optax.with_extra_args_support(transformation)
    of = ranks(world)

    def init(params: Any) -> ZeroState:
        return _init(inner, params, dict(extra or {}), of)

    def update(gradients: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if not isinstance(state, ZeroState):
            raise ArgumentError(
                "update()", "state", f"a {type(state).__name__}", "what zero()'s init() returned"
            )
        return _update(inner, gradients, state, params, extra, of)

    return optax.GradientTransformationExtraArgs(init, update)


@dataclass(frozen=True)
class Form:
    """An array's shape and dtype; ``weak``: its dtype gives way to others'."""

    shape: tuple[int, ...]
    dtype: Any
    weak: bool

    @classmethod
    def of(cls, aval: Any) -> Form:
        return cls(tuple(aval.shape), aval.dtype, bool(getattr(aval, "weak_type", False)))

    @property
    def abstract(self) -> Any:
        return jax.ShapeDtypeStruct(self.shape, self.dtype, weak_type=self.weak)


@dataclass(frozen=True)
class ZeroState:
    """The state of a transformation under ``zero``.

    ``inner`` is the transformation's own, with empty arrays in place of those that another rank
    keeps. ``forms`` and ``owners``: of all its arrays, whichever rank has them.
    """

    inner: Any
    forms: tuple[Form, ...]
    owners: tuple[int, ...]


jax.tree_util.register_dataclass(ZeroState, data_fields=["inner"], meta_fields=["forms", "owners"])


def _init(inner: Any, params: Any, extra: dict[str, Any], world: World) -> ZeroState:
    traced, out = _traced(inner.init, params)
    forms = [Form.of(aval) for aval in traced.out_avals]
    state = jax.tree_util.tree_unflatten(out, [form.abstract for form in forms])
    # Gradients have the forms of parameters, as far as ownership goes.
    arguments, static = _parted(extra)

    def run(g: Any, s: Any, p: Any, e: Any) -> Any:
        return inner.update(g, s, p, **_joined(e, static))

    try:
        whole, _ = _traced(run, params, state, params, arguments)
    except TypeError as error:
        raise ArgumentError(
            "zero()", "extra", f"{extra or None}",
            "examples of all that the transformation's update() needs beside gradients, state and "
            "parameters", f"({error})",
        ) from error  # fmt: skip
    ownership = _ownership(whole, len(forms), world)
    wanted = [owner in (EVERYWHERE, world.rank) for owner in ownership.state]
    found = iter(evaluate_part(traced, wanted, jax.tree_util.tree_leaves(params)))
    leaves = [
        next(found) if here else _empty(form) for here, form in zip(wanted, forms, strict=True)
    ]
    return ZeroState(jax.tree_util.tree_unflatten(out, leaves), tuple(forms), ownership.state)


def _ownership(whole: Any, count: int, world: World) -> Ownership:
    """From a traced update: (gradients, state, ...) -> (updates, state)."""
    needs = dependence(whole)
    updates = len(needs) - count
    first = updates  # as many gradients come in as updates go out
    state = [(mask >> first) & ((1 << count) - 1) for mask in needs]
    forms = [Form.of(aval) for aval in whole.in_avals[first : first + count]]
    return Ownership.of(forms, state[updates:], state[:updates], world.size)


def _update(
    inner: Any, gradients: Any, state: ZeroState, params: Any, extra: Any, world: World
) -> tuple[Any, ZeroState]:
    held, tree = jax.tree_util.tree_flatten(state.inner)
    whole_state = jax.tree_util.tree_unflatten(tree, [form.abstract for form in state.forms])
    arguments, static = _parted(extra)

    def run(g: Any, s: Any, p: Any, e: Any) -> Any:
        return inner.update(g, s, p, **_joined(e, static))

    whole, out = _traced(run, gradients, whole_state, params, arguments)
    if whole.effects:
        raise ArgumentError(
            "update()", "transformation", "one that takes other ranks, or has other effects",
            "one that computes",
            "Let a function that it calls (value_fn) be this rank's alone.",
        )  # fmt: skip
    given = jax.tree_util.tree_leaves(gradients)
    count = len(held)
    ownership = _ownership(whole, count, world)
    if ownership.state != state.owners:
        raise ArgumentError(
            "update()", "transformation",
            "one whose updates depend on other state now than when init() was called",
            "an update that is always alike",
        )  # fmt: skip
    owners = [*ownership.updates, *ownership.state]
    wanted = [owner in (EVERYWHERE, world.rank) for owner in owners]
    here = [
        leaf if owner in (EVERYWHERE, world.rank) else None
        for leaf, owner in zip(held, ownership.state, strict=True)
    ]
    rest = jax.tree_util.tree_leaves((params, arguments))
    found = iter(evaluate_part(whole, wanted, [*given, *here, *rest]))
    forms = [Form.of(aval) for aval in whole.out_avals]
    parts = [next(found) if own else None for own in wanted]
    updates = assembled(parts[: len(given)], forms, ownership.updates, given, world)
    leaves = [
        _empty(form) if leaf is None else leaf
        for leaf, form in zip(parts[len(given) :], forms[len(given) :], strict=True)
    ]
    updates, next_state = jax.tree_util.tree_unflatten(out, [*updates, *leaves])
    return updates, ZeroState(next_state, tuple(forms[len(given) :]), state.owners)


def _traced(function: Any, *arguments: Any) -> tuple[Any, Any]:
    """The jaxpr of a function of pytrees, and the structure of its outcome."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    return closed, jax.tree_util.tree_structure(shape)


def _empty(form: Form) -> Any:
    if jnp.issubdtype(form.dtype, jax.dtypes.extended):
        return jax.random.key(0)[None][:0]
    return jnp.zeros((0,), form.dtype)


def _parted(extra: dict[str, Any]) -> tuple[Any, Any]:
    """Arrays to trace, and all else (functions, for instance) as it is."""
    leaves, tree = jax.tree_util.tree_flatten(extra)
    arrays = [leaf if _is_array(leaf) else None for leaf in leaves]
    others = [None if _is_array(leaf) else leaf for leaf in leaves]
    return arrays, (others, tree)


def _joined(arrays: Any, static: Any) -> Any:
    others, tree = static
    both = [b if a is None else a for a, b in zip(arrays, others, strict=True)]
    return jax.tree_util.tree_unflatten(tree, both)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex))


def assembled(
    parts: Sequence[Any],
    forms: Sequence[Form],
    owners: Sequence[int],
    gradients: Sequence[Any],
    world: World,
) -> list[Any]:
    """All ranks' updates, on every rank."""
    if world.size == 1:
        return list(parts)
    shared = [at for at, owner in enumerate(owners) if owner != EVERYWHERE]
    wanted = tuple((forms[at].shape, np.dtype(forms[at].dtype), owners[at]) for at in shared)
    own = [parts[at] for at in shared if owners[at] == world.rank]
    found = iter(bind(_Assemble(world, wanted), [_sample(gradients), *own])[1:])
    return [next(found) if owner != EVERYWHERE else parts[at] for at, owner in enumerate(owners)]


def _sample(gradients: Sequence[Any]) -> Any:
    """Some elements of each gradient, as bytes."""
    found = [jnp.zeros((0,), np.uint8)]
    for gradient in gradients:
        size = prod(gradient.shape)
        places = np.unique(np.linspace(0, size - 1, min(size, _SAMPLES)).astype(int))
        some = jnp.ravel(gradient)[places]
        if jnp.issubdtype(some.dtype, jnp.complexfloating):
            some = jnp.stack([some.real, some.imag])
        found.append(jax.lax.bitcast_convert_type(some, np.uint8).reshape(-1))
    return jnp.concatenate(found)


@dataclass(frozen=True)
class _Assemble(Collective):
    """Operands: samples of the gradients, and this rank's updates; results: all ranks'."""

    updates: tuple[tuple[tuple[int, ...], Any, int], ...]  # shape, dtype and owner of each

    @property
    def name(self) -> str:
        return "update()"

    def shape(self, operand: tuple[int, ...]) -> tuple[int, ...]:
        return operand

    def result_forms(self, operands: Sequence[Any]) -> list[Any]:
        found = [jax.ShapeDtypeStruct((1,), np.uint8)]
        return found + [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in self.updates]

    def carry_out(self, operands: Sequence[Any], results: Sequence[Any]) -> None:
        self._check_alike(operands[0])
        results[0][...] = 0
        for dtype in sorted({dtype for _, dtype, _ in self.updates}, key=str):
            self._gather(dtype, operands[1:], results[1:])

    def _check_alike(self, sample: Any) -> None:
        digest = np.frombuffer(blake2b(repr(self.updates).encode()).digest(), np.uint8)
        message = np.concatenate([digest, sample])
        everyones = self.world.allgather(message).reshape(self.world.size, -1)
        other = [rank for rank, row in enumerate(everyones) if (row != everyones[0]).any()]
        if other:
            raise MismatchError(
                f"update(): the gradients of rank {other[0]} are not those of rank 0. Average them "
                "with value_and_grad(), grad() or mean_gradients() of mpizero_jax first."
            )

    def _gather(self, dtype: Any, operands: Sequence[Any], results: Sequence[Any]) -> None:
        own = [operand.reshape(-1) for operand in operands if operand.dtype == dtype]
        flat = self.world.allgather_uneven(np.concatenate([np.zeros(0, dtype), *own]))
        start = 0
        for rank in range(self.world.size):
            for (_, its, owner), result in zip(self.updates, results, strict=True):
                if owner == rank and its == dtype:
                    result[...] = flat[start : start + result.size].reshape(result.shape)
                    start += result.size

    def derivative(
        self, operands: Sequence[Any], results: Sequence[Any], tangents: Sequence[Any]
    ) -> NoReturn:
        raise ArgumentError(
            "update()", "gradients", "to be differentiated", "gradients as they are",
            "jax.lax.stop_gradient() around them leaves them out of a derivative.",
        )  # fmt: skip

    def adjoint(self) -> NoReturn:
        raise RuntimeError("it has no derivative")

    def check_batch(self) -> None:
        raise ArgumentError("update()", "gradients", "under jax.vmap()", "one step at a time")
