"""Child processes that ``multiprocessing`` starts from a rank must not pose as that rank.

They are fresh Pythons that have inherited the launcher's variables. Importing ``mpi4py.MPI``, which
any module that they import may do, would start MPI as a second process of the same rank: MPICH ends
the job then, and Open MPI waits for ever. So a line before their program tells them. There is
nothing in the environment, by which it would also be told to MPI programs that a rank starts, by
``mpirun``, MPI_Comm_spawn or ``mpi4py.futures``.

The line also keeps a loader's workers from running a script again that has no
``if __name__ == "__main__":``. Python lets a child import the script, for the classes in it, which
would start the training once more; so an empty module stands in for the script.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import sys
import tokenize
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from multiprocessing import process, spawn
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from mpizero.errors import LaunchError

# How the programs begin of those who run what a rank gives them.
_SPAWNED, _FORK_SERVER = "from multiprocessing.spawn ", "from multiprocessing.forkserver "

_LINE = (
    "import sys; sys.path.insert(0, {root!r}); from mpizero.world import children; "
    "del sys.path[0]; children.begin({of_rank!r}, {script!r})\n"
)

# By these a script knows, too, whether it is the program or is imported by a child of it.
_OTHER_GUARDS = frozenset({"parent_process", "current_process"})

_INNER = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda


class Script(NamedTuple):
    """The program's main module, as multiprocessing names it to children, and its file."""

    module: str | None  # of `python -m module`
    path: str


_stock: Any = None  # multiprocessing's way to start a Python, once ours is in its place
_of_rank = False  # are this process's children a rank's?
_is_child = False
_runs_scripts = True


def guard_children(of_rank: bool) -> None:
    """From here on the Pythons that multiprocessing starts are told whose children they are."""
    global _stock, _of_rank
    _of_rank = _of_rank or of_rank
    if _stock is None:
        from multiprocessing import util

        started: Any = util
        _stock, started.spawnv_passfds = started.spawnv_passfds, _start  # there is no hook


def leave_scripts_alone() -> None:
    """Workers of the fork server do not run this process's script again, if it has no guard.

    For a fork server that does not run yet.
    """
    global _runs_scripts
    _runs_scripts = False
    guard_children(False)


def is_child() -> bool:
    """Has multiprocessing started this process? (Also while it imports the script.)"""
    importing = getattr(process.current_process(), "_inheriting", False)
    return _is_child or bool(importing) or multiprocessing.parent_process() is not None


def begin(of_rank: bool, script: tuple[str | None, str] | None) -> None:
    """In a new child: what the line before its program says."""
    global _is_child
    _is_child = True
    guard_children(of_rank)
    if of_rank:
        import mpi4py

        mpi4py.rc.initialize = False
    if script is not None:
        sys.modules["__main__"] = sys.modules["__mp_main__"] = StandIn(Script(*script))


def _start(path: Any, arguments: Sequence[Any], passed: Any) -> Any:
    """``multiprocessing.util.spawnv_passfds``, with our line in the program."""
    listed = list(arguments)
    at = listed.index("-c") + 1 if "-c" in listed[:-1] else 0
    program = listed[at]
    if at and isinstance(program, str) and program.startswith((_SPAWNED, _FORK_SERVER)):
        leaves = program.startswith(_FORK_SERVER) and not _runs_scripts
        script = unguarded_script() if leaves else None
        if _of_rank or script is not None:
            root = os.fspath(Path(__file__).parents[2])
            told = None if script is None else tuple(script)
            listed[at] = _LINE.format(root=root, of_rank=_of_rank, script=told) + program
    return _stock(path, listed, passed)


def unguarded_script() -> Script | None:
    """The script that children would import, and so run again as it is; None if there is none."""
    data = spawn.get_preparation_data("")
    module, path = data.get("init_main_from_name"), data.get("init_main_from_path")
    if module is not None:
        if module.rpartition(".")[2] == "__main__":  # which Python leaves alone
            return None
        path = getattr(sys.modules["__main__"], "__file__", None)
    tree = None if path is None else _parse(path)
    if tree is None or has_guard(tree):
        return None
    return Script(module, str(path))


def has_guard(tree: ast.Module) -> bool:
    """Does a script find out whether it is the program, or imported by a child of it?"""
    return any(map(_is_guard, _of_module(tree)))


def _parse(path: str) -> ast.Module | None:
    try:
        with tokenize.open(path) as file:
            return ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):
        return None


def _of_module(tree: ast.AST) -> Iterator[ast.AST]:
    """What is run when a module is imported: not what is within functions and classes."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, _INNER):
            yield from _of_module(node)


def _is_guard(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare | ast.Match):
        asked = node if isinstance(node, ast.Compare) else node.subject
        return any(isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(asked))
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
    return name in _OTHER_GUARDS


def _names(tree: ast.Module) -> Iterator[str]:
    """What a module defines."""
    for node in _of_module(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.alias):
            yield node.asname or node.name.partition(".")[0]


class StandIn(ModuleType):
    """``__main__`` in a worker, where the script has not been run."""

    def __init__(self, script: Script) -> None:
        super().__init__("__main__")
        # By these multiprocessing takes the script for one that has been imported already.
        self.__file__ = script.path
        self.__spec__ = None if script.module is None else ModuleSpec(script.module, None)
        tree = _parse(script.path)
        self._names = frozenset() if tree is None else frozenset(_names(tree))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._names:
            raise AttributeError(f"module '__main__' has no attribute {name!r}")
        raise LaunchError(
            f"A loader's worker process needs '{name}' of {self.__file__}, which it has not run: "
            "the script would begin the training anew. Put what starts the training under "
            f"`if __name__ == \"__main__\":`, or move '{name}' to a module that it imports."
        )
