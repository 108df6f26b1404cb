"""``mpizero exec``: run a program that knows nothing of mpizero, on every rank of a job."""

from __future__ import annotations

import importlib
import importlib.util
import os
import runpy
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import click

import mpizero
from mpizero.errors import MpizeroError


@click.command(
    "exec",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("-m", "--module", is_flag=True, help="PROGRAM is a module, as of `python -m`.")
@click.option(
    "--keep-backends", is_flag=True,
    help="Let the program have gloo or NCCL where it names them.",
)  # fmt: skip
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def execute(module: bool, keep_backends: bool, program: str, arguments: tuple[str, ...]) -> None:
    """Run PROGRAM as torchrun would, on the ranks of an MPI job.

    \b
    mpirun -n 8 mpizero exec train.py --epochs 3

    It finds RANK, WORLD_SIZE, LOCAL_RANK and their kin in its environment, and its process groups
    run over MPI: the backend is "mpizero", whether it names none, gloo or nccl.
    """
    if not module and not Path(program).exists():
        raise click.ClickException(f"there is no file {program!r} (for a module: -m)")
    try:
        _prepare(keep_backends)
    except MpizeroError as error:
        raise click.ClickException(str(error)) from None
    _run(program, module, arguments)


def _prepare(keep_backends: bool) -> None:
    """The framework is the adapter's business: it is found by name, where there is one."""
    if importlib.util.find_spec("torch") is None:
        mpizero.init()
        return
    adapter: Any = importlib.import_module("mpizero_torch.script")
    adapter.prepare(keep_backends=keep_backends)


def _run(program: str, module: bool, arguments: tuple[str, ...]) -> None:
    sys.argv = [program, *arguments]
    # In the place of the command's own folder: the program's, as python does it.
    sys.path[0] = os.getcwd() if module else os.fspath(Path(program).resolve().parent)
    try:
        if module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program, run_name="__main__")
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        # Here, for click takes some of them for its own; and without the frames of the command.
        sys.excepthook(type(error), error, _of_program(error.__traceback__))
        sys.exit(1)


def _of_program(where: TracebackType | None) -> TracebackType | None:
    """From the program's first frame on; all of it, if there is none."""
    at = where
    ours = (__file__, runpy.__file__, "<frozen runpy>")
    while at is not None and at.tb_frame.f_code.co_filename in ours:
        at = at.tb_next
    return at or where
