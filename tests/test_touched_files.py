"""Every place that deletes, renames, makes or overwrites something on disk, and why it may.

A new place fails here until ``PLACES`` says what proves that it is ours: never a name.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.launch import ROOT

pytestmark = pytest.mark.once

# Whoever has such an attribute, called or handed on, touches files by it.
ALWAYS = {
    "unlink", "shm_unlink", "rmtree", "rmdir", "removedirs", "rename", "renames",
    "truncate", "ftruncate", "posix_fallocate", "write_text", "write_bytes", "touch", "mkdir",
    "makedirs", "mkfifo", "mknod", "symlink", "symlink_to", "hardlink_to", "copyfile", "copy2",
    "copytree", "mkdtemp", "mkstemp", "mktemp", "NamedTemporaryFile", "TemporaryFile",
    "SpooledTemporaryFile", "TemporaryDirectory", "SharedMemory", "memfd_create", "memmap",
    "open_memmap", "tofile", "savefig", "savez", "savez_compressed", "savetxt", "save_file",
    "make_archive", "unpack_archive", "extractall", "chmod", "chown", "utime",
}  # fmt: skip

# These only of modules: lists have remove(), strings replace() and arrays copy().
OF_MODULES = {"remove", "replace", "move", "link", "copy", "copyfileobj", "open", "remove_folder"}
MODULES = {"os", "shutil", "files", "io", "codecs", "gzip", "bz2", "lzma"}

# In the file layer of checkpoints (its callers have the proof), in other words.
LAYER = "one call of the file layer; whoever makes it has the proof"
OWN = "a folder that this save has made with mkdir, under a name that nothing had"
NOTED = "files that the note inside the folder lists, under the folder's own name"

# file: function: call -> what proves that it is ours
PLACES = {
    # Checkpoints: the file layer.
    "mpizero/checkpoint/files.py: create: os.open": "O_EXCL: there was nothing",
    "mpizero/checkpoint/files.py: create: os.ftruncate": "the file just made with O_EXCL",
    "mpizero/checkpoint/files.py: open_to_write: os.open": LAYER,
    "mpizero/checkpoint/files.py: write_note: os.open": "O_EXCL: there was nothing",
    "mpizero/checkpoint/files.py: write_note: os.unlink": "the file just made with O_EXCL",
    "mpizero/checkpoint/files.py: is_locked: os.open": "opens to read",
    "mpizero/checkpoint/files.py: make_folder: .mkdir": "fails where there is something",
    "mpizero/checkpoint/files.py: remove: os.unlink": LAYER,
    "mpizero/checkpoint/files.py: remove_folder: os.rmdir": LAYER + "; empty folders only",
    "mpizero/checkpoint/files.py: sync_folder: os.open": "opens to read",
    "mpizero/checkpoint/files.py: rename: .rename": LAYER,
    "mpizero/checkpoint/files.py: open_to_read: os.open": "opens to read",
    "mpizero/checkpoint/foreign.py: SafetensorsFiles.read: os.open": "opens to read",
    "mpizero/checkpoint/foreign.py: _layout: os.open": "opens to read",
    "mpizero/checkpoint/mpi_io.py: write_together: File.Open": f"a file in {OWN}",
    # Checkpoints: whose they are.
    "mpizero/checkpoint/notes.py: recover: files.rename": "its note says that very name",
    "mpizero/checkpoint/notes.py: recover: files.remove": "the note by which it was recovered",
    "mpizero/checkpoint/folder.py: Staging.__init__: .mkdir": "parents that are not there yet",
    "mpizero/checkpoint/folder.py: Staging.__init__: files.remove_folder": OWN,
    "mpizero/checkpoint/folder.py: Staging.publish: files.rename":
        f"{OWN}, to where there is nothing, or an empty folder",
    "mpizero/checkpoint/folder.py: Staging.publish: files.remove": "the note of this save",
    "mpizero/checkpoint/folder.py: Staging._exchange: files.rename":
        "three times: a checkpoint in which all is as its manifest says, and " + OWN,
    "mpizero/checkpoint/folder.py: discard: files.rename":
        "a checkpoint in which all is as its manifest says",
    "mpizero/checkpoint/folder.py: _take_apart: files.remove": NOTED,
    "mpizero/checkpoint/folder.py: _take_apart: files.remove_folder": "it is empty by then",
    "mpizero/checkpoint/folder.py: _remove_note: files.remove":
        "a note by its checksum, or without a word",
    "mpizero/checkpoint/export.py: export_safetensors: .unlink":
        "the file just made with O_EXCL, under a name drawn at random",
    # What users name.
    "mpizero/outputs.py: write: .open": "a pipe or a device, which keeps nothing",
    "mpizero/outputs.py: write: os.open": "O_EXCL: there was nothing",
    "mpizero/outputs.py: write: .chmod": "the file just made with O_EXCL",
    "mpizero/outputs.py: write: .replace":
        "over what its content shows to be an earlier output of the same kind, or nothing",
    "mpizero/outputs.py: write: .unlink": "the file just made with O_EXCL",
    "mpizero/outputs.py: put: os.link": "fails where there is something",
    "mpizero/outputs.py: put: .rename": "the caller's draft, to where nothing is",
    "mpizero/outputs.py: put: .unlink": "the caller's draft, which has its other name",
    "mpizero/cli/outputs.py: write_picture: .savefig": "into memory",
    "mpizero/collectives/tuning.py: save: .mkdir": "parents that are not there yet",
    "mpizero/diagnostics/trace.py: open_file: .mkdir": "parents that are not there yet",
    "mpizero/diagnostics/trace.py: open_file: os.open": "makes it, or leaves it as it is",
    "mpizero/diagnostics/trace.py: Tracer.__init__: .truncate":
        "its beginning shows that it is an earlier trace, or it is empty",
    # Shared memory.
    "mpizero/world/segments.py: _unlink: os.unlink":
        "that inode was made and mapped by MPI_Init on ranks that looked before and after",
    "mpizero/world/segments.py: _show: os.memfd_create": "has no name",
    "mpizero/memory/shared_file.py: _map_together: os.memfd_create": "has no name",
    "mpizero/memory/shared_file.py: _map_together: os.truncate": "the memory just made",
    "mpizero/memory/shared_file.py: _map_together: os.open": "memory of a rank of the job",
    "mpizero/diagnostics/record.py: create_record: os.memfd_create": "has no name",
    "mpizero/diagnostics/record.py: create_record: tempfile.TemporaryFile": "has no name",
    "mpizero/diagnostics/record.py: create_record: os.ftruncate": "the memory just made",
    "mpizero/diagnostics/record.py: Record.of_process: os.open": "memory called a record",
    "mpizero/diagnostics/jobs.py: Job.look: os.open": "to lock a record, which is not written",
    "mpizero/diagnostics/node.py: NodeRecords.gather: os.open": "to lock a record of the job",
    # The optimizer's state in files.
    "adapters/mpizero_torch/sharding/offload.py: StateOnDisk.__init__: .mkdir":
        "the user's folder, if it is not there yet",
    "adapters/mpizero_torch/sharding/offload.py: StateOnDisk.__init__: tempfile.mkdtemp":
        "a name that nothing had",
    "adapters/mpizero_torch/sharding/offload.py: StateOnDisk.zeros: .open":
        "exclusive: there was nothing",
    "adapters/mpizero_torch/sharding/offload.py: StateOnDisk.zeros: np.memmap":
        "the file just made",
    "adapters/mpizero_torch/sharding/offload.py: _remove: .unlink":
        "the inode that this process has made",
    "adapters/mpizero_torch/sharding/offload.py: _remove: .rmdir":
        "made by this process, and empty",
}  # fmt: skip


def found_in(source: str) -> Iterator[str]:
    """Each place as "function: call", in any order."""
    yield from _Walk().of(ast.parse(source))


class _Walk:
    def __init__(self) -> None:
        self._modes: dict[int, list[ast.expr]] = {}

    def of(self, node: ast.AST, within: tuple[str, ...] = ()) -> Iterator[str]:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            within = (*within, node.name)
        if isinstance(node, ast.Call):
            given = [*node.args, *(each.value for each in node.keywords)]
            self._modes[id(node.func)] = given
        name = self._touches(node)
        if name:
            yield f"{'.'.join(within) or 'module'}: {name}"
        for child in ast.iter_child_nodes(node):
            yield from self.of(child, within)

    def _touches(self, node: ast.AST) -> str:
        if isinstance(node, ast.ImportFrom) and node.module in MODULES | {"tempfile", "mmap"}:
            names = {each.name for each in node.names} & (ALWAYS | OF_MODULES)
            return f"from {node.module} import {', '.join(sorted(names))}" if names else ""
        if isinstance(node, ast.Name) and node.id == "open":
            return "open" if self._writes(node, 1) else ""
        if not isinstance(node, ast.Attribute):
            return ""
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        is_module = owner in MODULES or owner in ("np", "numpy", "tempfile", "torch")
        name = f"{owner if is_module else ''}.{node.attr}"
        if node.attr == "Open" and ast.unparse(node.value).endswith("File"):
            return "File.Open"
        if node.attr in ALWAYS or (node.attr in OF_MODULES - {"open"} and owner in MODULES):
            return name
        if node.attr == "open":
            return name if owner == "os" or self._writes(node, 0 if owner == "" else 1) else ""
        given = self._modes.get(id(node), [])
        if node.attr == "replace" and len(given) == 1:  # a path's; a string's has two
            return name
        if node.attr in ("save", "savez") and owner in ("np", "numpy", "torch"):
            return name
        return ""

    def _writes(self, node: ast.AST, at: int) -> bool:
        """Is a file opened to be written? Also where that cannot be seen."""
        if id(node) not in self._modes:
            return True  # handed on
        given = self._modes[id(node)]
        texts = [each.value for each in given if isinstance(each, ast.Constant)]
        modes = [each for each in texts if isinstance(each, str) and set(each) <= set("rwxabt+U")]
        if any(set(mode) & set("wxa+") for mode in modes):
            return True
        unseen = at < len(given) and not isinstance(given[at], ast.Constant)
        return unseen and isinstance(given[at], ast.Name) and "mode" in ast.unparse(given[at])


def places() -> Counter[str]:
    found: Counter[str] = Counter()
    for folder in ("mpizero", "adapters"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            found.update(f"{file}: {each}" for each in found_in(path.read_text()))
    return found


def test_each_place_has_its_proof() -> None:
    found = places()
    missing = sorted(set(found) - set(PLACES))
    assert not missing, f"say in PLACES what proves that it is ours: {missing}"
    assert not set(PLACES) - set(found), "these are there no more"
    several = {place: count for place, count in found.items() if count > 1}
    assert several == {
        "mpizero/checkpoint/folder.py: Staging._exchange: files.rename": 3,
    }  # fmt: skip


TOUCHING = {
    "os.unlink(p)": "module: os.unlink",
    "os.remove(p)": "module: os.remove",
    "p.unlink(missing_ok=True)": "module: .unlink",
    "shutil.rmtree(p)": "module: shutil.rmtree",
    "weakref.finalize(self, shutil.rmtree, p)": "module: shutil.rmtree",
    "os.rename(a, b)": "module: os.rename",
    "os.replace(a, b)": "module: os.replace",
    "a.rename(b)": "module: .rename",
    "a.replace(b)": "module: .replace",
    "shutil.move(a, b)": "module: shutil.move",
    "shutil.copy(a, b)": "module: shutil.copy",
    "os.truncate(a, 0)": "module: os.truncate",
    "os.ftruncate(3, 0)": "module: os.ftruncate",
    "f.truncate(0)": "module: .truncate",
    "p.write_text('')": "module: .write_text",
    "p.write_bytes(b'')": "module: .write_bytes",
    "open(p, 'w')": "module: open",
    "open(p, mode='ab')": "module: open",
    "open(p, mode)": "module: open",
    "p.open('wb')": "module: .open",
    "io.open(p, 'x')": "module: io.open",
    "os.open(p, flags)": "module: os.open",
    "map(open, ps)": "module: open",
    "block.shm_unlink(n)": "module: .shm_unlink",
    "SharedMemory(name, create=True).unlink()": "module: .unlink",
    "np.memmap(p, mode='w+')": "module: np.memmap",
    "np.save(p, x)": "module: np.save",
    "figure.savefig(p)": "module: .savefig",
    "x.tofile(p)": "module: .tofile",
    "MPI.File.Open(c, p)": "module: File.Open",
    "from os import unlink": "module: from os import unlink",
    "from shutil import rmtree, which": "module: from shutil import rmtree",
    "tempfile.mkstemp()": "module: tempfile.mkstemp",
    "class A:\n def f(self):\n  os.rmdir(p)": "A.f: os.rmdir",
}

HARMLESS = (
    "text.replace('a', 'b')", "items.remove(x)", "handle.remove()", "array.copy()", "open(p)",
    "open(p, 'rb')", "p.open()", "p.open('r')", "ledger.open(weight, True)", "copy.deepcopy(x)",
    "replace(view, stack=1)", "from os import path", "world.save(p)", "shutil.which(n)",
    "p.read_text()", "os.close(3)",
)  # fmt: skip


@pytest.mark.parametrize("source", TOUCHING)
def test_what_touches_files_is_found(source: str) -> None:
    assert list(found_in(source)) == [TOUCHING[source]]


def test_what_does_not_is_not() -> None:
    assert {source: list(found_in(source)) for source in HARMLESS} == {
        each: [] for each in HARMLESS
    }


def test_no_other_folder_has_code_of_ours() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {"mpizero"} and Path(ROOT, "adapters", "mpizero_torch").is_dir()
