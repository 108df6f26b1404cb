"""Collectives on arrays and pytrees, outside of ``jit`` and inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpizero import ArgumentError, World
from mpizero.adapting import operation
from mpizero_jax.ordered import Collective, bind, call
from mpizero_jax.runtime import ranks

# Arrays smaller than this travel together: a message costs more than a copy.
_SMALL_BYTES = 32 << 10


@dataclass(frozen=True)
class _AllReduce(Collective):
    op: str

    @property
    def name(self) -> str:
        return "allreduce()"

    def shape(self, operand: tuple[int, ...]) -> tuple[int, ...]:
        return operand

    def carry_out(self, operands: Sequence[Any], results: Sequence[Any]) -> None:
        small: dict[np.dtype[Any], list[int]] = {}
        for at, operand in enumerate(operands):
            if operand.nbytes < _SMALL_BYTES:
                small.setdefault(operand.dtype, []).append(at)
            else:
                self.world.allreduce(operand, self.op, out=results[at])
        for members in small.values():
            packed = np.concatenate([operands[at].reshape(-1) for at in members])
            self.world.allreduce(packed, self.op)
            ends = np.cumsum([operands[at].size for at in members])[:-1]
            for at, piece in zip(members, np.split(packed, ends), strict=True):
                results[at][...] = piece.reshape(results[at].shape)

    def derivative(
        self, operands: Sequence[Any], results: Sequence[Any], tangents: Sequence[Any]
    ) -> Sequence[Any]:
        if self.op in ("sum", "mean"):
            return call(self, tangents)
        if self.op not in ("max", "min"):
            raise _not_differentiable(self.name, self.op, "'sum', 'mean', 'max' or 'min'")
        # Of those that have the largest or smallest each gives an equal part.
        total = _AllReduce(self.world, "sum")
        has = [(x == y).astype(x.dtype) for x, y in zip(operands, results, strict=True)]
        counts = call(total, has)
        parts = [h / c * t for h, c, t in zip(has, counts, tangents, strict=True)]
        return call(total, parts)

    def adjoint(self) -> Collective:
        return self


@dataclass(frozen=True)
class _AllGather(Collective):
    @property
    def name(self) -> str:
        return "allgather()"

    def shape(self, operand: tuple[int, ...]) -> tuple[int, ...]:
        first, *rest = operand or (1,)
        return (self.world.size * first, *rest)

    def carry_out(self, operands: Sequence[Any], results: Sequence[Any]) -> None:
        for operand, result in zip(operands, results, strict=True):
            self.world.allgather(operand, out=result)

    def adjoint(self) -> Collective:
        return _ReduceScatter(self.world, "sum")

    @property
    def along_first_axis(self) -> bool:
        return True


@dataclass(frozen=True)
class _ReduceScatter(Collective):
    op: str

    @property
    def name(self) -> str:
        return "reduce_scatter()"

    def shape(self, operand: tuple[int, ...]) -> tuple[int, ...]:
        if not operand or operand[0] % self.world.size:
            raise ArgumentError(
                self.name, "x", f"an array of shape {operand}",
                f"one whose first axis is a multiple of the {self.world.size} ranks",
                "Pad it, or use allreduce().",
            )  # fmt: skip
        return (operand[0] // self.world.size, *operand[1:])

    def carry_out(self, operands: Sequence[Any], results: Sequence[Any]) -> None:
        for operand, result in zip(operands, results, strict=True):
            self.world.reduce_scatter(operand, self.op, out=result)

    def derivative(
        self, operands: Sequence[Any], results: Sequence[Any], tangents: Sequence[Any]
    ) -> Sequence[Any]:
        if self.op not in ("sum", "mean"):
            raise _not_differentiable(self.name, self.op, "'sum' or 'mean'")
        return call(self, tangents)

    def adjoint(self) -> Collective:
        return _AllGather(self.world) if self.op == "sum" else _MeanGather(self.world)

    @property
    def along_first_axis(self) -> bool:
        return True


@dataclass(frozen=True)
class _MeanGather(_AllGather):
    """What a mean's parts come from: each rank has 1/n of the mean."""

    def carry_out(self, operands: Sequence[Any], results: Sequence[Any]) -> None:
        super().carry_out(operands, results)
        for result in results:
            result /= result.dtype.type(self.world.size)

    def adjoint(self) -> Collective:
        return _ReduceScatter(self.world, "mean")


@dataclass(frozen=True)
class _Broadcast(Collective):
    root: int

    @property
    def name(self) -> str:
        return "broadcast()"

    def shape(self, operand: tuple[int, ...]) -> tuple[int, ...]:
        return operand

    def carry_out(self, operands: Sequence[Any], results: Sequence[Any]) -> None:
        for operand, result in zip(operands, results, strict=True):
            result[...] = operand
            self.world.broadcast(result, self.root)

    def adjoint(self) -> Collective:
        return _SumAtRoot(self.world, self.root)


@dataclass(frozen=True)
class _SumAtRoot(Collective):
    """The sum, on the root, and zeros elsewhere."""

    root: int

    @property
    def name(self) -> str:
        return "broadcast()"

    def shape(self, operand: tuple[int, ...]) -> tuple[int, ...]:
        return operand

    def carry_out(self, operands: Sequence[Any], results: Sequence[Any]) -> None:
        for operand, result in zip(operands, results, strict=True):
            result[...] = operand
            self.world.reduce(result, self.root)
            if self.world.rank != self.root:
                result[...] = 0

    def adjoint(self) -> Collective:
        return _Broadcast(self.world, self.root)


@dataclass(frozen=True)
class _AllToAll(Collective):
    @property
    def name(self) -> str:
        return "all_to_all()"

    def shape(self, operand: tuple[int, ...]) -> tuple[int, ...]:
        if not operand or operand[0] % self.world.size:
            raise ArgumentError(
                self.name, "x", f"an array of shape {operand}",
                f"one whose first axis is a multiple of the {self.world.size} ranks",
            )  # fmt: skip
        return operand

    def carry_out(self, operands: Sequence[Any], results: Sequence[Any]) -> None:
        for operand, result in zip(operands, results, strict=True):
            self.world.all_to_all(operand, out=result)

    def adjoint(self) -> Collective:
        return self  # what has gone to a rank comes back from it

    @property
    def along_first_axis(self) -> bool:
        return True


def allreduce(x: Any, op: str = "sum", *, world: World | None = None) -> Any:
    """Combine an array, or each array of a pytree, over all ranks, element by element.

    ``op``: "sum", "mean", "max", "min", "product", "band", "bor", "bxor"; the first four can be
    differentiated. Every rank gets the same bits. Collective, as all here, and in the order of the
    program: all ranks make the same calls in the same order.
    """
    of = ranks(world)
    leaves, tree = _flat(x)
    for leaf in leaves:
        operation(op, np.dtype(leaf.dtype), of.size, "allreduce()")
    return jax.tree_util.tree_unflatten(tree, bind(_AllReduce(of, op), leaves))


def allgather(x: Any, *, world: World | None = None) -> Any:
    """Put the ranks' arrays, or those of pytrees, behind one another along the first axis.

    Shape (k, ...) becomes (size * k, ...); a number becomes (size,). The same on every rank.
    """
    leaves, tree = _flat(x)
    return jax.tree_util.tree_unflatten(tree, bind(_AllGather(ranks(world)), leaves))


def reduce_scatter(x: Any, op: str = "sum", *, world: World | None = None) -> Any:
    """Combine over all ranks; rank r gets the r-th part of the result's first axis.

    Shape (size * k, ...) becomes (k, ...). ``op`` as in ``allreduce``; "sum" and "mean" can be
    differentiated.
    """
    of = ranks(world)
    leaves, tree = _flat(x)
    for leaf in leaves:
        operation(op, np.dtype(leaf.dtype), of.size, "reduce_scatter()")
    return jax.tree_util.tree_unflatten(tree, bind(_ReduceScatter(of, op), leaves))


def broadcast(x: Any, root: int = 0, *, world: World | None = None) -> Any:
    """The ``root``'s array, or pytree of arrays, on every rank.

    All ranks pass arrays of the same shapes and dtypes.
    """
    of = ranks(world)
    if not 0 <= root < of.size:
        raise ArgumentError("broadcast()", "root", str(root), f"0 to {of.size - 1}")
    leaves, tree = _flat(x)
    return jax.tree_util.tree_unflatten(tree, bind(_Broadcast(of, root), leaves))


def all_to_all(x: Any, *, world: World | None = None) -> Any:
    """Send the r-th part of the first axis to rank r, for all r; part s came from rank s."""
    leaves, tree = _flat(x)
    return jax.tree_util.tree_unflatten(tree, bind(_AllToAll(ranks(world)), leaves))


def _not_differentiable(function: str, op: str, allowed: str) -> ArgumentError:
    return ArgumentError(
        function, "op", f"'{op}' where it is differentiated", allowed,
        "jax.lax.stop_gradient() around its argument leaves it out of the derivative.",
    )  # fmt: skip


def _flat(x: Any) -> tuple[list[Any], Any]:
    leaves, tree = jax.tree_util.tree_flatten(x)
    return [jnp.asarray(leaf) for leaf in leaves], tree
