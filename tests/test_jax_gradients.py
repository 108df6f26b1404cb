"""``value_and_grad`` and ``grad``: means over the ranks, against one process with all the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import mpizero_jax as mj  # noqa: E402


@pytest.fixture(scope="module")
def world() -> mj.World:
    return mj.init()


def _params(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "in": {"w": rng.normal(size=(5, 90)).astype(np.float32), "b": np.zeros(90, np.float32)},
        "out": rng.normal(size=(90, 2)).astype(np.float32) / 9,
        "half": jnp.asarray(rng.normal(size=(2,)), jnp.bfloat16),
    }


def _data(rank: int, count: int = 4) -> tuple[Any, Any]:
    rng = np.random.default_rng(100 + rank)
    return (
        rng.normal(size=(count, 5)).astype(np.float32),
        rng.normal(size=(count, 2)).astype(np.float32),
    )


def _loss(params: Any, batch: Any) -> Any:
    x, y = batch
    hidden = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"])
    out = hidden @ params["out"] + params["half"].astype(jnp.float32)
    return jnp.mean((out - y) ** 2)


def _close(found: Any, expected: Any) -> None:
    def check(a: Any, b: Any) -> None:
        assert a.dtype == b.dtype and a.shape == b.shape
        loose = a.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32),
            rtol=2e-2 if loose else 2e-5, atol=1e-6,
        )  # fmt: skip

    jax.tree.map(check, found, expected)


def _all_data(counts: list[int]) -> tuple[Any, Any]:
    parts = [_data(rank, count) for rank, count in enumerate(counts)]
    return tuple(np.concatenate(each) for each in zip(*parts, strict=True))  # type: ignore[return-value]


@pytest.mark.parallel([1, 2, 3, 4])
def test_equals_one_process(world: mj.World) -> None:
    params, batch = _params(), _data(world.rank)
    expected = jax.value_and_grad(_loss)(params, _all_data([4] * world.size))
    averaged = mj.value_and_grad(_loss)
    for each in (averaged, jax.jit(averaged)):
        for _ in range(3):  # buckets are laid out anew after the first time
            found = each(params, batch)
            _close(found, expected)
    _close(jax.jit(mj.grad(_loss))(params, batch), expected[1])
    bits = np.concatenate([np.ravel(g).view(np.uint8) for g in jax.tree.leaves(found)])
    for other in world.gather_objects(bits.tobytes()):
        assert other == bits.tobytes()


@pytest.mark.parallel([1, 2, 3])
def test_weights(world: mj.World) -> None:
    counts = [1 + 3 * rank for rank in range(world.size)]
    params, batch = _params(), _data(world.rank, counts[world.rank])
    expected = jax.value_and_grad(_loss)(params, _all_data(counts))
    weighed = jax.jit(mj.value_and_grad(_loss, weight=lambda params, batch: batch[0].shape[0]))
    _close(weighed(params, batch), expected)


@pytest.mark.parallel([2, 3])
def test_a_rank_that_counts_nothing_may_have_nan(world: mj.World) -> None:
    params, batch = _params(), _data(world.rank)
    idle = world.rank == world.size - 1
    if idle:
        batch = (batch[0] * np.nan, batch[1])
    expected = jax.value_and_grad(_loss)(params, _all_data([4] * (world.size - 1)))
    each = jax.jit(mj.value_and_grad(_loss, weight=lambda *_: jnp.where(jnp.array(idle), 0, 7.5)))
    _close(each(params, batch), expected)
    nobody = mj.value_and_grad(_loss, weight=lambda *_: 0)
    value, gradients = nobody(params, batch)
    assert np.isnan(value)
    assert not any(np.any(np.asarray(g, np.float32)) for g in jax.tree.leaves(gradients))


@pytest.mark.parallel([1, 2, 3])
def test_aux_argnums_and_integers(world: mj.World) -> None:
    def loss(scale: Any, x: Any, steps: Any) -> Any:
        return scale * jnp.sum(x**2) * world.rank, {"rank": steps + world.rank}

    mean_rank = (world.size - 1) / 2
    x = jnp.arange(3.0)
    (value, aux), (of_scale, of_x) = mj.value_and_grad(loss, (0, 1), has_aux=True)(2.0, x, 5)
    assert float(value) == pytest.approx(2 * 5 * mean_rank)
    assert aux == {"rank": 5 + world.rank}  # this rank's
    assert float(of_scale) == pytest.approx(5 * mean_rank)
    np.testing.assert_allclose(of_x, 4 * x * mean_rank)
    only, aux = mj.grad(loss, argnums=1, has_aux=True)(2.0, x, 5)
    np.testing.assert_allclose(only, 4 * x * mean_rank)
    assert aux == {"rank": 5 + world.rank}
    both = mj.grad(lambda p: loss(2.0, p["x"], 0)[0], allow_int=True)({"n": 3, "x": x})
    assert both["n"].dtype == jax.dtypes.float0
    np.testing.assert_allclose(both["x"], 4 * x * mean_rank)


@pytest.mark.parallel([1, 2, 3])
def test_a_loss_with_collectives_in_it_and_gradients_of_micro_batches(world: mj.World) -> None:
    xs = np.stack([_data(rank)[0] for rank in range(world.size)])
    w = jnp.ones(5) / 3

    def loss(w: Any, x: Any) -> Any:  # features normalised by all ranks' mean and variance
        y = x @ w
        mean = mj.allreduce(y.mean(), "mean")
        variance = mj.allreduce(((y - mean) ** 2).mean(), "mean")
        return (((y - mean) / jnp.sqrt(variance + 1e-3)) ** 3).mean()

    def of_all(w: Any) -> Any:
        y = xs.reshape(-1, 5) @ w
        return (((y - y.mean()) / jnp.sqrt(y.var() + 1e-3)) ** 3).mean()

    expected = jax.value_and_grad(of_all)(w)
    _close(jax.jit(mj.value_and_grad(loss))(w, xs[world.rank]), expected)

    def scanned(w: Any, x: Any) -> Any:  # one step of a scan is one mean
        return jax.lax.scan(lambda w, x: (w - 0.1 * mj.grad(loss)(w, x), None), w, x)[0]

    twice = w - 0.1 * jax.grad(of_all)(w)
    twice = twice - 0.1 * jax.grad(of_all)(twice)
    _close(jax.jit(scanned)(w, jnp.stack([xs[world.rank]] * 2)), twice)


@pytest.mark.parallel([1, 2, 3])
def test_mean_of_gradients_that_something_else_computed(world: mj.World) -> None:
    tree = {"a": jnp.full((3, 3), world.rank + 1.0), "b": None, "c": [jnp.float32(world.rank)]}
    found = jax.jit(mj.mean_gradients)(tree)
    np.testing.assert_allclose(found["a"], (world.size + 1) / 2)
    assert float(found["c"][0]) == (world.size - 1) / 2
    weighed = mj.mean_gradients(tree, weight=float(world.rank == 0))
    np.testing.assert_allclose(weighed["a"], 1.0)


@pytest.mark.parallel([2, 3])
def test_what_differs_is_an_error_on_all_ranks(world: mj.World) -> None:
    params, batch = _params(), _data(world.rank)
    weight = (lambda *_: -1.0) if world.rank == 1 else (lambda *_: 1.0)
    kind = mj.ArgumentError if world.rank == 1 else mj.MismatchError
    with pytest.raises(kind, match=r"'weight' is -1\.0"):
        mj.grad(_loss, weight=weight)(params, batch)
    with pytest.raises(mj.MismatchError):
        mj.grad(_loss, weight=weight if world.rank == 0 else None)(params, batch)
    same = {"x": jnp.ones(3)}
    mj.mean_gradients(same)  # so that some ranks have buckets for what comes next, and some not
    other = {"x": jnp.ones(3 + (world.rank == 1))}
    with pytest.raises(mj.MismatchError, match=r"\['x'\]"):
        mj.mean_gradients(other)
    _close(mj.grad(_loss)(params, batch), jax.grad(_loss)(params, _all_data([4] * world.size)))


@pytest.mark.parallel([2])
def test_what_means_nothing_is_refused(world: mj.World) -> None:
    x = jnp.ones(3)
    with pytest.raises(mj.ArgumentError, match="differentiated once more"):
        jax.grad(lambda x: mj.grad(lambda x: jnp.sum(x**3))(x).sum())(x)
    with pytest.raises(mj.ArgumentError, match="vmap"):
        jax.vmap(mj.grad(lambda x: x**2))(x)
    with pytest.raises(mj.ArgumentError, match="one number for this rank"):
        mj.grad(lambda x: jnp.sum(x), weight=lambda x: x)(x)
