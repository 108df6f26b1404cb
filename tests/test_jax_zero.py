"""``zero``: Optax's own transformations with their state spread over ranks, and as they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import mpizero_jax as mj  # noqa: E402


@pytest.fixture(scope="module")
def world() -> mj.World:
    return mj.init()


def _params() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {
        "a": {"w": rng.normal(size=(16, 12)), "b": rng.normal(size=(80,))},
        "c": rng.normal(size=(2, 8, 9)),
        "s": np.float64(0.5),
    }


def _in_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def _loss(params: Any, k: Any) -> Any:
    return sum(jnp.sum(jnp.sin(p * (at + 1 + k)) + p**2) for at, p in
               enumerate(jax.tree.leaves(params)))  # fmt: skip


def _trained(transformation: Any, params: Any, steps: int = 3, **extra: Any) -> Any:
    """Parameters and the state's arrays after some compiled steps."""

    def step(carry: Any, k: Any) -> Any:
        params, state = carry
        value, gradients = jax.value_and_grad(_loss)(params, k)
        given = dict.fromkeys(extra, value)
        updates, state = transformation.update(gradients, state, params, **given)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, jax.jit(transformation.init)(params))
    compiled = jax.jit(step)
    for k in range(steps):
        carry, _ = compiled(carry, float(k))
    return carry


def _close(found: Any, expected: Any) -> None:
    if jnp.issubdtype(expected.dtype, jax.dtypes.prng_key):
        found, expected = map(jax.random.key_data, (found, expected))
    both = (np.asarray(each, np.float32) for each in (found, expected))
    np.testing.assert_allclose(*both, rtol=2e-5, atol=2e-6)


def _compare(
    transformation: Any, world: mj.World, *, with_scalar: bool = True, **extra: Any
) -> Any:
    params = _in_float32(_params())
    if not with_scalar:
        del params["s"]
    expected, plain = _trained(transformation, params, **extra)
    found, state = _trained(mj.zero(transformation, extra=extra or None), params, **extra)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected
    )
    moved = [not np.allclose(a, b) for a, b in
             zip(jax.tree.leaves(expected), jax.tree.leaves(params), strict=True)]  # fmt: skip
    held = jax.tree.leaves(state.inner)
    for owner, mine, whole in zip(state.owners, held, jax.tree.leaves(plain), strict=True):
        if owner in (-1, world.rank):
            _close(mine, whole)
        else:
            assert mine.size == 0
    return state, any(moved)


_SOME: dict[str, Callable[[], Any]] = {
    "adamw": lambda: optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(
            optax.cosine_decay_schedule(0.1, 5),
            mask=lambda p: jax.tree.map(lambda x: jnp.ndim(x) > 1, p),
        ),
    ),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=4),
    "muon": lambda: optax.contrib.muon(0.1),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
}

_OTHERS: dict[str, Callable[[], Any]] = {
    **{
        name: partial(getattr(optax, name), 0.05)
        for name in (
            "adabelief", "adadelta", "adagrad", "adam", "adamax", "adamaxw", "adan", "amsgrad",
            "fromage", "lamb", "lars", "lion", "nadam", "nadamw", "novograd", "optimistic_adam_v2",
            "optimistic_gradient_descent", "radam", "rmsprop", "rprop", "sgd", "sign_sgd",
            "signum", "sm3", "yogi",
        )
    },
    "momentum": lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
    "noisy_sgd": lambda: optax.noisy_sgd(0.05, key=1),
    "centered": lambda: optax.rmsprop(0.05, centered=True, momentum=0.9),
    "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.01), optax.adam(0.05)),
    "block_rms": lambda: optax.chain(optax.clip_by_block_rms(0.1), optax.adam(0.05)),
    "param_block_norm": lambda: optax.chain(optax.scale_by_param_block_norm(), optax.sgd(0.05)),
    "centralize": lambda: optax.chain(optax.centralize(), optax.adam(0.05)),
    "update_norm": lambda: optax.chain(optax.normalize_by_update_norm(), optax.adam(0.05)),
    "zero_nans": lambda: optax.chain(optax.zero_nans(), optax.adam(0.05)),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.05), 3),
    "apply_every": lambda: optax.chain(optax.adam(0.05), optax.apply_every(2)),
    "ema": lambda: optax.chain(optax.adam(0.05), optax.ema(0.9)),
    "hyperparameters": lambda: optax.inject_hyperparams(optax.adamw)(
        learning_rate=optax.linear_schedule(0.1, 0.0, 4), weight_decay=0.1
    ),
    "masked": lambda: optax.masked(
        optax.adam(0.05), lambda p: jax.tree.map(lambda x: jnp.ndim(x) == 1, p)
    ),
    "partition": lambda: optax.partition(
        {"matrix": optax.adafactor(0.05, min_dim_size_to_factor=4), "rest": optax.adam(0.05)},
        lambda p: jax.tree.map(lambda x: "matrix" if jnp.ndim(x) > 1 else "rest", p),
    ),
    "non_negative": lambda: optax.chain(optax.adam(0.05), optax.keep_params_nonnegative()),
    "ademamix": lambda: optax.contrib.ademamix(0.05),
    "cocob": lambda: optax.contrib.cocob(0.05),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(0.05),
    "prodigy": lambda: optax.contrib.prodigy(0.05),
    "dadapt": lambda: optax.contrib.dadapt_adamw(0.05),
    "dog": lambda: optax.contrib.dog(0.05),
    "dowg": lambda: optax.contrib.dowg(0.05),
}  # fmt: skip


@pytest.mark.parallel([1, 2, 3, 4])
def test_the_updates_are_those_of_the_transformation_alone(world: mj.World) -> None:
    for make in _SOME.values():
        _, moved = _compare(make(), world)
        assert moved


@pytest.mark.skipif("MPIZERO_TEST_ALL" not in os.environ, reason="takes minutes to compile")
@pytest.mark.parallel([2])
def test_all_of_optaxs_transformations(world: mj.World) -> None:
    apart = []
    for name, make in _OTHERS.items():
        try:
            _, moved = _compare(make(), world, with_scalar=name != "sm3")  # which takes none
        except mj.ArgumentError:
            continue
        assert moved, name
        apart.append(name)
    assert {*_OTHERS} - {*apart} <= {"prodigy", "dadapt", "dog", "dowg", "schedule_free"}
    _compare(optax.polyak_sgd(0.05), world, value=0.0)


@pytest.mark.parallel([1, 2, 3])
def test_every_rank_keeps_its_part(world: mj.World) -> None:
    params = {f"layer {k}": jnp.ones((40 + k, 50)) for k in range(12)}
    state = mj.zero(optax.adam(0.1)).init(params)
    whole = sum(x.nbytes for x in jax.tree.leaves(optax.adam(0.1).init(params)))
    mine = sum(x.nbytes for x in jax.tree.leaves(state.inner))
    assert mine < 1.15 * whole / world.size
    assert sum(world.gather_objects(mine)) == whole + 4 * (world.size - 1)  # the step counter


@pytest.mark.parallel([1, 2, 3])
def test_the_whole_state_and_a_rank_s_part_of_it(world: mj.World) -> None:
    params = _in_float32(_params())
    adam = optax.adam(0.1)
    optimizer = mj.zero(adam)
    gradients = jax.grad(_loss)(params, 1.0)
    _, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    _, expected = adam.update(gradients, adam.init(params), params)
    whole = mj.whole_state(state)
    jax.tree.map(_close, whole, expected)
    assert jax.tree.structure(whole) == jax.tree.structure(expected)
    found = mj.own_state(expected, optimizer.init(params))
    jax.tree.map(_close, found, state)
    with pytest.raises(mj.ArgumentError, match="'whole'"):
        mj.own_state(adam.init({"other": params}), state)
    with pytest.raises(mj.ArgumentError, match=r"'whole' is int32, shape \(1,\)"):
        mj.own_state(jax.tree.map(lambda x: x[None], expected), state)


@pytest.mark.parallel([2, 3])
def test_gradients_that_differ_are_noticed_on_all_ranks(world: mj.World) -> None:
    params = _in_float32(_params())
    optimizer = mj.zero(optax.adam(0.1))
    state = optimizer.init(params)
    local = jax.grad(_loss)(params, float(world.rank))
    with pytest.raises(mj.MismatchError, match=r"gradients of rank 1 .* value_and_grad\(\)"):
        optimizer.update(local, state, params)
    averaged = mj.grad(_loss)(params, float(world.rank))
    updates, _ = jax.jit(optimizer.update)(averaged, state, params)
    plain = optax.adam(0.1)
    expected, _ = plain.update(averaged, plain.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, expected)


@pytest.mark.parallel([1, 2])
def test_what_cannot_be_parted_is_refused(world: mj.World) -> None:
    params = _in_float32(_params())
    with pytest.raises(mj.ArgumentError, match="state of all others"):
        mj.zero(optax.scale_by_lbfgs()).init(params)
    with pytest.raises(mj.ArgumentError, match="'extra' is None"):
        mj.zero(optax.polyak_sgd()).init(params)
    for stage in (0, 2, 3):
        with pytest.raises(mj.ArgumentError, match="'stage'"):
            mj.zero(optax.adam(0.1), stage)
    with pytest.raises(mj.ArgumentError, match="'state' is a tuple"):
        mj.zero(optax.adam(0.1)).update(params, optax.adam(0.1).init(params), params)
