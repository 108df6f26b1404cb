"""The table of models in ``docs/conformance.md``, from results that are kept beside this file.

    python tests/conformance/model_table.py LINES [--write]

LINES is what ``models.py --lines`` has added to. ``--write`` takes it into what is kept, and brings
the page up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder of all tests, not this one

from conformance.page import PAGE  # noqa: E402

KEPT = Path(__file__).with_name("model_results.json")
LEFT_OUT, OWN = "left out", "as in one process: "
COLUMNS = ("stage 0", "stage 2", "stage 3", "stage 3 private", "bf16", "fp16")
_BEGIN, _END = "<!-- models: begin -->", "<!-- models: end -->"

_LARGE = "The model's own: not finite in one process in float16 either; bf16 is right."

# Why a model differs; every difference needs its line.
REASONS: dict[str, str] = {
    "causal rwkv": "Evaluated, as it is here, it divides its weights in place, within forward. "
    "That is refused: each rank has a part of them, or all have one copy.",
    "causal minimax": "Its attention computes in float32 and meets 16-bit weights in a matrix "
    'product: refused, with `float32=["..."]` as the remedy.',
    "causal openai-gpt": "Its attention meets a float32 buffer: refused, with `buffers=` or "
    "`float32=` as the remedy.",
    "causal cpmant": "The model's own rounding: one process in bf16 has the norm 15.703, too.",
    "masked funnel": "The model's own rounding: one process in bf16 has the norm 1.4955, too.",
    "causal gemma4_unified_text": "The model's own rounding: one process that adds up gradients "
    "of two halves of the batch is off by the same 4.4e-5.",
    "seq2seq longt5": _LARGE,
    "image beit": _LARGE,
    "image data2vec-vision": _LARGE,
    "image deit": _LARGE,
}

Results = dict[str, dict[str, str]]


def read(lines: Path) -> Results:
    """What has been found; of an architecture that was tried again, the last."""
    found: Results = {}
    for line in lines.read_text().splitlines():
        found |= json.loads(line)
    return found


def section(made_with: Mapping[str, str], results: Results) -> str:
    """All of the page that depends on the results."""
    tried = {name: found for name, found in sorted(results.items()) if LEFT_OUT not in found}
    bad = {name: found for name, found in tried.items() if any(found.values())}
    versions = ", ".join(f"{what} {version}" for what, version in made_with.items())
    rows = [
        [f"`{name}`", *(_mark(found.get(way, "")) for way in COLUMNS)]
        for name, found in tried.items()
    ]
    why = [[f"`{name}`", ", ".join(way for way in COLUMNS if found.get(way)), REASONS.get(name, "")]
           for name, found in bad.items()]  # fmt: skip
    same = len(tried) - len(bad)
    parts = [
        f"With {versions}, on 2 ranks: {len(tried)} architectures, {same} the same throughout.",
        "### Every model that differs, or is refused",
        _table(["architecture", "where", "why"], why),
        "### All of them",
        _table(["architecture", *COLUMNS], rows),
    ]
    return "\n\n".join(parts)


def put_in(text: str, made: str) -> str:
    """The page with this in the place of what it has."""
    before, rest = text.split(_BEGIN)
    return f"{before}{_BEGIN}\n\n{made}\n\n{_END}{rest.split(_END)[1]}"


def stored() -> tuple[dict[str, str], Results]:
    """With what it was found, and what."""
    kept: dict[str, Any] = json.loads(KEPT.read_text())
    return kept["with"], kept["results"]


def _mark(said: str) -> str:
    if not said:
        return "same"
    return "refused" if "Error" in said else "differs"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    """Show what differs, or keep it all."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("lines", type=Path)
    parser.add_argument("--write", action="store_true", help="keep the results, write the page")
    chosen = parser.parse_args()
    results = read(chosen.lines)
    for name, found in sorted(results.items()):
        for way, said in found.items():
            if said and way != LEFT_OUT:
                print(f"{name}, {way}: {said}")
    if chosen.write:
        import torch
        import transformers

        versions = {
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
        }
        before = stored()[1] if KEPT.exists() else {}
        kept = {"with": versions, "results": dict(sorted((before | results).items()))}
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
        PAGE.write_text(put_in(PAGE.read_text(), section(*stored())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
