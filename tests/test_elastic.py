"""Ranks die, and the others go on: in the end with the losses of a run on so many ranks.

Bit for bit, because sums are formed in a fixed order for a fixed number of ranks. The reference is
a training that is restarted from a checkpoint on disk, in a job where nobody dies.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import elastic_campaign
from elastic_campaign import Life, Training, draw, judge, read
from mpizero import LaunchError, RankDiedError
from mpizero.world.survival import refuse_without_ulfm
from support.launch import find_mpirun, is_openmpi, mpirun

ULFM = ("--with-ft", "ulfm")
CAMPAIGN_RUNS = 3

needs_ulfm = pytest.mark.skipif(
    not is_openmpi(find_mpirun(sys.executable)), reason="only Open MPI survives a rank's death"
)


def kill(step: int, moment: str, *ranks: int) -> dict[str, Any]:
    return {"step": step, "moment": moment, "ranks": list(ranks)}


def check(training: Training, segments: list[list[int]], folder: Path) -> Life:
    """Run it and the reference, and see that it went through these steps with so many ranks."""
    life = judge(training, folder)
    assert life.segments == segments
    assert {batch for *_, batch in life.begins} == {4 * training.ranks}
    assert life.done[1:4] == [str(training.steps - 2 + at) for at in range(3)]  # a value
    return life


@needs_ulfm
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_to_the_last_rank(stage: int, tmp_path: Path) -> None:
    """One after the other: rank 0, the last one, another; inside steps and between them."""
    moments = ("backward", "between", "update") if stage % 2 else ("update", "commit", "backward")
    kills = [kill(3, moments[0], 0), kill(6, moments[1], 3), kill(8, moments[2], 1)]
    share = False if stage == 3 else None
    training = Training(4, stage, kills, share, thread=stage > 1, steps=12)
    check(training, [[0, 4], [3, 3], [6, 2], [8, 1]], tmp_path)


@needs_ulfm
@pytest.mark.parametrize(
    ("stage", "moment", "thread"), [(0, "between", True), (3, "backward", False)]
)
def test_two_at_once(stage: int, moment: str, thread: bool, tmp_path: Path) -> None:
    training = Training(4, stage, [kill(5, moment, 0, 2)], thread=thread, steps=10)
    check(training, [[0, 4], [5, 2]], tmp_path)


@needs_ulfm
def test_back_to_the_last_commit_where_not_every_step_is_committed(tmp_path: Path) -> None:
    training = Training(3, 2, [kill(5, "update", 2)], every=3, steps=10)
    check(training, [[0, 3], [3, 2]], tmp_path)


@needs_ulfm
def test_a_whole_node_dies_and_another_has_its_copy(tmp_path: Path) -> None:
    kills = [kill(4, "backward", 0, 1)]
    training = Training(4, 3, kills, redundancy=1, ranks_per_node=2, steps=8)
    check(training, [[0, 4], [4, 2]], tmp_path)


@needs_ulfm
def test_a_node_without_copies_takes_its_part_along(tmp_path: Path) -> None:
    training = Training(3, 2, [kill(4, "backward", 0)], ranks_per_node=1, steps=8)
    with pytest.raises(elastic_campaign.WrongError, match="redundancy=1 keeps a copy"):
        judge(training, tmp_path)


@needs_ulfm
def test_a_checkpoint_is_the_last_resort(tmp_path: Path) -> None:
    """Of step 0, from a job before this one, whose commits are lost with a node."""
    before = Training(2, 2, [], steps=3)
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "saved").mkdir()
    settings = {"log": str(tmp_path / "log-before"), "segments": [[0, 2]], "batch": 8}
    ended = elastic_campaign.start(
        before, {**settings, "folder": str(tmp_path / "before" / "saved")}
    )
    assert ended.returncode == 0, ended.stderr
    training = Training(2, 2, [kill(5, "between", 1)], ranks_per_node=1, steps=8)
    log = tmp_path / "log"
    checkpoint = str(tmp_path / "before" / "saved")
    kills = {"log": str(log), "kills": training.kills, "checkpoints": checkpoint}
    ended = elastic_campaign.start(training, kills, ULFM)
    assert ended.returncode == 0, ended.stderr
    life = read(log)
    assert [begin[:2] for begin in life.begins] == [[3, 2], [3, 1]]
    assert sorted(life.losses) == list(range(3, 8))


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
    for thread in ("thread", "inline"):
        result = mpirun(3, program, env={"MPIZERO_PROGRESS": thread}, mpi_args=ULFM)
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
