"""Programs written for Horovod run when their import is changed, and nothing else."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import mpizero_torch as mz
import mpizero_torch.horovod as hvd
from support.launch import ROOT, find_mpirun, is_openmpi, mpirun

PROGRAMS = ROOT / "tests" / "support" / "horovod_programs"

needs_ulfm = pytest.mark.skipif(
    not is_openmpi(find_mpirun(sys.executable)), reason="only Open MPI survives a rank's death"
)
several_ranks = pytest.mark.parallel([2, 3, 4])
ranks = pytest.mark.parallel([1, 2, 3, 4])


@pytest.fixture
def initialized() -> Iterator[None]:
    hvd.init()
    yield
    hvd.shutdown()


def changed(name: str, folder: Path) -> str:
    """The program with the other import, as a file."""
    text = (PROGRAMS / name).read_text()
    theirs, ours = "import horovod.torch as hvd", "import mpizero_torch.horovod as hvd"
    assert text.count(theirs) == text.count("horovod.torch") == 1
    path = folder / name
    path.write_text(text.replace(theirs, ours))
    return str(path)


RUN_ALL = """
import runpy, sys

for program, *options in {programs}:
    sys.argv = [program, *options]
    runpy.run_path(program, run_name="__main__")
"""


def test_programs_run(tmp_path: Path) -> None:
    """A network on images, as options have it, and a benchmark: in one job, one after the other."""
    digits, synthetic = changed("digits.py", tmp_path), changed("synthetic.py", tmp_path)
    programs = [
        [digits, "--gradient-predivide-factor", "2"],
        [digits, "--use-adasum"],
        [digits, "--fp16-allreduce", "--batches-per-allreduce", "2", "--lr", "0.1"],
        [synthetic],
    ]
    done = mpirun(2, RUN_ALL.format(programs=programs), timeout=120)
    assert done.returncode == 0, done.stderr
    *trainings, count, rate = done.stdout.splitlines()
    assert len(trainings) == 3
    for each in trainings:
        found = re.fullmatch(r"loss (\S+), accuracy (\S+)", each)
        assert found is not None, each
        assert float(found[1]) < 1.0  # ln 10 = 2.3 is what guessing gives
        assert float(found[2]) > 0.7
    assert count == "Number of CPUs: 2"
    assert re.fullmatch(r"Total img/sec on 2 CPU\(s\): [\d.]+ \+-[\d.]+", rate)


def trained(sizes: list[int]) -> torch.Tensor:
    """What one process makes of the elastic program's samples; on how many ranks each step was."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    for step, size in enumerate(sizes):
        optimizer.param_groups[0]["lr"] = 0.05 * size
        optimizer.zero_grad()
        for rank in range(size):
            numbers = torch.Generator().manual_seed(100 * step + rank)
            x = torch.randn(5, 4, generator=numbers, dtype=torch.float64)
            ((model(x).squeeze(1) - x.sum(1)).square().mean() / size).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@needs_ulfm
def test_ranks_die_in_an_elastic_training(tmp_path: Path) -> None:
    """In the middle of a step, and after the update but before the commit; rank 0, too."""
    path = changed("elastic.py", tmp_path)
    done = mpirun(3, [path], timeout=120, mpi_args=["--with-ft", "ulfm"])
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == 3, done.stdout + done.stderr
    resets, seen, weights = map(ast.literal_eval, lines)
    assert resets == [2, 1]
    assert [step for step, _ in seen] == list(range(12))
    sizes = [size for _, size in seen]
    # Who dies after an update takes the step along, or not: commits are each rank's own.
    assert sizes in ([3] * 3 + [2] * 4 + [1] * 5, [3] * 3 + [2] * 5 + [1] * 4)
    torch.testing.assert_close(torch.tensor(weights, dtype=torch.float64), trained(sizes))


@several_ranks
def test_elastic_says_what_it_needs(initialized: None) -> None:
    state = hvd.elastic.ObjectState(step=0)
    with pytest.raises(mz.LaunchError, match="--with-ft ulfm"):
        hvd.elastic.run(lambda state: None)(state)


@ranks
def test_an_elastic_state_goes_back_and_is_rank_0s(initialized: None) -> None:
    rank = hvd.rank()
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    sampler = hvd.elastic.ElasticSampler(range(10), shuffle=False)
    state = hvd.elastic.TorchState(model, optimizer, sampler=sampler, step=rank, names=["a"])
    with torch.no_grad():
        model.weight.fill_(rank + 1.0)
    state.commit()
    state.step += 5
    state.names.append("b")
    with torch.no_grad():
        model.weight.fill_(7.0)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state.restore()
    assert (state.step, state.names, state.model.weight[0, 0].item()) == (rank, ["a"], rank + 1)
    assert not optimizer.state_dict()["state"]
    sampler.record_batch(0, 1)
    state.sync()
    assert (state.step, model.weight[0, 0].item()) == (0, 1.0)
    assert sampler.processed_indices == set(range(hvd.size()))  # of all ranks
    assert hvd.allgather_object(len(sampler)) == [-(-(10 - hvd.size()) // hvd.size())] * hvd.size()


@ranks
def test_an_elastic_sampler_deals_what_is_left(initialized: None) -> None:
    size = hvd.size()
    sampler = hvd.elastic.ElasticSampler(list(range(23)), shuffle=True, seed=4)
    seen = hvd.allgather_object(list(sampler))
    assert {i for each in seen for i in each} == set(range(23))
    assert {len(each) for each in seen} == {-(-23 // size)} == {len(sampler)}
    sampler.set_epoch(1)
    assert size > 2 or list(sampler) != seen[hvd.rank()]
    sampler.record_batch(0, 2)
    done = {i for each in hvd.allgather_object(list(sampler)[:2]) for i in each}
    sampler.take_over(hvd.allgather_object(sampler.state_dict()))
    left = {i for each in hvd.allgather_object(list(sampler)) for i in each}
    assert left == set(range(23)) - done
    again = hvd.elastic.ElasticSampler(list(range(23)), shuffle=True, seed=4)
    again.load_state_dict(sampler.state_dict())
    assert list(again) == list(sampler)
