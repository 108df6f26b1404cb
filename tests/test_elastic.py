"""Ranks die, and the others go on: in the end with the losses of a run on so many ranks.

Bit for bit, because sums are formed in a fixed order for a fixed number of ranks. The reference is
a training that is restarted from a checkpoint on disk, in a job where nobody dies.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

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
from mpizero.world.survival import refuse_without_ulfm
from support.launch import find_mpirun, is_openmpi, mpirun

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
