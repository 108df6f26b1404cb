"""``mpizero checkpoint``: what is in a checkpoint, is it whole, and the model for others."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from mpizero.checkpoint import (
    Checkpoint,
    TensorSpec,
    export_safetensors,
    leftovers,
    newest,
)
from mpizero.checkpoint.format import FileLayout
from mpizero.checkpoint.notes import lookalikes
from mpizero.checkpoint.progress import Progress
from mpizero.errors import MpizeroError

_PATH = click.Path(path_type=Path)


@click.group(short_help="Look at a checkpoint, check it, or export its model.")
def checkpoint() -> None:
    """Look at a checkpoint, check it, or export its model.

    PATH is a checkpoint, or a folder of several, whose newest is taken. One process is enough: no
    mpirun, no GPU, and not the framework that saved it.
    """


@checkpoint.command()
@click.argument("path", type=_PATH)
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def show(path: Path, tensors: bool, as_json: bool) -> None:
    """List what a checkpoint holds, its sizes, and whether it is complete."""
    found = _open(path)
    document = _described(found, tensors or as_json)
    if as_json:
        click.echo(json.dumps(document, indent=1))
        return
    click.echo(f"{found.path}: complete, saved {document['saved']} by {document['ranks']} rank(s)")
    for name, value in document["values"].items():
        click.echo(f"  {name} = {value}")
    if document["position"]:
        click.echo(f"  data: {document['position']}")
    for name, part in document["parts"].items():
        files = ", ".join(part["files"])
        click.echo(
            f"{name:>10}  {part['tensors']:>6} tensors  {part['elements']:>15,} numbers  "
            f"{_size(part['bytes']):>9}  {', '.join(part['dtypes']) or '-'}  in {files}"
        )
        for each in part.get("list", ()):
            click.echo(f"{'':>12}{each['name']}  {each['dtype']}  {each['shape']}")
    for left in leftovers(found.path.parent):
        click.echo(f"left over by a save that did not end: {left} (the next save removes it)")
    for each in lookalikes(found.path.parent):
        click.echo(f"called like a left-over, but nothing proves that it is one: {each} (it stays)")


@checkpoint.command()
@click.argument("path", type=_PATH)
def verify(path: Path) -> None:
    """Read everything and compare every checksum. Exit code 1 if anything is damaged."""
    found = _open(path)
    total = sum(layout.nbytes for layout in found.layouts)
    progress = Progress(f"reading {found.path.name}", total, shown=True)
    wrong = found.verify(progress.add)
    progress.close("read")
    for line in wrong:
        click.echo(line, err=True)
    if wrong:
        raise click.ClickException(f"{found.path} is damaged in {len(wrong)} places")
    click.echo(f"{found.path}: all {_size(total)} are as written")


@checkpoint.command()
@click.argument("path", type=_PATH)
@click.argument("out", type=_PATH)
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Convert.")
@click.option("--part", default="model", show_default=True, help="What to export.")
def export(path: Path, out: Path, dtype: str | None, part: str) -> None:
    """Write the model as the single file OUT.safetensors, for people without this library.

    The tensors are read, checked and written a few MiB at a time. OUT must not exist yet.
    """
    found = _open(path)
    specs = found.specs(part)
    if not specs:
        there = ", ".join(dict.fromkeys(layout.part for layout in found.layouts))
        raise click.ClickException(f"{found.path} has no part {part!r} with tensors, but {there}")
    total = sum(spec.nbytes for spec in specs.values())
    try:
        progress = Progress(f"writing {out.name}", total, shown=True)
        export_safetensors(found, part, out, dtype, progress.add)
        progress.close("written")
    except (MpizeroError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{out}: {len(specs)} tensors")


def _open(path: Path) -> Checkpoint:
    try:
        return Checkpoint(newest(path))
    except MpizeroError as error:
        raise click.ClickException(str(error)) from None


def _described(found: Checkpoint, tensors: bool) -> dict[str, Any]:
    """What ``show`` tells."""
    extra = found.values.get("extra", {})
    values = extra.get("extra", {}) if isinstance(extra, dict) else {}
    parts: dict[str, Any] = {}
    for layout in found.layouts:
        if layout.part not in parts:
            parts[layout.part] = _part(found, layout.part, tensors)
    return {
        "path": str(found.path),
        "saved": found.manifest.saved,
        "ranks": found.manifest.ranks,
        "bytes": sum(layout.nbytes for layout in found.layouts),
        "values": {name: value for name, value in values.items() if _is_short(value)},
        "position": _position(extra.get("loader") if isinstance(extra, dict) else None),
        "parts": parts,
    }


def _part(found: Checkpoint, name: str, tensors: bool) -> dict[str, Any]:
    layouts: list[FileLayout] = [each for each in found.layouts if each.part == name]
    specs: Iterable[TensorSpec] = found.specs(name).values()
    described = {
        "files": [layout.name for layout in layouts],
        "bytes": sum(layout.nbytes for layout in layouts),
        "tensors": len(list(specs)),
        "elements": sum(spec.count for spec in specs),
        "dtypes": sorted({spec.dtype.name for spec in specs}),
    }
    if tensors:
        described["list"] = [
            {"name": spec.name, "dtype": spec.dtype.name, "shape": list(spec.shape)}
            for spec in specs
        ]
    return described


def _position(state: Any) -> str:
    """How far a sharded loader was."""
    if not isinstance(state, dict) or "epoch" not in state:
        return ""
    done = (
        f"{state['samples']:,} of {state.get('of', 0):,} samples"
        if "samples" in state
        else f"{state.get('batches', 0):,} batches"
    )
    return f"{done} of epoch {state['epoch']}"


def _is_short(value: Any) -> bool:
    return value is None or (isinstance(value, (bool, int, float, str)) and len(str(value)) < 100)


def _size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
