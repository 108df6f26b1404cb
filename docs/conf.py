"""How Sphinx builds these pages: `make docs`. Warnings are errors there."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "adapters")]

import mpizero  # noqa: E402

project = "mpizero"
copyright = "the authors of mpizero"
release = version = mpizero.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click"]
if find_spec("sphinx_copybutton"):  # not everywhere where the pages are built
    extensions.append("sphinx_copybutton")
exclude_patterns = ["_build"]
nitpicky = True  # a name in a docstring that leads nowhere is a warning, too

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures stay readable; the docstrings say what is taken
autodoc_class_signature = "mixed"

html_theme = "furo"
pygments_style = "default"  # in furo's own, added lines of a diff have no colour
html_title = f"mpizero {version}"
html_copy_source = False
html_show_sphinx = False
# Pages are opened from disk, where a browser does not let the search read them for excerpts.
html_show_search_summary = False

_PARAMETERS = re.compile(r"([\w, ]+) :(?: (.*))?")


def _list_parameters(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Make a list of a section of parameters ("name : what it is")."""
    if "Parameters" not in lines:
        return
    at = lines.index("Parameters")
    listed = [":Parameters:"]
    rest = at + 2  # behind the line below the heading
    while rest < len(lines) and lines[rest]:
        if found := _PARAMETERS.fullmatch(lines[rest]):
            names = ", ".join(f"``{each}``" for each in found[1].split(", "))
            listed.append(f"    * {names}: {found[2] or ''}".rstrip())
        else:
            listed.append("      " + lines[rest].strip())
        rest += 1
    lines[at:rest] = listed


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _list_parameters)
