"""What of a traced function's outcome depends on what of its arguments; and a part of it alone.

That is read off the jaxpr, operation by operation, so it holds for every function, whoever wrote
it: an operation that is not known to be more particular makes all its results depend on all its
operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Literal
from jax.interpreters import partial_eval

Masks = list[int]  # for each of some values: on which arguments it depends, a bit for each


def dependence(closed: Any) -> Masks:
    """For each result: the arguments it depends on, as bits (bit i: argument i)."""
    jaxpr = closed.jaxpr
    return _through(jaxpr, [1 << at for at in range(len(jaxpr.invars))])


def _through(jaxpr: Any, arguments: Sequence[int]) -> Masks:
    known: dict[Any, int] = dict(zip(jaxpr.invars, arguments, strict=True))

    def of(atom: Any) -> int:
        return 0 if isinstance(atom, Literal) else known.get(atom, 0)  # constants: on nothing

    for equation in jaxpr.eqns:
        operands = [of(atom) for atom in equation.invars]
        results = _of_equation(equation, operands)
        known.update(zip(equation.outvars, results, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _of_equation(equation: Any, operands: Masks) -> Masks:
    """Functions within it are looked into where it calls them with its own operands."""
    name, params = equation.primitive.name, equation.params
    if name == "cond":
        which, *rest = operands
        each = [_through(branch.jaxpr, rest) for branch in params["branches"]]
        return [which | _union(masks) for masks in zip(*each, strict=True)]
    inner = params.get("jaxpr") or params.get("call_jaxpr")
    if name in ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"):
        inner = getattr(inner, "jaxpr", inner)
        if inner is not None and len(inner.invars) == len(operands):
            return _through(inner, operands)
    return [_union(operands)] * len(equation.outvars)


def _union(masks: Sequence[int]) -> int:
    found = 0
    for mask in masks:
        found |= mask
    return found


def evaluate_part(closed: Any, wanted: Sequence[bool], arguments: Sequence[Any]) -> list[Any]:
    """The wanted results, computed from what they need; arguments that they do not may be None."""
    part, needed = partial_eval.dce_jaxpr(closed.jaxpr, list(wanted))
    given = [x for x, is_needed in zip(arguments, needed, strict=True) if is_needed]
    if any(x is None for x in given):
        raise RuntimeError("a result needs an argument that is not here")
    return list(jax.core.eval_jaxpr(part, closed.consts, *given))
