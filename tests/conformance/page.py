"""The tables of ``docs/conformance.md``, made from the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conformance.compare import differences
from conformance.outcomes import FAILED, PASSED, SKIPPED
from conformance.stored import COLUMNS, GLOO, Outcomes, count
from conformance.tables import Table
from support.launch import ROOT

PAGE = ROOT / "docs" / "conformance.md"


def section(table: Table, made_with: dict[str, Any], columns: dict[str, Outcomes]) -> str:
    """All of the page that depends on the results of a table."""
    known = [name for name in COLUMNS if name in columns]
    with_words = ", ".join(f"{what} {version}" for what, version in made_with.items())
    counts = [
        [name, *(str(count(columns[name].values(), v)) for v in (PASSED, FAILED, SKIPPED))]
        for name in known
    ]
    parts = [
        f"With {with_words}:",
        _table(["backend", "passed", "failed", "skipped"], counts),
        "### Every difference from gloo",
        _differences(columns, table.reasons),
        "### What fails with both",
        _both_fail(columns),
        "### What is skipped with gloo",
        _skipped(columns),
    ]
    return "\n\n".join(parts)


def put_in(text: str, table: Table, made: str) -> str:
    """The page with this section in the place of the one that it has."""
    begin, end = f"<!-- {table.mark}: begin -->", f"<!-- {table.mark}: end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{made}\n\n{end}{after}"


def write(
    table: Table, made_with: dict[str, Any], columns: dict[str, Outcomes], page: Path = PAGE
) -> None:
    """Bring the page up to date."""
    page.write_text(put_in(page.read_text(), table, section(table, made_with, columns)))


def _differences(columns: dict[str, Outcomes], reasons: dict[str, str]) -> str:
    """A row for all tests with one reason, in the same columns."""
    columns_of: dict[tuple[str, str, str, str], list[str]] = {}
    for each in differences(columns, reasons):
        key = each.reason, each.gloos, each.ours, each.name
        columns_of.setdefault(key, []).append(each.column)
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for (reason, gloos, ours, name), where in columns_of.items():
        mpis = "" if len(where) == len(columns) - 1 else f" ({', '.join(where)})"
        rows.setdefault((reason, gloos, ours, mpis), []).append(f"`{name}`")
    if not rows:
        return "There is none."
    lines = [
        [", ".join(names), gloos, f"{ours}{mpis}", reason]
        for (reason, gloos, ours, mpis), names in rows.items()
    ]
    return _table(["test", GLOO, "mpizero", "why"], lines)


def _both_fail(columns: dict[str, Outcomes]) -> str:
    names = [
        name
        for name, outcome in columns[GLOO].items()
        if outcome.verdict == FAILED
        and all(c[name].verdict == FAILED for c in columns.values() if name in c)
    ]
    if not names:
        return "Nothing."
    rows = [[f"`{name}`", _cell(columns[GLOO][name].reason)] for name in names]
    return _table(["test", "what gloo's run says"], rows)


def _skipped(columns: dict[str, Outcomes]) -> str:
    reasons = Counter(o.reason for o in columns[GLOO].values() if o.verdict == SKIPPED)
    most_first = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    rows = [[str(number), _cell(reason)] for reason, number in most_first]
    return _table(["tests", "why, in the suite's words"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Text that cannot break a table, nor be taken for markup."""
    return "`" + text.replace("|", "/").replace("`", "'") + "`" if text else ""
