"""The state of a sharded transformation as a whole, to be saved; and a rank's part of it."""

from __future__ import annotations

from typing import Any

import jax

from mpizero import ArgumentError, World
from mpizero_jax.ownership import EVERYWHERE
from mpizero_jax.runtime import ranks
from mpizero_jax.zero import Form, ZeroState, assembled


def whole_state(state: ZeroState, *, world: World | None = None) -> Any:
    """The transformation's own state, whole, on every rank: what it would be without ``zero``.

    Collective. It can be saved, and read by any number of ranks: see ``own_state``.
    """
    _check("whole_state()", "state", state)
    held, tree = jax.tree_util.tree_flatten(state.inner)
    of = ranks(world)
    found = assembled(held, state.forms, state.owners, [], of)
    return jax.tree_util.tree_unflatten(tree, found)


def own_state(whole: Any, like: ZeroState, *, world: World | None = None) -> ZeroState:
    """This rank's part of a transformation's whole state; ``like``: what ``init`` returned here.

    Raises ArgumentError for the state of another transformation, or of other parameters.
    """
    _check("own_state()", "like", like)
    leaves, tree = jax.tree_util.tree_flatten(whole)
    held, expected = jax.tree_util.tree_flatten(like.inner)
    if tree != expected:
        raise ArgumentError("own_state()", "whole", f"{tree}", f"a state that is {expected}")
    for at, (leaf, form) in enumerate(zip(leaves, like.forms, strict=True)):
        found = Form.of(jax.typeof(leaf))
        if (found.shape, found.dtype) != (form.shape, form.dtype):
            raise ArgumentError(
                "own_state()", "whole", f"{found.dtype}, shape {found.shape}, as its array {at}",
                f"{form.dtype}, shape {form.shape}",
            )  # fmt: skip
    rank = ranks(world).rank
    own = [
        leaf if owner in (EVERYWHERE, rank) else empty
        for leaf, owner, empty in zip(leaves, like.owners, held, strict=True)
    ]
    return ZeroState(jax.tree_util.tree_unflatten(tree, own), like.forms, like.owners)


def _check(function: str, argument: str, state: Any) -> None:
    if not isinstance(state, ZeroState):
        given = f"a {type(state).__name__}"
        raise ArgumentError(function, argument, given, "a state of mpizero_jax.zero()")
