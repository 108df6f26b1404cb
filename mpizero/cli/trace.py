"""``mpizero trace``: what the timelines of a job say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mpizero.cli import outputs
from mpizero.cli.trace_plot import draw
from mpizero.diagnostics.merging import merge_traces
from mpizero.diagnostics.summary import RankSummary, read_events, summarise
from mpizero.errors import ArgumentError
from mpizero.outputs import MARK

_MERGED = {"made": f"{MARK}: all ranks of a job"}  # the format has a place for such words


@click.group(short_help="Say what the timelines of a job tell.")
def trace() -> None:
    """Timelines that MPIZERO_TRACE=FOLDER, or mz.trace(folder), has made a job write."""


@trace.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the timeline to this file.")
@click.option("--merge", type=click.Path(path_type=Path), help="Write all ranks as one trace.")
@click.option("--json", "as_json", is_flag=True, help="Print data.")
def summary(folder: Path, plot: Path | None, merge: Path | None, as_json: bool) -> None:
    """Print where the time of each rank went, and which rank the others waited for."""
    outputs.check(merge, _is_merged, "trace summary", "--merge")
    outputs.check_picture(plot, "trace summary")
    try:
        events = read_events(folder)
    except ArgumentError as error:
        raise click.ClickException(str(error)) from error
    ranks = summarise(events)
    if as_json:
        click.echo(json.dumps([vars(each) for each in ranks], indent=2))
    else:
        click.echo(table(ranks))
    if merge is not None:
        _write(merge, events, "trace summary", "--merge")
    if plot is not None:
        draw(events, ranks, plot)


@trace.command()
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The file to write.")
def merge(files: tuple[Path, ...], out: Path) -> None:
    """Put traces of PyTorch's profiler, one of each rank, together for one timeline."""
    outputs.check(out, _is_merged, "trace merge", "--out")
    try:
        events = merge_traces(files)
    except ArgumentError as error:
        raise click.ClickException(str(error)) from error
    _write(out, events, "trace merge", "--out")


def _write(path: Path, events: list[dict[str, Any]], command: str, option: str) -> None:
    text = json.dumps({"otherData": _MERGED, "traceEvents": events})
    outputs.write(path, text.encode(), _is_merged, command, option)


def _is_merged(data: bytes) -> bool:
    """Is it what ``--merge`` has written before?"""
    return data.startswith(json.dumps({"otherData": _MERGED}).encode()[:-1])


def table(ranks: list[RankSummary]) -> str:
    """For a person: one line a rank, in seconds, and who was waited for."""
    names = list(dict.fromkeys(name for each in ranks for name in each.spans))
    heads = [*names, "exposed", "overlapped", "waiting", "moving", "MiB", "awaited"]
    rows = [["rank", "total", *heads]]
    for each in ranks:
        times = [each.total, *(each.spans.get(name, 0.0) for name in names)]
        times += [each.exposed, each.overlapped, each.waiting, each.moving]
        figures = [f"{seconds:.3f}" for seconds in times]
        rows.append([str(each.rank), *figures, f"{each.nbytes / 2**20:.1f}", f"{each.caused:.3f}"])
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    total = sum(each.total for each in ranks) or 1.0
    exposed = sum(each.exposed for each in ranks)
    beside = sum(each.overlapped for each in ranks)
    slowest = max(ranks, key=lambda each: each.caused)
    lines += [
        "",
        f"exposed communication: {100 * exposed / total:.1f} % of the time; "
        f"{100 * beside / ((beside + exposed) or 1.0):.0f} % of communication ran beside compute",
    ]
    if len(ranks) > 1:
        lines.append(
            f"the others waited longest for rank {slowest.rank}: {slowest.caused:.3f} s in all"
        )
    return "\n".join(lines)
