"""Run the tests of this folder on 1, 2 and 4 ranks, which may share one GPU.

    python tests/gpu/run.py [--ranks 1,2,4] [-- pytest's arguments]

With the Python that it is started by, whose environment has an ``mpirun``, torch for CUDA and CuPy.
Says at once what is missing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from support.launch import find_mpirun, mpirun_command  # noqa: E402

_SECONDS = 240


def missing() -> list[str]:
    """What a machine needs for this and has not, in words."""
    found = []
    for name, why in (
        ("cupy", "CuPy: pip install 'mpizero[cuda12]' or 'mpizero[cuda13]'"),
        ("torch", "torch, built for CUDA"),
        ("mpi4py", "mpi4py"),
        ("pytest", "pytest, with mpi-pytest"),
    ):
        try:
            importlib.import_module(name)
        except Exception as error:
            found.append(f"{why} ({type(error).__name__}: {error})")
    try:
        find_mpirun(sys.executable)
    except Exception as error:
        found.append(f"an mpirun ({error})")
    if not found:
        cupy, torch = importlib.import_module("cupy"), importlib.import_module("torch")
        try:
            if cupy.cuda.runtime.getDeviceCount() == 0:
                found.append("a GPU: CuPy sees none")
        except RuntimeError as error:
            found.append(f"a GPU ({error})")
        if not torch.cuda.is_available():
            found.append(f"a GPU that torch {torch.__version__} sees")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("arguments", nargs="*", help="pytest's")
    given = parser.parse_args()
    lacking = missing()
    if lacking:
        sys.stderr.write("The tests on a GPU need\n  " + "\n  ".join(lacking) + "\n")
        return 1
    path = [str(ROOT), str(ROOT / "adapters"), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(each for each in path if each)}
    failed = 0
    for ranks in map(int, given.ranks.split(",")):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
        command += ["-m", f"gpu and parallel[{ranks}]", "tests/gpu", *given.arguments]
        if ranks > 1:
            command = [*mpirun_command(sys.executable, ranks), *command]
        sys.stdout.write(f"{ranks} ranks\n")
        sys.stdout.flush()
        try:
            status = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=_SECONDS, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
        failed |= int(status != 0)
    return failed


if __name__ == "__main__":
    sys.exit(main())
