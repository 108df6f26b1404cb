"""Processes that a rank starts: they do not pose as it, and MPI programs among them run as ever."""

from __future__ import annotations

import ast
import os
import sys
import textwrap
from pathlib import Path

import pytest

from mpizero.world import children
from support.launch import Finished, find_mpirun, is_openmpi, launch_environment, mpirun
from support.launch import run as execute

WORKERS = """
    import torch
    from torch.utils.data import DataLoader, Dataset, TensorDataset
    import mpizero_torch as mz

    class Own(Dataset):
        def __len__(self):
            return 16
        def __getitem__(self, index):
            return torch.tensor(float(index)),

    {init}
    {guard}for _ in [0]:
        data = {data}
        loader = mz.shard(DataLoader(data, batch_size=2, num_workers=1))
        assert sum(len(x) for x, in loader) == 16 // mz.init().size
        print("trained")
"""
TENSORS = "TensorDataset(torch.arange(16.0))"


def script(folder: Path, **parts: str) -> Path:
    path = folder / "train.py"
    names = {"init": "mz.init()", "guard": "", "data": TENSORS, **parts}
    path.write_text(textwrap.dedent(WORKERS).format(**names))
    return path


def python(program: Path) -> Finished:
    """Without a launcher. Its MPI finds what it starts others with, room for them, and leave."""
    path = os.pathsep.join([os.path.dirname(find_mpirun(sys.executable)), os.environ["PATH"]])
    room = {"PATH": path, "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    room |= {"PRTE_ALLOW_RUN_AS_ROOT": "1", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return execute([sys.executable, str(program)], launch_environment(room), 60)


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_script_without_a_guard_trains_with_workers(ranks: int, tmp_path: Path) -> None:
    path = script(tmp_path)
    result = mpirun(ranks, path) if ranks else python(path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("trained") == (ranks or 1)


def test_what_such_a_script_defines_its_workers_cannot_have(tmp_path: Path) -> None:
    result = mpirun(2, script(tmp_path, data="Own()"))
    assert result.returncode != 0 and "trained" not in result.stdout
    assert "LaunchError: A loader's worker process needs 'Own' of" in result.stderr
    assert 'under `if __name__ == "__main__":`' in result.stderr


def test_a_guard_is_for_init_as_well(tmp_path: Path) -> None:
    path = script(tmp_path, guard="if __name__ == '__main__':\n  ", data="Own()")
    result = mpirun(1, path)
    assert result.returncode != 0 and "trained" not in result.stdout
    assert "LaunchError: init() was called in a child process of a rank" in result.stderr


def test_with_a_guard_workers_have_what_the_script_defines(tmp_path: Path) -> None:
    path = script(tmp_path, init="", guard="if __name__ == '__main__':\n  ", data="Own()")
    result = python(path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("trained") == 1


IMPORTING = """
    import multiprocessing, os
    from mpi4py import MPI  # every child imports this, too
    import mpizero

    def child(queue):
        queue.put((MPI.Is_initialized(), "MPI4PY_RC_INITIALIZE" in os.environ))

    def parent(queue):
        context = multiprocessing.get_context("spawn")
        own = context.Queue()
        process = context.Process(target=child, args=(own,))
        process.start()
        queue.put(own.get())
        process.join()

    if __name__ == "__main__":
        world = mpizero.init()
        for method in ("spawn", "forkserver"):
            for work in (child, parent):
                context = multiprocessing.get_context(method)
                queue = context.Queue()
                process = context.Process(target=work, args=(queue,))
                process.start()
                assert queue.get() == (False, False)
                process.join()
        world.barrier()
        print("done")
"""


def test_children_of_a_rank_that_import_mpi4py_start_no_mpi(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(IMPORTING))
    result = mpirun(2, path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done") == 2


DRIVER = """
    import os, subprocess, sys
    from multiprocessing import get_context
    from mpi4py import MPI
    import mpizero

    PLAIN = "from mpi4py import MPI; print(MPI.COMM_WORLD.allreduce(1), flush=True)"

    def launch(environ):
        command = [*{mpirun}, sys.executable, "-c", PLAIN]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["2", "2"]

    def square(x):
        return x * x

    if __name__ == "__main__":
        clean = dict(os.environ)  # of before: an MPI that has started leaves its own variables
        mpizero.init()
        assert "MPI4PY_RC_INITIALIZE" not in os.environ
        {what}
        print("done")
"""
STARTED = {
    "mpirun": "launch(clean)",
    "mpirun by a child": (
        "p = get_context('spawn').Process(target=launch, args=(clean,)); p.start(); p.join(); "
        "assert p.exitcode == 0"
    ),
    "MPI_Comm_spawn": (
        "code = 'from mpi4py import MPI; p = MPI.Comm.Get_parent(); "
        "p.gather(MPI.COMM_WORLD.rank, root=0); p.Disconnect()'; "
        "child = MPI.COMM_SELF.Spawn(sys.executable, ['-c', code], 2); "
        "assert child.gather(None, root=MPI.ROOT) == [0, 1]; child.Disconnect()"
    ),
    "MPIPoolExecutor": (
        "from mpi4py.futures import MPIPoolExecutor; pool = MPIPoolExecutor(2); "
        "assert list(pool.map(square, range(3))) == [0, 1, 4]; pool.shutdown()"
    ),
}


@pytest.mark.parametrize("what", STARTED)
def test_a_driver_starts_mpi_programs_as_ever(what: str, tmp_path: Path) -> None:
    launcher = find_mpirun(sys.executable)
    options = ["--oversubscribe"] if is_openmpi(launcher) else []
    path = tmp_path / "driver.py"
    program = textwrap.dedent(DRIVER)
    path.write_text(program.format(mpirun=[launcher, *options, "-n", "2"], what=STARTED[what]))
    result = python(path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("done\n")


@pytest.mark.once
@pytest.mark.parametrize(
    ("source", "guarded"),
    [
        ("main()", False),
        ("log = getLogger(__name__)\nmain()", False),
        ("def f():\n    if __name__ == '__main__':\n        pass\nf()", False),
        ("if __name__ == '__main__':\n    main()", True),
        ("if '__main__' == __name__: main()", True),
        ("if debug and __name__ in ('__main__',): main()", True),
        ("if __name__ != '__main__':\n    raise SystemExit\nmain()", True),
        ("__name__ == '__main__' and main()", True),
        ("match __name__:\n    case '__main__':\n        main()", True),
        ("try:\n    pass\nfinally:\n    if __name__ == '__main__': main()", True),
        ("if multiprocessing.parent_process() is None: main()", True),
        (
            "from multiprocessing import current_process\nif current_process().name == 'x': f()",
            True,
        ),
    ],
)
def test_guards_are_recognised(source: str, guarded: bool) -> None:
    assert children.has_guard(ast.parse(source)) == guarded


@pytest.mark.once
def test_the_stand_in_knows_what_the_script_defines(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text("import os.path, sys as system\nclass A:\n    b = 1\nif A: c, *d = 1, 2\n")
    stand_in = children.StandIn(children.Script("train", str(path)))
    assert stand_in.__file__ == str(path) and stand_in.__spec__.name == "train"
    for name in ("os", "system", "A", "c", "d"):
        with pytest.raises(children.LaunchError, match=f"'{name}' of .*train.py"):
            getattr(stand_in, name)
    for name in ("b", "get_ipython", "__path__"):  # what anybody may ask a main module for
        assert not hasattr(stand_in, name)
