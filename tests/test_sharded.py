"""Sharded state and the optimizers that work on it, against whole arrays and torch's optimizers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mpizero
from mpizero import ArgumentError, MismatchError, ShardedState, World, optim

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64]


def numbered(shapes: dict[str, tuple[tuple[int, ...], Any]]) -> dict[str, np.ndarray]:
    """Arrays whose elements all differ (as far as their dtype goes)."""
    found, start = {}, 1
    for name, (shape, dtype) in shapes.items():
        count = int(np.prod(shape, dtype=int))
        found[name] = (np.arange(start, start + count) % 211).reshape(shape).astype(dtype)
        start += count
    return found


def same(got: dict[str, Any] | None, expected: dict[str, np.ndarray]) -> bool:
    return (
        got is not None
        and got.keys() == expected.keys()
        and all(
            got[name].dtype == array.dtype
            and got[name].shape == array.shape
            and (got[name] == array).all()
            for name, array in expected.items()
        )
    )


SHAPES = st.dictionaries(
    st.sampled_from("abcdefgh"),
    st.tuples(st.lists(st.integers(0, 9), max_size=3).map(tuple), st.sampled_from(DTYPES)),
    max_size=6,
)


@ranks
@settings(max_examples=60)
@given(SHAPES)
def test_what_was_scattered_is_gathered(shapes: dict[str, Any]) -> None:
    world = mpizero.init()
    arrays = numbered(shapes)
    state = ShardedState.scatter(arrays, world)
    ordered = {name: arrays[name] for name in state.names}
    results = [same(state.gather(), ordered), same(state.allgather(ordered), ordered)]
    last = world.size - 1
    on_last = state.gather(root=last)
    results.append(same(on_last, ordered) if world.rank == last else on_last is None)
    assert all(world.gather_objects(all(results)))


@ranks
def test_every_rank_keeps_its_part_only() -> None:
    world = mpizero.init()
    state = ShardedState.scatter({"w": np.arange(1000.0), "b": np.arange(7, dtype=np.int32)}, world)
    # Aligned to 64 bytes, the padding is less than a cache line for each rank and dtype.
    assert state.nbytes <= (1000 * 8 + 64 + 7 * 4 + 64) / world.size + 2 * 64
    piece, elements = state.piece("w")
    assert (piece == np.arange(1000.0)[elements]).all()
    assert sum(world.gather_objects(piece.size)) == 1000
    piece += 1  # a view: the state changes
    whole = state.gather()
    assert whole is not None and (whole["w"] == np.arange(1000.0) + 1).all()
    with pytest.raises(ArgumentError, match="'v'"):
        state.piece("v")


@several_ranks
def test_more_ranks_than_elements() -> None:
    world = mpizero.init()
    state = ShardedState.scatter({"x": np.array(3.5)}, world)
    assert [p for p in world.gather_objects(state.piece("x")[0].size) if p] == [1]
    assert same(state.gather(), {"x": np.array(3.5)})


@several_ranks
def test_only_the_roots_values_count() -> None:
    world = mpizero.init()
    state = ShardedState.scatter({"x": np.full(50, world.rank)}, world, root=1)
    assert same(state.gather(), {"x": np.full(50, 1)})


@several_ranks
def test_arrays_that_differ_are_named() -> None:
    world = mpizero.init()
    with pytest.raises(MismatchError, match=r"rank 0: x: float64, shape \(3,\)"):
        ShardedState.scatter({"x": np.zeros(4 if world.rank else 3)}, world)


@several_ranks
def test_resharding_for_fewer_ranks() -> None:
    world = mpizero.init()
    arrays = numbered({"a": ((13, 7), np.float32), "b": ((), np.float64), "c": ((40,), np.float32)})
    state = ShardedState.scatter(arrays, world)
    ordered = {name: arrays[name] for name in state.names}
    part = world.split(0 if world.rank < world.size - 1 else None)
    smaller = state.reshard(part)
    assert (smaller is None) == (part is None)
    if smaller is not None:
        assert same(smaller.gather(), ordered)
    halves = world.split(world.rank % 2)
    again = state.reshard(halves)
    assert again is not None and same(again.gather(), ordered)


GROUPS = [{"names": ["b"], "lr": 0.05, "weight_decay": 0.0}, {"names": ["d", "a"], "lr": 0.002}]

METHODS = {
    "SGD": (optim.SGD, torch.optim.SGD, {"lr": 0.02}),
    "SGD with momentum": (
        optim.SGD,
        torch.optim.SGD,
        {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    ),
    "AdamW": (optim.AdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}


def train(world: World, method: str, dtype: Any) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """20 steps on random gradients: (ours, torch's on one process, our optimizer)."""
    ours, theirs, options = METHODS[method]
    shapes = {"a": ((5, 3), dtype), "b": ((31,), dtype), "c": ((2, 2, 9), dtype), "d": ((), dtype)}
    rng = np.random.default_rng(5)
    arrays = {name: rng.normal(size=shape).astype(dtype) for name, (shape, _) in shapes.items()}
    wide = np.float32 if np.dtype(dtype).itemsize == 2 else dtype
    tensors = {n: torch.tensor(a.astype(wide), requires_grad=True) for n, a in arrays.items()}
    groups = [{**g, "params": [tensors[n] for n in g["names"]]} for g in GROUPS]
    groups += [{"params": [tensors["c"]]}]
    reference = theirs([{k: v for k, v in g.items() if k != "names"} for g in groups], **options)
    optimizer = ours(ShardedState.scatter(arrays, world), groups=GROUPS, **options)
    for _ in range(20):
        everyone = [
            {n: rng.normal(size=a.shape).astype(dtype) for n, a in arrays.items()}
            for _ in range(world.size)
        ]
        optimizer.step(everyone[world.rank])
        for name, tensor in tensors.items():
            total = sum(np.asarray(theirs[name]).astype(wide) for theirs in everyone)
            mean = np.asarray(total / world.size, wide).astype(dtype).astype(wide)
            tensor.grad = torch.tensor(mean)
        reference.step()
    expected = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    return optimizer.parameters.gather() or {}, expected, optimizer


@ranks
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_optimizers_do_what_torchs_do(method: str, dtype: Any, tolerance: float) -> None:
    got, expected, _ = train(mpizero.init(), method, dtype)
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, rtol=tolerance, atol=tolerance)


@ranks
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_has_master_weights(dtype: Any) -> None:
    """After 20 steps still one rounding away from training in float32: not 20."""
    got, expected, _ = train(mpizero.init(), "AdamW", dtype)
    unit = 2.0**-11 if dtype == np.float16 else 2.0**-8
    for name, array in expected.items():
        error = np.abs(got[name].astype(np.float64) - array)
        assert (error <= 1.01 * unit * np.maximum(np.abs(array), 2.0**-10) + 1e-6).all()


@ranks
@pytest.mark.parametrize("dtype", [np.float64, ml_dtypes.bfloat16])
def test_state_goes_over_to_another_optimizer(dtype: Any) -> None:
    world = mpizero.init()
    _, _, first = train(world, "AdamW", dtype)
    saved = first.state_dict()
    whole = first.parameters.gather()
    assert whole is not None
    second = optim.AdamW(ShardedState.scatter(whole, world), groups=GROUPS)
    second.load_state_dict(saved)
    rng = np.random.default_rng(world.rank)
    gradients = {n: rng.normal(size=a.shape).astype(dtype) for n, a in whole.items()}
    for each in (first, second):
        each.step(gradients)
    assert same(second.parameters.gather(), first.parameters.gather() or {})
    with pytest.raises(ArgumentError, match="groups"):
        optim.AdamW(ShardedState.scatter(whole, world)).load_state_dict(saved)


@ranks
def test_what_cannot_be_optimized_is_refused() -> None:
    world = mpizero.init()
    state = ShardedState.scatter({"w": np.ones(3)}, world)
    with pytest.raises(ArgumentError, match="int64"):
        optim.SGD(ShardedState.scatter({"w": np.ones(3, np.int64)}, world))
    with pytest.raises(ArgumentError, match="'v'"):
        optim.SGD(state, groups=[{"names": ["v"]}])
    with pytest.raises(ArgumentError, match="'rate'"):
        optim.SGD(state, groups=[{"names": ["w"], "rate": 1}])
    with pytest.raises(ArgumentError, match="nothing"):
        optim.SGD(state).step({})
    with pytest.raises(ArgumentError, match=r"shape \(4,\)"):
        optim.SGD(state).step({"w": np.ones(4)})


@several_ranks
def test_what_one_rank_gets_wrong_all_hear_of() -> None:
    """Otherwise the others would wait for it in the next collective."""
    world = mpizero.init()
    state = ShardedState.scatter({"w": np.ones(30), "b": np.ones(4)}, world)
    optimizer = optim.SGD(state)
    gradients = {"w": np.ones(30), "b": np.ones(4 if world.rank else 5)}
    with pytest.raises(MismatchError if world.rank else ArgumentError, match=r"shape \(5,\)"):
        optimizer.step(gradients)
    with pytest.raises(MismatchError, match="rank 0: v"):
        state.allgather(["w"] if world.rank else ["v"])
    assert optimizer.steps == 0 and world.allreduce(1) == world.size


@ranks
def test_state_of_other_optimizers_and_shapes_is_refused() -> None:
    world = mpizero.init()
    saved = optim.SGD(ShardedState.scatter({"w": np.ones(30)}, world)).state_dict()
    with pytest.raises(ArgumentError, match="exp_avg"):
        optim.AdamW(ShardedState.scatter({"w": np.ones(30)}, world)).load_state_dict(saved)
    with pytest.raises(ArgumentError, match=r"shape \(30,\)"):
        optim.SGD(ShardedState.scatter({"w": np.ones(20)}, world)).load_state_dict(saved)


@several_ranks
def test_resharding_wants_ranks_that_hold_a_shard() -> None:
    world = mpizero.init()
    part = world.split(0 if world.rank else None)
    if part is not None:
        state = ShardedState.scatter({"x": np.ones(9)}, part)
        with pytest.raises(ArgumentError, match="target"):
            state.reshard(world)
