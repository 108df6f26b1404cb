"""Collectives of jax arrays: values, order, derivatives; against numpy and one process' jax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import mpizero_jax as mj  # noqa: E402
from mpizero_jax.ordered import Collective, bind  # noqa: E402
from mpizero_jax.runtime import ranks  # noqa: E402
from support.launch import mpirun  # noqa: E402


@pytest.fixture(scope="module")
def world() -> mj.World:
    return mj.init()


def _part(rank: int, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    numbers = np.random.default_rng(rank).integers(-8, 9, shape)
    return (numbers / 4 if np.dtype(dtype).kind != "i" else numbers).astype(dtype)


def _parts(size: int, shape: tuple[int, ...], dtype: Any = np.float32) -> list[Any]:
    return [_part(rank, shape, dtype) for rank in range(size)]


_IN_NUMPY: dict[str, Callable[[Sequence[Any], int], Any]] = {
    "allreduce": lambda parts, rank: sum(parts),
    "max": lambda parts, rank: np.max(parts, axis=0),
    "allgather": lambda parts, rank: np.concatenate(parts),
    "reduce_scatter": lambda parts, rank: np.split(sum(parts), len(parts))[rank],
    "broadcast": lambda parts, rank: parts[-1],
    "all_to_all": lambda parts, rank: np.concatenate(
        [np.split(part, len(parts))[rank] for part in parts]
    ),
}


def _calls(size: int) -> dict[str, Callable[[Any], Any]]:
    return {
        "allreduce": mj.allreduce,
        "max": lambda x: mj.allreduce(x, "max"),
        "allgather": mj.allgather,
        "reduce_scatter": mj.reduce_scatter,
        "broadcast": lambda x: mj.broadcast(x, size - 1),
        "all_to_all": mj.all_to_all,
    }


@pytest.mark.parallel([1, 2, 3, 4])
def test_values_are_numpys_outside_of_jit_and_inside(world: mj.World) -> None:
    for name, call in _calls(world.size).items():
        for dtype in (np.float32, jnp.bfloat16, np.int32):
            parts = _parts(world.size, (2 * world.size, 3), dtype)
            expected = _IN_NUMPY[name]([part.astype(np.float64) for part in parts], world.rank)
            x = jnp.asarray(parts[world.rank])
            for found in (call(x), jax.jit(call)(x)):
                assert found.dtype == x.dtype
                np.testing.assert_array_equal(np.asarray(found, np.float64), expected, name)
            np.testing.assert_array_equal(x, parts[world.rank])  # its own memory is left alone


@pytest.mark.parallel([1, 2, 3])
def test_pytrees_large_and_small_empty_and_scalar(world: mj.World) -> None:
    def tree(rank: int) -> dict[str, Any]:
        return {
            "large": _part(rank, (300, 70)),
            "small": [_part(rank, (5,)), _part(rank + 9, (2, 2))],
            "whole": _part(rank, (3,), np.int32),
            "empty": np.zeros((0, 4), np.float32),
            "number": np.float32(rank + 1),
        }

    expected = jax.tree.map(lambda *parts: sum(parts), *[tree(r) for r in range(world.size)])
    for call in (mj.allreduce, jax.jit(mj.allreduce)):
        found = call(tree(world.rank))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    everyone = mj.allgather({"n": float(world.rank)})["n"]
    np.testing.assert_array_equal(everyone, np.arange(world.size))
    assert mj.allreduce({}) == {}


def _adjoint_of(call: Callable[[Any], Any], x: Any, y: Any, world: mj.World) -> None:
    """<A x, y> = <x, A' y>, summed over the ranks: what an adjoint is."""
    value, back = jax.vjp(call, x)
    forward = float(jnp.vdot(value, y))
    backward = float(jnp.vdot(x, back(y)[0]))
    sums = mj.allreduce(jnp.array([forward, backward]))
    assert float(sums[0]) == pytest.approx(float(sums[1]), rel=1e-5)
    assert float(sums[0]) != 0
    _, moved = jax.jvp(call, (x,), (2 * x,))
    np.testing.assert_allclose(moved, 2 * call(x), rtol=1e-6)


@pytest.mark.parallel([1, 2, 3])
def test_adjoints(world: mj.World) -> None:
    calls = _calls(world.size)
    del calls["max"]
    calls["mean"] = lambda x: mj.allreduce(x, "mean")
    calls["mean of parts"] = lambda x: mj.reduce_scatter(x, "mean")
    for call in calls.values():
        x = jnp.asarray(_part(world.rank + 1, (2 * world.size, 3)))
        y = jnp.asarray(_part(world.rank + 50, jax.eval_shape(call, x).shape))
        _adjoint_of(call, x, y, world)
        _adjoint_of(jax.jit(call), x, y, world)


@pytest.mark.parallel([1, 2, 3])
def test_largest_gives_its_gradient_to_those_that_have_it(world: mj.World) -> None:
    x = jnp.array([float(world.rank), 5.0])
    found = jax.grad(lambda x: mj.allreduce(x, "max") @ jnp.array([1.0, 2.0]))(x)
    # The outcome of each of the n ranks moves; the second number is the largest of all of them.
    expected = [world.size * (world.rank == world.size - 1), 2.0]
    np.testing.assert_allclose(found, expected)
    with pytest.raises(mj.ArgumentError, match="'product' where it is differentiated"):
        jax.grad(lambda x: mj.allreduce(x, "product").sum())(x)


def _through_loops(mean: Callable[[Any], Any], x: Any) -> Any:
    def body(carry: Any, k: Any) -> tuple[Any, Any]:
        carry = jax.checkpoint(lambda c: mean(jnp.sin(c)))(carry) + k * x
        return carry, carry.sum()

    last, each = jax.lax.scan(body, x, jnp.arange(3.0))
    last = jax.lax.cond(each[0] < 1e9, mean, lambda y: y, last)
    return jnp.sum(last**2) + each[1]


@pytest.mark.parallel([1, 2, 3])
def test_through_scan_cond_and_checkpoint(world: mj.World) -> None:
    parts = np.stack(_parts(world.size, (4,)))

    def of_all(xs: Any) -> Any:  # one process that has all ranks' numbers: the sum of outcomes
        def mean(y: Any) -> Any:
            return jnp.broadcast_to(y.mean(0), y.shape)

        return _through_loops(mean, xs)

    def of_mine(x: Any) -> Any:
        return _through_loops(lambda y: mj.allreduce(y, "mean"), x)

    expected = jax.grad(of_all)(parts)[world.rank]
    for each in (jax.grad(of_mine), jax.jit(jax.grad(of_mine))):
        np.testing.assert_allclose(each(parts[world.rank]), expected, rtol=2e-5, atol=1e-5)
    counted = jax.jit(
        lambda x: jax.lax.while_loop(
            lambda s: s[0] < 3, lambda s: (s[0] + 1, mj.allreduce(s[1])), (0, x)
        )
    )(jnp.float32(1))
    assert float(counted[1]) == world.size**3


@pytest.mark.parallel([1, 2, 3])
def test_under_vmap_each_of_a_batch_is_a_call(world: mj.World) -> None:
    x = jnp.asarray(_part(world.rank, (5, 2 * world.size, 3)))
    for name, call in _calls(world.size).items():
        expected = jnp.stack([call(each) for each in x])
        np.testing.assert_array_equal(jax.vmap(call)(x), expected, name)
        last = jax.vmap(call, in_axes=2, out_axes=1)(jnp.moveaxis(x, 0, 2))
        np.testing.assert_array_equal(last, jnp.moveaxis(expected, 0, 1), name)
    numbers = jax.vmap(mj.allgather)(jnp.arange(3.0) + world.rank)
    assert numbers.shape == (3, world.size)


@dataclass(frozen=True)
class _Noted(Collective):
    """Takes no other rank: notes that it has been called."""

    number: int

    @property
    def name(self) -> str:
        return "noted()"

    def shape(self, operand: tuple[int, ...]) -> tuple[int, ...]:
        return operand

    def carry_out(self, operands: Sequence[Any], results: Sequence[Any]) -> None:
        _order.append(self.number)
        results[0][...] = operands[0]

    def adjoint(self) -> Collective:
        return _Noted(self.world, -self.number)


_order: list[int] = []


@pytest.mark.parallel([1])
def test_calls_that_need_nothing_of_each_other_keep_the_order_of_the_program(
    world: mj.World,
) -> None:
    def program(x: Any, first: int) -> Any:
        # The first ones wait for much, the last ones for nothing; nothing reads the results.
        found = []
        for at in range(20):
            y = x
            for _ in range(20 - at):
                y = jnp.tanh(y @ y)
            found.append(bind(_Noted(ranks(world), first + at), [y])[0])
        return found[-1]

    compiled = jax.jit(program, static_argnums=1)
    x = jnp.ones((60, 60)) / 100
    _order.clear()
    last = [compiled(x, first) for first in (100, 200, 100)]  # none is waited for
    bind(_Noted(ranks(world), 7), [jnp.ones(1)])
    jax.block_until_ready(last)
    assert _order == [*range(100, 120), *range(200, 220), *range(100, 120), 7]

    _order.clear()
    jax.jit(jax.grad(lambda y: sum(bind(_Noted(ranks(world), k), [y * k])[0] for k in (1, 2))))(1.0)
    assert _order == [1, 2, -2, -1]


@pytest.mark.parallel([2, 3])
def test_a_difference_between_ranks_is_an_error_on_all_and_the_next_call_works(
    world: mj.World,
) -> None:
    x = jnp.ones(3 + (world.rank == 1))
    with pytest.raises(mj.MismatchError, match=r"rank 1: allreduce.*shape \(4,\)"):
        mj.allreduce(x)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"rank 1: allreduce.*shape \(4,\)"):
        jax.block_until_ready(jax.jit(mj.allreduce)(x))
    assert float(mj.allreduce(jnp.ones(()))) == world.size
    assert float(jax.jit(mj.allreduce)(jnp.ones(()))) == world.size


@pytest.mark.parallel([1, 2])
def test_arguments_are_checked_where_the_call_is_written(world: mj.World) -> None:
    whole = jnp.arange(2 * world.size)
    with pytest.raises(mj.ArgumentError, match="allreduce"):
        jax.jit(lambda x: mj.allreduce(x, "mean"))(whole)
    with pytest.raises(mj.ArgumentError, match="'median'"):
        mj.allreduce(1.0, "median")
    with pytest.raises(mj.ArgumentError, match="'root' is 9"):
        mj.broadcast(1.0, root=9)
    with pytest.raises(mj.ArgumentError, match="key_data"):
        mj.broadcast(jax.random.key(0))
    if world.size > 1:
        for call in (mj.reduce_scatter, mj.all_to_all):
            with pytest.raises(mj.ArgumentError, match="multiple of the 2 ranks"):
                jax.jit(call)(jnp.ones(3))


_SEVERAL_DEVICES = """
import jax, jax.numpy as jnp
jnp.ones(3).block_until_ready()  # programs are started asynchronously from here on
import mpizero_jax as mj
world = mj.init()
try:
    jax.pmap(mj.allreduce)(jnp.ones((2, 3)))
except ValueError as error:
    assert "mpizero_jax (for programs on one device" in str(error), error
mean = jax.jit(lambda x: mj.allreduce(jnp.tanh(x @ x), "mean"))
x, found = jnp.ones((300, 300)) / 300, []
for _ in range(10):  # programs under way, calls of the World beside them
    found += [mean(x), mj.allgather(x[:1])]
    world.barrier()
jax.block_until_ready(found)
print("fine")
"""


@pytest.mark.once
def test_several_devices_are_refused_and_programs_under_way_are_no_danger(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(_SEVERAL_DEVICES)
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    result = mpirun(2, [str(program)], timeout=200, env=env)
    assert result.stdout.count("fine") == 2, result.stderr


@pytest.mark.parallel([2, 3])
def test_sub_worlds(world: mj.World) -> None:
    part = world.split(world.rank % 2)
    assert part is not None
    total = jax.jit(lambda x: mj.allreduce(x, world=part))(jnp.float32(world.rank))
    assert float(total) == sum(range(world.rank % 2, world.size, 2))
