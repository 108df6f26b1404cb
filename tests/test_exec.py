"""``mpizero exec``: programs for torchrun, as they are; and torchrun's variables, by import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpizero import LaunchError
from mpizero.world.variables import others, own, say
from support.launch import ROOT, Finished, launch_environment, mpirun

PROGRAMS = ROOT / "tests" / "support" / "torch_programs"
EXEC = ["-c", "from mpizero.cli import main; main(prog_name='mpizero')", "exec"]


def execute(n: int, *arguments: str, **environ: str) -> Finished:
    return mpirun(n, [*EXEC, *arguments], env=environ, timeout=100)


def alone(program: Path, *arguments: str) -> str:
    command = [sys.executable, str(program), *arguments]
    environ = launch_environment()
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_trainer_for_torchrun_runs_as_it_is() -> None:
    program = PROGRAMS / "gpt.py"
    result = execute(2, str(program), "--steps=3", "nccl")
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)  # one line: rank 0's
    expected = json.loads(alone(program, "--steps=3"))
    assert (expected["size"], found["size"], found["backend"]) == (1, 2, "mpizero")
    assert found["argv"] == ["--steps=3", "nccl"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["losses"][0] > found["losses"][-1]


def test_a_program_may_keep_the_backend_that_it_names() -> None:
    result = execute(2, "--keep-backends", str(PROGRAMS / "gpt.py"), "--steps=3", "gloo")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["backend"] == "gloo"


def test_a_loader_with_workers_and_other_ways_to_meet() -> None:
    result = execute(2, str(PROGRAMS / "classify.py"), "--dist-url=tcp://192.0.2.1:9")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "seen 16 by 2\n" * 2


def test_a_program_that_starts_its_own_processes_is_one_of_them() -> None:
    program = str(PROGRAMS / "spawned.py")
    result = execute(3, program, "3")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["sum 6 of 3 over mpizero"] * 3
    result = execute(2, program, "3")
    assert result.returncode != 0
    assert "the program starts 3 processes, but mpirun has started 2 on this node" in result.stderr


def test_a_failing_program_ends_the_job_with_its_own_traceback(tmp_path: Path) -> None:
    program = tmp_path / "fails.py"
    program.write_text(
        "import os, torch.distributed as dist\n"
        "assert __name__ == '__main__'\n"
        "dist.init_process_group()\n"
        "if os.environ['RANK'] == '1':\n    raise EOFError('of rank 1')\n"
        "dist.barrier()\n"
    )
    result = execute(2, str(program))
    assert result.returncode != 0
    assert "[rank 1] EOFError: of rank 1" in result.stderr
    assert "fails.py" in result.stderr and "execute.py" not in result.stderr
    result = execute(1, str(tmp_path / "none.py"))
    assert result.returncode != 0 and "there is no file" in result.stderr


NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
ASKS = """
import os
import mpizero_torch as mz
{imported}
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
asked = [os.environ.get(name) for name in names]
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
address = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
mesh = init_device_mesh("cpu", (2,))
assert dist.get_backend() == dist.get_backend(mesh.get_group()) == "mpizero"
assert dist.get_default_backend_for_device("cpu") == "mpizero"
total = torch.tensor([1 + int(os.environ["RANK"])])
dist.all_reduce(total)
assert total.item() == 3
store = dist.TCPStore(address[0], int(address[1]), 2, dist.get_rank() == 0)  # one of its own
store.set(f"asked {{dist.get_rank()}}", repr(asked))
if dist.get_rank() == 0:
    for rank in range(2):
        print(store.get(f"asked {{rank}}").decode())
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("imported", ["import mpizero_torch.distributed", "mz.init()"])
def test_torchruns_variables_are_there(imported: str) -> None:
    result = mpirun(2, ASKS.format(imported=imported))
    assert result.returncode == 0, result.stderr
    expected = [[str(rank), "2", str(rank), "2", "0"] for rank in range(2)]
    assert result.stdout.splitlines() == [repr(each) for each in expected]


def test_the_variables_go_by_the_nodes_of_the_world() -> None:
    program = (
        "import os, mpizero_torch as mz\nw = mz.init()\n"
        "names = ('LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'GROUP_RANK', 'MASTER_PORT')\n"
        "every = w.gather_objects([os.environ[name] for name in names])\n"
        "if w.rank == 0:\n    print([each[:3] for each in every], len({e[3] for e in every}))\n"
    )
    result = mpirun(3, program, env={"MPIZERO_NODES": "0,1,0"})
    assert result.stdout == "[['0', '2', '0'], ['0', '1', '1'], ['1', '2', '0']] 1\n", result.stderr


@pytest.mark.parametrize("start", ["import mpizero_torch.distributed", "mz.init()"])
def test_other_ones_of_somebody_elses_are_an_error(start: str) -> None:
    program = f"import mpizero_torch as mz\n{start}\nprint('went on')\n"
    result = mpirun(2, program, env={"RANK": "0", "WORLD_SIZE": "1"})
    assert result.returncode != 0 and "went on" not in result.stdout
    assert "WORLD_SIZE=1 in the environment, but" in result.stderr
    result = mpirun(2, program, env={"WORLD_SIZE": "2"})
    assert result.returncode == 0, result.stderr


def test_what_a_rank_has_set_is_told_from_what_others_have() -> None:
    told = dict(zip(NAMES, "12120", strict=True)) | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    environ = {"HOME": "/"}
    say(environ, told, "MPI", "init()")
    assert own(environ) == told and others(environ) == {"HOME": "/", **_note(environ)}
    say(environ, told | {"RANK": "0"}, "MPI", "init()")  # a child's, which is another rank
    assert environ["RANK"] == "0" and own(environ)["RANK"] == "0"
    for changed in ({"RANK": "3"}, {"TORCHELASTIC_RUN_ID": "none"}):  # another launcher's
        theirs = environ | changed
        assert own(theirs) == {}
        if "RANK" in changed:
            with pytest.raises(LaunchError, match="RANK=3 in the environment, but MPI says RANK=0"):
                say(theirs, told | {"RANK": "0"}, "MPI", "init()")
    somebodys = {"MASTER_ADDR": "b", "MASTER_PORT": "2", "RANK": "1"}
    say(somebodys, told, "MPI", "init()")
    assert somebodys["MASTER_ADDR"] == "b" and not own(somebodys).keys() & {"MASTER_PORT", "RANK"}


def _note(environ: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith("MPIZERO_")}


def test_a_process_that_was_started_alone_gets_none() -> None:
    program = (
        "import os, mpizero_torch.distributed, mpizero_torch as mz\nmz.init()\n"
        "print(sorted({'RANK', 'WORLD_SIZE', 'MASTER_ADDR'} & set(os.environ)))\n"
    )
    environ = launch_environment()
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100)
    assert result.stdout == "[]\n", result.stderr
