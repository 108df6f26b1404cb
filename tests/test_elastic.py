"""Ranks die, and the others go on: in the end with the losses of a run on so many ranks.

Bit for bit, because sums are formed in a fixed order for a fixed number of ranks. The reference is
a training that is restarted from a checkpoint on disk, in a job where nobody dies.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic_campaign import (
    ULFM,
    Training,
    WrongError,
    compare,
    config,
    draw,
    expected,
    judge,
    read,
    run,
    start,
)
from mpizero import LaunchError, RankDiedError
from mpizero.checkpoint import Part, Piece, TensorSpec
from mpizero.elastic.store import Store, data_start
from mpizero.world.survival import refuse_without_ulfm
from support.launch import find_mpirun, is_openmpi, mpirun
from support.placements import HERE, Placement, placed

CAMPAIGN_RUNS = 2

needs_ulfm = pytest.mark.skipif(
    not is_openmpi(find_mpirun(sys.executable)), reason="only Open MPI survives a rank's death"
)


def kill(step: int, moment: str, *ranks: int) -> dict[str, Any]:
    return {"step": step, "moment": moment, "ranks": list(ranks)}


STAGES = [
    Training(3, 0, [kill(3, "backward", 0), kill(6, "between", 2)], thread=True, steps=9),
    Training(3, 1, [kill(3, "between", 0), kill(6, "update", 2)], share=False, steps=9),
    Training(3, 2, [kill(3, "update", 2), kill(8, "backward", 0)], every=3, steps=9),
    Training(3, 3, [kill(3, "commit", 1), kill(6, "backward", 2)], share=False, steps=9),
]
SEGMENTS = [[0, 3], [3, 2], [6, 1]]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[int, str]], Path]:
    """The losses at every stage, and a folder with what was saved."""
    folder = tmp_path_factory.mktemp("references")
    return expected(STAGES, SEGMENTS, 12, folder), folder


@needs_ulfm
@pytest.mark.parametrize("training", STAGES, ids=lambda each: f"stage {each.stage}")
def test_to_the_last_rank(
    training: Training, references: tuple[list[dict[int, str]], Path], tmp_path: Path
) -> None:
    """One after the other: rank 0, the last one, the one between; inside steps and between them.

    A commit that a rank dies in, or every third step only: then back to the one before.
    """
    life = run(training, tmp_path)
    assert life.segments == SEGMENTS
    assert {batch for *_, batch in life.begins} == {12}
    assert life.done[1:4] == ["7", "8", "9"]  # a value of the state
    compare(training, life, references[0][training.stage])


@needs_ulfm
def test_two_at_once_who_are_a_whole_node(tmp_path: Path) -> None:
    kills = [kill(4, "backward", 0, 1)]
    training = Training(4, 3, kills, redundancy=1, ranks_per_node=2, steps=7)
    assert judge(training, tmp_path).segments == [[0, 4], [4, 2]]


@needs_ulfm
@pytest.mark.parametrize("redundancy", [0, 1])
def test_replicas_go_on_with_one_node_when_all_others_die_at_once(
    redundancy: int, tmp_path: Path
) -> None:
    """Lost are only the random numbers of ranks that there are no more."""
    kills = [kill(4, "backward", 1, 2)]
    training = Training(3, 0, kills, redundancy=redundancy, ranks_per_node=1, steps=7)
    assert judge(training, tmp_path).segments == [[0, 3], [4, 1]]


@needs_ulfm
def test_a_node_without_copies_takes_its_part_along(
    references: tuple[list[dict[int, str]], Path], tmp_path: Path
) -> None:
    """To the last checkpoint, if there is one; else it is an error that says what to do."""
    training = Training(2, 2, [kill(5, "between", 1)], ranks_per_node=1, steps=8)
    with pytest.raises(WrongError, match="redundancy=1 keeps a copy"):
        judge(training, tmp_path)
    log = tmp_path / "log-with-checkpoint"
    saved = str(references[1] / "reference-2" / "step-00000003")
    settings = {"log": str(log), "kills": training.kills, "checkpoints": saved}
    ended = start(training, config(training, settings), ULFM)
    assert ended.returncode == 0, ended.stderr
    assert [begin[:2] for begin in read(log).begins] == [[3, 2], [3, 1]]
    assert sorted(read(log).losses) == list(range(3, 8))


@needs_ulfm
@pytest.mark.parametrize("number", range(CAMPAIGN_RUNS))
def test_a_short_campaign(number: int, tmp_path: Path) -> None:
    life = judge(draw(number, seed=1), tmp_path)
    assert life.done


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("redundancy", [0, 1])
@pytest.mark.parametrize("placement", HERE, ids=str)
def test_commits_are_on_the_node_and_on_another(placement: Placement, redundancy: int) -> None:
    names = placement.node_of
    with placed(placement) as world:
        store = Store(world, 1, redundancy)
        for number in (1, 2, 3):
            specs = [TensorSpec("x", np.dtype(np.int64), (world.size * 100,))]
            own = np.arange(100) + 1000 * world.rank + number
            part = Part("all", specs, [Piece("x", 100 * world.rank, own)])
            store.commit([part], {"number": number})
            found: dict[int, list[int]] = {}  # ranks by commit
            for (_, commit), rank, slot in store.found():
                (piece,) = slot.index().pieces
                assert piece[:4] == ("all", "x", 100 * rank, 100)
                start = data_start(int(slot.memory[:64].view(np.int64)[1])) + piece[4]
                values = slot.memory[start : start + 800].view(np.int64)
                assert (values == np.arange(100) + 1000 * rank + commit).all()
                found.setdefault(commit, []).append(rank)
            everyones = world.gather_objects(found)
            mine = [rank for rank in range(world.size) if names[rank] == names[world.rank]]
            for commit in {number, max(1, number - 1)}:
                assert set(mine) <= set(found[commit])
                readers = [
                    {names[reader] for reader, its in enumerate(everyones) if rank in its[commit]}
                    for rank in range(world.size)
                ]
                wanted = 1 + (redundancy and len({*names}) > 1)
                assert [len(nodes) for nodes in readers] == [wanted] * world.size
            world.barrier()  # before anybody writes to these slots again


LOST_NODE = """
import os
import numpy as np
import mpizero
from mpizero.checkpoint import Part, Piece, TensorSpec
from mpizero.elastic import Keeper, elastic

COUNT = 1200
world = mpizero.init(elastic=True)
me, nodes = world.rank, world.nodes

class State:
    keeper, step = Keeper(redundancy=1), 0

    def begin(self, world):
        self.world, each = world, COUNT // world.size
        own = slice(each * world.rank, each * (world.rank + 1))
        self.start, self.own = own.start, np.arange(own.start, own.stop)
        found = self.keeper.begin(world, lambda part, name: True)
        if found is not None:
            found.borrow("all", "x", own)
            found.fetch(world)
            self.own, self.step = found.borrow("all", "x", own), found.values["step"]

    def leave(self):
        pass

    def commit(self):
        specs = [TensorSpec("x", np.dtype(np.int64), (COUNT,))]
        parts = [Part("all", specs, [Piece("x", self.start, self.own)])]
        self.keeper.commit(parts, {"step": self.step})

@elastic
def train(state):
    while state.step < 6:
        if state.step == 3 and me in (1, 2):
            os.kill(os.getpid(), 9)
        state.own = state.own * 2 + int(state.world.allreduce(1.0, "mean"))
        state.step += 1
        state.commit()
    return state.world.allgather(state.own)

found = train(State())
expected = np.arange(COUNT)
for _ in range(6):
    expected = expected * 2 + 1
assert (found == expected).all()
print(f"rank {me}: {nodes} then {mpizero.init().nodes}", flush=True)
"""


@needs_ulfm
def test_a_node_is_lost_whose_ranks_stand_between_those_of_the_other() -> None:
    result = mpirun(4, LOST_NODE, env={"MPIZERO_NODES": "A,B,B,A"}, mpi_args=ULFM)
    for rank in (0, 3):
        told = f"rank {rank}: ((0, 3), (1, 2)) then ((0, 1),)"
        assert told in result.stdout, result.stderr


USER_ERROR = """
import os, sys, time
import numpy as np
import mpizero
from mpizero.elastic import elastic

class State:
    def begin(self, world): self.world = world
    def leave(self): pass

world = mpizero.init(elastic=True)
first = world.rank
@elastic
def train(state):
    for step in range(10 ** 9):
        state.world.allreduce(np.ones(1000))
        if step == 20 and first == 1:
            {leave}
train(State())
"""


@needs_ulfm
@pytest.mark.parametrize("per_node", ["", "2"])
def test_an_exception_still_ends_the_job(per_node: str) -> None:
    program = USER_ERROR.format(leave="raise ValueError('the rate is negative')")
    result = mpirun(3, program, env={"MPIZERO_RANKS_PER_NODE": per_node}, mpi_args=ULFM)
    assert result.returncode != 0
    assert "[rank 1] ValueError: the rate is negative" in result.stderr
    assert "going on" not in result.stderr
    assert result.stderr.count("Traceback (most recent call last)") == 1


@needs_ulfm
def test_a_failing_exit_still_ends_the_job() -> None:
    result = mpirun(3, USER_ERROR.format(leave="sys.exit(3)"), mpi_args=ULFM)
    assert result.returncode == 3
    assert "going on" not in result.stderr


@needs_ulfm
def test_without_the_decorator_a_death_is_an_error_that_tells_so() -> None:
    program = """
        import os
        import numpy as np
        import mpizero
        world = mpizero.init(elastic=True)
        try:
            for step in range(10 ** 9):
                if step == 20 and world.rank == 1:
                    os.kill(os.getpid(), 9)
                world.allreduce(np.ones(1000), asynchronous=True).wait()
        except mpizero.RankDiedError:
            print("noticed", flush=True)
            os._exit(0)
    """
    result = mpirun(3, program, env={"MPIZERO_PROGRESS": "thread"}, mpi_args=ULFM)
    assert result.stdout.count("noticed") == 2, result.stderr


def test_asking_for_it_where_it_cannot_be_is_an_error_with_the_remedy() -> None:
    program = "import mpizero\nmpizero.init(elastic=True)\n"
    result = mpirun(2, program)
    assert result.returncode != 0
    assert "LaunchError: init(elastic=True): this" in result.stderr
    assert "mpirun --with-ft ulfm" in result.stderr


def test_one_process_needs_no_such_mpi() -> None:
    program = """
        import mpizero_torch as mz
        world = mz.init(elastic=True)
        assert mz.init() is world and not world.survives
        state = mz.ElasticState(lambda world: {"loss": 3}, step=0)
        @mz.elastic
        def train(state):
            state.step += state.loss
            state.commit()
            return state.step
        assert train(state) == 3 and state.committed_bytes == 0
        print("done")
    """
    assert "done" in mpirun(1, program).stdout


@pytest.mark.once
@pytest.mark.parametrize(
    ("library", "environ", "verbs", "wrong"),
    [
        ("MPICH Version: 5.0.2", {}, True, "MPICH"),
        ("Open MPI v5.0.11", {}, True, "without fault tolerance"),
        ("Open MPI v5.0.11", {"OMPI_MCA_mpi_ft_enable": "0"}, True, "OMPI_MCA_mpi_ft_enable=1"),
        ("Open MPI v5.0.11", {"OMPI_MCA_mpi_ft_enable": "1"}, False, "mpi4py>=4.1"),
    ],
)
def test_what_lacks_is_named(
    library: str, environ: dict[str, str], verbs: bool, wrong: str
) -> None:
    with pytest.raises(LaunchError, match=wrong):
        refuse_without_ulfm(library, environ, verbs)
    refuse_without_ulfm("Open MPI v5.0.11", {"OMPI_MCA_mpi_ft_enable": "1"}, True)


@pytest.mark.once
def test_the_error_is_one_of_ours() -> None:
    assert issubclass(RankDiedError, RuntimeError)


@pytest.mark.once
def test_a_draw_is_that_of_its_number_and_somebody_always_lives() -> None:
    for number in range(200):
        training = draw(number, 0)
        assert draw(number, 0) == training
        dead = {rank for each in training.kills for rank in each["ranks"]}
        assert dead and len(dead) < training.ranks
