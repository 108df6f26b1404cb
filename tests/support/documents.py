"""What a page of the documentation asks its reader to do, as steps that a test can take.

Blocks of one page follow one another as for a reader who types them. ``python`` blocks are run; one
whose first line is ``# NAME.py`` is a file. A ``diff`` changes the page's last file, or makes one.
Of ``sh`` blocks every command is run, or is known to be one that cannot be (``NOT_RUN``). A
``text`` block behind commands is what they print. In front of a block, hidden comments may say:

    <!-- test: has model, loader -->    what the reader brings along (see ``support.reader``)
    <!-- test: file train.py -->        the file that a diff of nothing makes
    <!-- test: not run: REASON -->

What is neither run nor accounted for is a PageError.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.launch import ROOT

Step = dict[str, Any]

# What a reader's machine has, and a test's has not.
NOT_RUN = {
    "apptainer": "needs Apptainer",
    "export": "a setting for the reader's shell",
    "jsrun": "needs LSF",
    "kill": "needs a job that hangs",
    "module": "needs a site's modules",
    "mpizero inspect": "needs a job that hangs",
    "pip": "would change this environment",
    "python3": "would make an environment",
    "sbatch": "needs Slurm",
    "squeue": "needs Slurm",
    "srun": "needs Slurm",
}

# Further options for what takes long: the last one given holds.
_TINY_GPT = "--steps 2 --layers 1 --heads 2 --width 16 --context 16 --sample 9 --checkpoint-every 1"
TINY = {
    "examples/train_gpt.py": [*_TINY_GPT.split(), "--text", str(ROOT / "mpizero/layout.py")],
    "examples/train_digits.py": ["--steps", "2"],
    "examples/numpy_only.py": ["--steps", "2"],
    "examples/train_lightning.py": ["--steps", "6", "--json", "lightning.json"],
    "examples/train_accelerate.py": ["--steps", "6", "--json", "accelerate.json"],
    "examples/train_trainer.py": [
        *("--steps", "6", "--json", "trainer.json", "--layers", "1", "--width", "32"),
        *("--context", "32", "--text", str(ROOT / "mpizero/api/world.py")),
    ],
    "bench": ["--to", "1K", "--seconds", "0.001"],
    "tune": ["--largest", "1024", "--seconds", "0.001"],
}

_MARKER = re.compile(r"\s*<!-- test: (.*?) -->\s*")
_FENCE = re.compile(r"( *)```(\S*)\s*")
_FILE = re.compile(r"# (\w+\.py)\n")
_ASSIGNMENT = re.compile(r"[A-Z_]+=.*")
_TARGET = re.compile(r"^([a-z]+):", re.MULTILINE)


class PageError(Exception):
    """A block that nobody could run as it stands."""


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is the number of its first line."""

    page: str
    line: int
    language: str
    text: str
    notes: Sequence[str] = ()

    def error(self, why: str) -> PageError:
        return PageError(f"{self.page}, line {self.line}: {why}")


def blocks(text: str, page: str) -> Iterator[Block]:
    """The fenced blocks of a page in Markdown."""
    notes: list[str] = []
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if marker := _MARKER.fullmatch(line):
            notes.append(marker[1])
        elif fence := _FENCE.fullmatch(line):
            inner = []
            for _, each in lines:
                if each.strip() == "```":
                    break
                inner.append(each.removeprefix(fence[1]) + "\n")
            else:
                raise PageError(f"{page}, line {number}: a block that does not end")
            yield Block(page, number + 1, fence[2], "".join(inner), tuple(notes))
            notes = []
        elif line.strip() and notes:
            raise PageError(f"{page}, line {number}: a test marker that is above no block")


@dataclass
class Page:
    """The steps of one page, in order."""

    name: str
    steps: list[Step] = field(default_factory=list)
    files: dict[str, bool] = field(default_factory=dict)  # has it been run as it stands now?

    def take(self, block: Block) -> None:
        """Add the steps of a block. Raises PageError if nobody could take them."""
        file = None
        for note in block.notes:
            kind, _, rest = note.partition(" ")
            if kind == "has":
                self._add(block, "have", names=re.split(r",\s*", rest))
            elif kind == "file":
                file = rest
            elif note.startswith("not run: ") and len(note) > len("not run: ") + 10:
                _check_syntax(block)
                return
            else:
                raise block.error(f"unknown test marker: {note}")
        if block.language == "python":
            self._take_python(block)
        elif block.language == "diff":
            self._take_diff(block, file)
        elif block.language == "sh":
            self._take_commands(block)
        elif block.language in ("", "text"):
            if self.steps and self.steps[-1]["do"] == "run" and block.language:
                self.steps[-1]["prints"] = block.text
        elif not block.language.startswith("{"):  # a directive of the page's own
            raise block.error(f"nobody knows how to run {block.language!r}")

    def check(self) -> None:
        """Raises PageError for files that no command runs."""
        for name, has_run in self.files.items():
            if not has_run:
                raise PageError(f"{self.name}: no command runs {name} as it stands in the end")

    def _add(self, block: Block, do: str, **details: Any) -> None:
        self.steps.append({"do": do, "line": block.line, **details})

    def _take_python(self, block: Block) -> None:
        if file := _FILE.match(block.text):
            self._write(block, file[1], block.text)
        else:
            self._add(block, "exec", text=block.text)

    def _write(self, block: Block, name: str, text: str) -> None:
        self.files[name] = False
        self._add(block, "write", file=name, text=text)

    def _take_diff(self, block: Block, file: str | None) -> None:
        if file is not None:
            text = "".join(after for _, after in _hunks(block))
            self._write(block, file, text)
            return
        written = [step for step in self.steps if step["do"] == "write"]
        if not written:
            self._add(block, "exec", text="".join(after for _, after in _hunks(block)))
            return
        text = written[-1]["text"]
        for before, after in _hunks(block):
            if text.count(before) != 1:
                raise block.error(f"{text.count(before)} places to change, not 1, for\n{before}")
            text = text.replace(before, after)
        self._write(block, written[-1]["file"], text)

    def _take_commands(self, block: Block) -> None:
        _check_syntax(block)
        if block.text.startswith("#!"):  # a job script: a scheduler's to run
            return
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            environment = []
            while words and _ASSIGNMENT.fullmatch(words[0]):
                environment.append(words.pop(0))
            if words:
                self._take_command(block, words, dict(each.split("=", 1) for each in environment))

    def _take_command(self, block: Block, words: list[str], environment: dict[str, str]) -> None:
        command, *rest = words
        if command == "make":
            targets = _TARGET.findall((ROOT / "Makefile").read_text())
            if not rest or rest[0] not in targets:
                raise block.error(f"make has no target {rest[:1]}")
            return
        if command in NOT_RUN or " ".join(words[:2]) in NOT_RUN:
            return
        ranks = 1
        if command in ("mpirun", "mpiexec"):
            if len(rest) < 3 or rest[0] != "-n":
                raise block.error(f"write {command} -n N PROGRAM")
            ranks, (command, *rest) = int(rest[1]), rest[2:]
        program = Path(command).name
        if program == "mpizero":
            arguments = [*rest, *TINY.get(rest[0], [])]
        elif program == "python" and rest[0].endswith(".py"):
            script = rest[0]
            if script in self.files:
                self.files[script] = True
            elif not (ROOT / script).exists():
                raise block.error(f"there is no {script}, neither here nor on the page")
            arguments = [*rest, *TINY.get(script, [])]
        else:
            raise block.error(f"nobody knows how to run {command!r}")
        self._add(
            block, "run", program=program, ranks=ranks, arguments=arguments, env=environment
        )  # fmt: skip


def read_page(path: Path) -> Page:
    """The steps of a page. Raises PageError for a block that is neither run nor accounted for."""
    page = Page(str(path.relative_to(ROOT)))
    for block in blocks(path.read_text(), page.name):
        page.take(block)
    page.check()
    return page


def _hunks(block: Block) -> Iterator[tuple[str, str]]:
    """Of a diff, what each part was and what it becomes."""
    for hunk in re.split(r"^@@.*\n", block.text, flags=re.MULTILINE):
        if hunk:
            sides: dict[str, list[str]] = {" -": [], " +": []}
            for line in hunk.splitlines(keepends=True):
                line = line if line.strip() else " \n"
                if line[0] not in " +-":
                    raise block.error(f"neither kept, nor taken away, nor added: {line}")
                for side, kept in sides.items():
                    if line[0] in side:
                        kept.append(line[1:])
            yield "".join(sides[" -"]), "".join(sides[" +"])


_CELL_MAGIC = re.compile(r"\A%%.*")  # how a notebook's cell may begin


def _check_syntax(block: Block) -> None:
    """The least that holds of a block that is not run."""
    if block.language == "python":
        compile(_CELL_MAGIC.sub("", block.text), block.page, "exec")
    elif block.language == "sh":
        found = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
        if found.returncode:
            raise block.error(found.stderr)
