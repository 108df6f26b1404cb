"""The documentation can be believed: its blocks run, its links lead somewhere, no name is missing.

``support.documents`` says what is run of a page, ``support.reader`` runs it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

import mpizero
import mpizero_torch
from support.documents import Block, Page, PageError, blocks, read_page
from support.launch import ROOT, launch_environment, mpirun

pytestmark = pytest.mark.once

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What the other one needs is not always there; tests/test_frameworks.py reads it.
NAMES = [str(page.relative_to(ROOT)) for page in PAGES if page.stem != "frameworks"]

_NUMBER = re.compile(r"-?\d+\.\d+")


class Readings:
    """What two launches, on two ranks and on one, have made of all pages that can be read."""

    def __init__(self, folder: Path) -> None:
        self.pages: dict[str, Page] = {}
        self.why: dict[str, str] = {}  # a page went wrong
        self.printed: dict[str, dict[int, str]] = defaultdict(dict)
        for name in NAMES:
            try:
                self.pages[name] = read_page(ROOT / name)
            except PageError as error:
                self.why[name] = str(error)
        plan = folder / "plan.json"
        plan.write_text(json.dumps({name: page.steps for name, page in self.pages.items()}))
        reader = ["-m", "support.reader", str(plan), str(folder)]
        env = {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'adapters'}:{ROOT / 'tests'}",
            "MPIZERO_TUNING": str(folder / "tuning.json"),
        }
        self._look(folder, 2, mpirun(2, reader, timeout=110, env=env).stderr)
        alone = subprocess.run(
            [sys.executable, *reader], env=launch_environment(env), timeout=110, check=False,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._look(folder, 1, alone.stderr)

    def _look(self, folder: Path, ranks: int, stderr: str) -> None:
        """Take down what a launch has printed, and where it stopped."""
        read = set(self.why)
        notes = folder / f"read-{ranks}.jsonl"
        for line in notes.read_text().splitlines() if notes.exists() else ():
            note = json.loads(line)
            read.add(note["page"])
            for at, text in note["printed"].items():
                before = self.printed[note["page"]].get(int(at), "")
                self.printed[note["page"]][int(at)] = before + text
        for path in folder.glob(f"failed-{ranks}-*.json"):
            failed = json.loads(path.read_text())
            read.add(failed["page"])
            said = f"on {ranks} rank(s), the block at line {failed['line']}:\n{failed['why']}"
            self.why[failed["page"]] = self.why.get(failed["page"], "") + said
        for name in self.pages:
            if name not in read:
                self.why.setdefault(name, f"on {ranks} rank(s), not reached:\n{stderr[-2000:]}")


@pytest.fixture(scope="module")
def readings(tmp_path_factory: pytest.TempPathFactory) -> Readings:
    return Readings(tmp_path_factory.mktemp("documents"))


@pytest.mark.parametrize("name", NAMES)
def test_the_blocks_of_a_page_run(name: str, readings: Readings) -> None:
    if name in readings.why:
        pytest.fail(readings.why[name], pytrace=False)


@pytest.mark.parametrize("name", NAMES)
def test_commands_print_what_the_page_says(name: str, readings: Readings) -> None:
    for step in readings.pages[name].steps:
        if "prints" in step:
            printed, said = readings.printed[name].get(step["line"], ""), step["prints"]
            assert _NUMBER.sub("#", printed) == _NUMBER.sub("#", said)
            numbers = [[float(n) for n in _NUMBER.findall(text)] for text in (printed, said)]
            assert numbers[0] == pytest.approx(numbers[1], rel=0.05, abs=0.002)


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=str)
def test_links_lead_to_files(path: Path) -> None:
    text = path.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("https://", "#")):
            assert (path.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("module", [mpizero, mpizero_torch], ids=lambda module: module.__name__)
def test_the_reference_has_every_public_name(module: Any) -> None:
    text = (ROOT / "docs" / "reference" / f"{module.__name__}.rst").read_text()
    listed = re.findall(r"^\.\. auto(?:function|class|exception|module):: ([\w.]+)", text, re.M)
    shown = {name.removeprefix("mpizero.").split(".")[0] for name in listed}
    own = {n for n in module.__all__ if module is mpizero or not hasattr(mpizero, n)}
    assert sorted(own - shown) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\n1 +\n```", None),  # found when it is run
        ("```sh\nconjure spirits\n```", "nobody knows how to run 'conjure'"),
        ("```sh\nmake gold\n```", "make has no target"),
        ("```sh\nmpirun -n 2 python lost.py\n```", "there is no lost.py"),
        ("```sh\nsrun 'python\n```", "unexpected EOF"),
        ("```cobol\nSTOP RUN.\n```", "nobody knows how to run 'cobol'"),
        ("```python\n# a.py\n1\n```", "no command runs a.py"),
        ("```python\n# a.py\n1\n```\n```diff\n-2\n+3\n```", "0 places to change"),
        ("<!-- test: ignore -->\n```python\n```", "unknown test marker"),
        ("<!-- test: not run: -->\n```python\n```", "unknown test marker"),
        ("<!-- test: has torch -->\ntext", "above no block"),
        ("```python\n", "does not end"),
    ],
)
def test_what_cannot_be_run_is_an_error(text: str, said: str | None) -> None:
    def read() -> None:
        page = Page("page")
        for block in blocks(text, "page"):
            page.take(block)
        page.check()

    if said is None:
        read()
    else:
        with pytest.raises(PageError, match=re.escape(said)):
            read()


def test_diffs_make_files() -> None:
    page = Page("page")
    for block in (
        Block("page", 1, "python", "# a.py\none\n\ntwo\nthree\n"),
        Block("page", 9, "diff", " # a.py\n-one\n+1\n@@ further down\n-three\n+3\n"),
        Block("page", 15, "sh", "OMP_NUM_THREADS=1 mpirun -n 8 python a.py --fast  # all\n"),
        Block("page", 18, "text", "done\n"),
    ):
        page.take(block)
    page.check()
    assert page.steps[1]["text"] == "# a.py\n1\n\ntwo\n3\n"
    run = page.steps[2]
    assert (run["ranks"], run["arguments"], run["prints"]) == (8, ["a.py", "--fast"], "done\n")
    assert run["env"] == {"OMP_NUM_THREADS": "1"}
