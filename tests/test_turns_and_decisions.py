"""One rank first, one copy a node, one decision a job."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mpizero_torch as mz
from support.placements import HERE, placed

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])


@ranks
def test_one_rank_goes_first(tmp_path: Path) -> None:
    world = mz.init()
    folder = Path(world.broadcast_object(str(tmp_path)))
    for number in range(3):
        place = folder / str(number)
        with mz.first() as goes_first:
            assert goes_first == (world.rank == 0) == (not place.exists())
            if goes_first:
                place.write_text("made")
        assert place.read_text() == "made"


@several_ranks
@pytest.mark.parametrize("on_node", [False, True])
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_is_told_to_all(on_node: bool, failing: int) -> None:
    world, entered = mz.init(), []
    turn = mz.first_on_node if on_node else mz.first
    kind = OSError if world.rank == failing else mz.MismatchError
    with pytest.raises(kind, match="the disk is full"), turn():
        entered.append(world.rank)
        if world.rank == failing:
            raise OSError("the disk is full")
    assert bool(entered) == (failing == 1 or world.rank == 0)
    world.barrier()


@several_ranks
def test_on_each_node_one_rank_goes_first() -> None:
    for placement in HERE:
        with placed(placement) as world:
            with mz.first_on_node(world=world) as goes_first:
                assert goes_first == (world.local_rank == 0)
            kind = OSError if world.rank == world.size - 1 else mz.MismatchError
            with pytest.raises(kind, match="no space"), mz.first_on_node(world=world):
                if world.rank == world.size - 1:
                    raise OSError("no space")


@ranks
@pytest.mark.parametrize(
    "value",
    [
        np.arange(24.0).reshape(2, 3, 4),
        np.array(3.0, np.float32),
        np.empty((0, 3)),
        np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        torch.arange(6).reshape(2, 3).t(),
        torch.ones(3, dtype=torch.bfloat16),
        torch.empty(0, 2),
        torch.tensor(True),
    ],
    ids=str,
)
def test_one_copy_for_a_node(value: Any) -> None:
    for placement in HERE:
        with placed(placement) as world:
            made = []

            def make(made: list[int] = made) -> Any:
                made.append(1)
                return value

            for source in (make, value if world.local_rank == 0 else None):
                found = mz.node_shared(source, world=world)
                assert type(found) is type(value) or isinstance(found, np.ndarray)
                assert found.shape == value.shape and found.dtype == value.dtype
                assert str(found) == str(value)
            assert len(made) == (world.local_rank == 0)
            if isinstance(found, np.ndarray) and found.size:
                with pytest.raises(ValueError, match="read-only"):
                    found[...] = found


@several_ranks
def test_what_one_rank_writes_the_others_read() -> None:
    world = mz.init()
    for source in (np.zeros(4), torch.zeros(4)):
        shared = mz.node_shared(source, writable=True)
        if world.rank == world.size - 1:
            shared[2] = 5
        world.barrier()
        assert shared.tolist() == [0, 0, 5, 0]
        world.barrier()


@several_ranks
def test_what_cannot_be_shared_is_refused_on_all_ranks() -> None:
    world = mz.init()

    def fail() -> None:
        raise OSError("no such file")

    kinds = (mz.ArgumentError if world.rank == 0 else mz.MismatchError, "source")
    for source, (kind, text) in (
        ([1, 2], kinds),
        (np.array([None]), kinds),
        (fail, (OSError if world.rank == 0 else mz.MismatchError, "no such file")),
    ):
        with pytest.raises(kind, match=text):
            mz.node_shared(source)


@several_ranks
@pytest.mark.filterwarnings("ignore:/dev/shm has")
def test_without_room_there_are_copies_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIZERO_SHM_FREE", "1000")
    assert mz.node_shared(np.arange(5)).tolist() == [*range(5)]
    with pytest.raises(mz.ArgumentError, match="writable"):
        mz.node_shared(np.arange(5), writable=True)


@ranks
def test_a_decision_is_rank_zeros() -> None:
    world = mz.init()
    assert mz.agree(world.rank > 0) is False
    assert mz.agree({"rank": world.rank}, root=world.size - 1) == {"rank": world.size - 1}
    assert type(mz.agree(torch.ones(2))) is torch.Tensor


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), torch.rand(()).item()


@ranks
def test_seeds_differ_between_ranks_and_weights_do_not() -> None:
    world = mz.init()
    mz.seed(7)
    drawn = world.gather_objects(draw())
    assert all(len({*each}) == world.size for each in zip(*drawn, strict=True))
    mz.seed(7, alike=True)
    assert {*world.gather_objects(draw())} == {drawn[0]}  # rank 0's, which one process draws
    torch.manual_seed(7)
    alone = torch.nn.Linear(3, 2).weight.detach()
    for stage in (None, 1, 3):
        mz.seed(7)
        model = torch.nn.Linear(3, 2)
        if stage is None:
            found = mz.DistributedDataParallel(model).module.weight
        else:
            model, _ = mz.zero(model, torch.optim.SGD(model.parameters(), 0.1), stage=stage)
            found = model.state_dict()["weight"]
        assert torch.equal(found.detach(), alone)
    with pytest.raises(mz.ArgumentError, match="number"):
        mz.seed(-1)


@ranks
def test_rank_zero_prints(capsys: pytest.CaptureFixture[str]) -> None:
    mz.print0("a", 1, sep="-")
    assert capsys.readouterr().out == ("a-1\n" if mz.init().rank == 0 else "")
