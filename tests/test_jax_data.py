"""``shard``: arrays dealt to the ranks."""

from __future__ import annotations

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import mpizero_jax as mj  # noqa: E402


@pytest.mark.parallel([1, 2, 3, 4])
def test_ranks_see_what_one_process_sees() -> None:
    world = mj.init()
    x = np.arange(11.0, dtype=np.float32)
    data = mj.shard({"x": x, "y": x[:, None]}, 2, seed=5)
    mean = jax.jit(
        mj.value_and_grad(lambda w, b: jnp.mean(w * b.rows["x"]), weight=lambda w, b: b.weight)
    )
    for number in range(2):
        order = np.random.default_rng((5, number)).permutation(11)
        steps = [order[at : at + 2 * world.size] for at in range(0, 11, 2 * world.size)]
        assert data.epoch == number and len(data) == len(steps)
        for batch, together in zip(data, steps, strict=True):
            np.testing.assert_array_equal(batch.rows["x"], batch.rows["y"][:, 0])
            value, gradient = mean(1.0, batch)
            assert float(value) == pytest.approx(x[together].mean(), rel=1e-6)
            assert float(gradient) == pytest.approx(x[together].mean(), rel=1e-6)


@pytest.mark.parallel([1, 2])
def test_what_differs_is_refused() -> None:
    world = mj.init()
    with pytest.raises(mj.ArgumentError, match=r"\[3, 4\] rows"):
        mj.shard((np.ones(3), np.ones(4)), 1)
    world.barrier()
    if world.size > 1:
        with pytest.raises(mj.MismatchError, match="5 rows"):
            mj.shard(np.ones(4 + world.rank), 1)
