"""Pytrees saved by some ranks, and loaded by others; torch's models, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

import mpizero_jax as mj  # noqa: E402
import mpizero_torch as mz  # noqa: E402


def shared(tmp_path: Path) -> Path:
    return Path(mj.init().broadcast_object(str(tmp_path)))


def params(fill: float = 1.0) -> Any:
    return {
        "layers": [
            {"kernel": jnp.full((5, 3), fill), "bias": jnp.arange(3.0) * fill},
            {"kernel": jnp.full((3, 2), fill, jnp.bfloat16)},
        ],
        "scale": jnp.asarray(fill),
        "count": np.arange(4) * int(fill),
        "rate": np.float64(fill),
    }


def same(got: Any, wanted: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype and isinstance(one, type(other))
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_other_ranks_load_what_some_have_saved(tmp_path: Path, asynchronous: bool) -> None:
    world, path = mj.init(), shared(tmp_path) / "run"
    float_params = params()["layers"][0]
    optimizer = mj.zero(optax.adam(1e-2))
    state = optimizer.init(float_params)
    gradients = jax.tree.map(lambda p: p * 0.5 + 1, float_params)
    for _ in range(2):
        _, state = optimizer.update(gradients, state, float_params)
    key = jax.random.key(3)
    saved = {"params": params(), "run": {"state": state, "key": key, "step": 7, "name": "a"}}
    pending = mj.save(path, **saved, asynchronous=asynchronous)
    if pending is not None:
        pending.wait()
    whole = mj.whole_state(state)
    few = world.split(world.rank % 2)
    assert few is not None
    other = mj.zero(optax.adam(1e-2), world=few)
    run = {"state": other.init(float_params), "key": jax.random.key(0), "step": 0, "name": ""}
    found = mj.load(path, params=params(0.0), run=run, world=few)
    same(found["params"], params())
    assert (found["run"]["step"], found["run"]["name"]) == (7, "a")
    assert jax.random.key_data(found["run"]["key"]).tolist() == jax.random.key_data(key).tolist()
    same(mj.whole_state(found["run"]["state"], world=few), whole)
    # It goes on as it would have.
    expected, _ = optimizer.update(gradients, state, float_params)
    updates, _ = other.update(gradients, found["run"]["state"], float_params)
    same(updates, expected)


@pytest.mark.parallel([1, 2])
def test_models_of_torch_and_back(tmp_path: Path) -> None:
    world, folder = mj.init(), shared(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    wanted = {name: value.numpy() for name, value in model.state_dict().items()}
    mz.save(folder / "torch", model=model)
    like = {"dense": [{k: jnp.zeros(wanted[f"{i}.{k}"].shape) for k in ("weight", "bias")}
                      for i in range(2)]}  # fmt: skip
    found = mj.load(folder / "torch", model=like, rename=lambda name: name.removeprefix("dense."))
    for number, layer in enumerate(found["model"]["dense"]):
        for name, value in layer.items():
            np.testing.assert_array_equal(value, wanted[f"{number}.{name}"])
    mj.save(folder / "jax", model=found["model"]["dense"])
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    mz.load(folder / "jax", model=other)
    for name, value in other.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), wanted[name])
    world.barrier()


@pytest.mark.parallel([1, 2])
def test_trees_that_do_not_fit_are_refused_on_all_ranks(tmp_path: Path) -> None:
    path = shared(tmp_path) / "run"
    mj.save(path, params={"a": jnp.ones((2, 3)), "b": jnp.ones(2)}, step=3)
    right = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(2)}
    for like, said in (
        ({**right, "a": jnp.zeros((3, 2))}, r"'a' as float32, shape \(3, 2\).*\(2, 3\)"),
        ({**right, "a": jnp.zeros((2, 3), jnp.int32)}, "'a' as int32.*float32"),
        ({**right, "c": jnp.zeros(1)}, r"with \['c'\]"),
        ({"a": right["a"]}, r"without \['b'\]"),
        ({**right, "a": 3}, "'a' as 3.*"),
    ):
        with pytest.raises(mj.ArgumentError, match=said):
            mj.load(path, params=like)
    only = mj.load(path, params={"a": right["a"]}, strict=False)
    assert float(only["params"]["a"].sum()) == 6.0
    with pytest.raises(mj.ArgumentError, match="other"):
        mj.load(path, other=right)
    with pytest.raises(mj.ArgumentError, match="pickle"):
        mj.save(path, params={"f": object()})
    with pytest.raises(mj.ArgumentError, match=r"two leaves named 'a\.b'"):
        mj.save(path, params={"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
    assert mj.load(path, step=0) == {"step": 3}
