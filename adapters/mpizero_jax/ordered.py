"""Calls in the order of the program: a primitive of jax with an ordered effect.

XLA may swap, merge or leave out whatever has no effect. A *collective* here has one, so jax threads
a token through all of them: within a compiled program, through its loops and branches, and from
each program to the next that is started. So every rank carries them out in the order in which the
program was written. jax itself refuses programs for several devices that have such an effect.

Effects are registered in ``jax._src.effects``, and a token's type is found in ``jax._src.core``:
these two things alone are used here and not public.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
from jax._src import effects
from jax._src.core import abstract_token
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mpizero import ArgumentError, World
from mpizero_jax import xla_calls


class _InOrder(effects.Effect):  # type: ignore[misc]
    """Of everything that takes other ranks."""

    def __repr__(self) -> str:  # jax names it where it refuses a program for several devices
        return "a call of mpizero_jax (for programs on one device of a process)"


_IN_ORDER = _InOrder()
for _kind in (
    effects.ordered_effects,
    effects.lowerable_effects,
    effects.control_flow_allowed_effects,
    effects.custom_derivatives_allowed_effects,
    effects.remat_allowed_effects,
):
    _kind.add_type(_InOrder)


@dataclass(frozen=True)
class Collective(ABC):
    """What is done to operands, each on its own, with the other ranks' at the same place.

    ``world``: the ranks, as the calls of compiled programs have them (see ``ranks``). Equal ones
    are one to jax, which compiles them once.
    """

    world: World

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the function, for errors."""

    @abstractmethod
    def shape(self, operand: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an operand's result."""

    @abstractmethod
    def carry_out(self, operands: Sequence[Any], results: Sequence[Any]) -> None:
        """Do it: numpy arrays that are to be read, and written."""

    def derivative(
        self, operands: Sequence[Any], results: Sequence[Any], tangents: Sequence[Any]
    ) -> Sequence[Any]:
        """What the results move by, where the operands move by ``tangents``."""
        return call(self, tangents)

    @abstractmethod
    def adjoint(self) -> Collective:
        """What becomes of cotangents, where the outcome is the sum of all ranks' outcomes."""

    def check_batch(self) -> None:
        """Raise ArgumentError if it means nothing for each of a batch (``jax.vmap``)."""
        return

    @property
    def along_first_axis(self) -> bool:
        """Has the first axis a meaning, so that a batch's has to lie elsewhere?"""
        return False

    def result_forms(self, operands: Sequence[Any]) -> list[Any]:
        """Shapes and dtypes of what comes out."""
        return [jax.ShapeDtypeStruct(self.shape(x.shape), x.dtype) for x in operands]


_primitive = Primitive("mpizero")
_primitive.multiple_results = True


def call(collective: Collective, operands: Sequence[Any]) -> list[Any]:
    """Carry it out, now or wherever the program comes to run that is being traced."""
    return list(_primitive.bind(*operands, collective=collective)) if operands else []


def bind(collective: Collective, operands: Sequence[Any]) -> list[Any]:
    """The same for a user's arrays: checked, and failing here if it fails now."""
    for operand in operands:
        if not xla_calls.can_travel(operand.dtype):
            raise ArgumentError(
                collective.name, "x", f"an array of {operand.dtype}", "an array of numbers",
                "The data of a key is one: jax.random.key_data().",
            )  # fmt: skip
    found = call(collective, operands)
    if not any(isinstance(each, jax.core.Tracer) for each in found):
        with raised_as_they_were():
            jax.block_until_ready(found)
    return found


class raised_as_they_were:  # noqa: N801  (reads as a phrase)
    """Errors of ours that jax has wrapped leave this block as themselves."""

    def __enter__(self) -> None:
        xla_calls.take_error()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            own = xla_calls.take_error()
            if own is not None:
                raise own from None


@cache
def _compiled(collective: Collective) -> Callable[..., Any]:
    compiled: Callable[..., Any] = jax.jit(lambda *operands: call(collective, operands))
    return compiled


def _carry_out_now(*operands: Any, collective: Collective) -> Any:
    with raised_as_they_were():
        return _compiled(collective)(*operands)


def _forms(*operands: Any, collective: Collective) -> Any:
    forms = collective.result_forms(operands)
    return [jax.core.ShapedArray(each.shape, each.dtype) for each in forms], {_IN_ORDER}


def _lower(ctx: Any, *operands: Any, collective: Collective) -> Any:
    number = xla_calls.note(collective, lambda: collective.carry_out)
    token = ctx.tokens_in.get(_IN_ORDER)
    inner = ctx.replace(
        avals_in=[abstract_token, *ctx.avals_in], avals_out=[abstract_token, *ctx.avals_out]
    )
    rule = jax.ffi.ffi_lowering(xla_calls.TARGET, has_side_effect=True)
    token, *results = rule(inner, token, *operands, call=np.int64(number))
    ctx.set_tokens_out(ctx.tokens_in.update_tokens(mlir.TokenSet({_IN_ORDER: token})))
    return results


def _refuse_platform(ctx: Any, *operands: Any, collective: Collective) -> Any:
    platforms = ", ".join(ctx.module_context.platforms)
    raise ArgumentError(
        collective.name, "x", f"an array of a program for {platforms}", "arrays on the CPU",
        "JAX_PLATFORMS=cpu, or jax.default_device(jax.devices('cpu')[0]), makes programs for it.",
    )  # fmt: skip


def _differentiate(primals: Any, tangents: Any, *, collective: Collective) -> Any:
    results = _primitive.bind(*primals, collective=collective)
    some = [at for at, each in enumerate(tangents) if type(each) is not ad.Zero]
    found = [ad.Zero(jax.typeof(each).to_tangent_aval()) for each in results]
    if some:
        of = ([each[at] for at in some] for each in (primals, results, tangents))
        moved = collective.derivative(*of)
        for at, each in zip(some, moved, strict=True):
            found[at] = each
    return results, found


def _transpose(cotangents: Any, *operands: Any, collective: Collective) -> Any:
    found: list[Any] = [None] * len(operands)
    some = [at for at, each in enumerate(cotangents) if type(each) is not ad.Zero]
    if some:
        moved = call(collective.adjoint(), [cotangents[at] for at in some])
        for at, each in zip(some, moved, strict=True):
            found[at] = each
    return found


def _batch(operands: Any, axes: Any, *, collective: Collective) -> Any:
    """For each of a batch: one call with all of them."""
    collective.check_batch()
    moved, found = [], []
    for operand, axis in zip(operands, axes, strict=True):
        if axis is None or not collective.along_first_axis:
            moved.append(operand)
            found.append(axis)
            continue
        last = jax.numpy.moveaxis(operand, axis, -1)
        moved.append(last[None] if last.ndim == 1 else last)
        found.append(moved[-1].ndim - 1)
    return _primitive.bind(*moved, collective=collective), found


_primitive.def_impl(_carry_out_now)
_primitive.def_effectful_abstract_eval(_forms)
mlir.register_lowering(_primitive, _lower, platform="cpu")
mlir.register_lowering(_primitive, _refuse_platform)
ad.primitive_jvps[_primitive] = _differentiate
ad.primitive_transposes[_primitive] = _transpose
batching.primitive_batchers[_primitive] = _batch
