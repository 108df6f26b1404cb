"""A picture of a job's timelines: a rank below the other, its program above its communication."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpizero.cli.outputs import write_picture
from mpizero.diagnostics.summary import RankSummary

_PROGRAM = {
    "forward": "#4c78a8", "backward": "#f2a65a", "optimizer": "#59a14f", "checkpoint": "#9c755f",
}  # fmt: skip
_OTHER, _STANDING, _MOVING, _WAITING = "#b9b4c7", "#d1495b", "#5e548e", "#d9d6e0"

# Of a rank's row, from its top: the program, whether it stands still, and what is communicated.
_ROW = 1.0
_LANES = {"program": (0.50, 0.34), "standing": (0.42, 0.06), "calls": (0.10, 0.28)}

_MOST_LABELS = 32


def draw(events: Sequence[dict[str, Any]], ranks: Sequence[RankSummary], file: Path) -> None:
    """Write it as whatever ``file``'s name ends in. ``ranks``: the summaries, in order."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    bottom = {each.rank: (len(ranks) - 1 - at) * _ROW for at, each in enumerate(ranks)}
    height = max(0.12, min(0.75, 24 / len(ranks)))
    figure, axes = pyplot.subplots(figsize=(12, 1.6 + height * len(ranks)))
    for (rank, lane, colour), bars in _bars(events).items():
        start, thick = _LANES[lane]
        place = (bottom[rank] + start, thick)
        axes.broken_barh(bars, place, facecolors=colour, linewidth=0)
    for at in range(1, len(ranks)):
        axes.axhline(at * _ROW, color="0.92", linewidth=0.8)
    labelled = ranks[:: -(-len(ranks) // _MOST_LABELS)]
    middles = [bottom[each.rank] + _ROW / 2 for each in labelled]
    axes.set_yticks(middles, [f"rank {each.rank}" for each in labelled])
    right = axes.secondary_yaxis("right")
    right.set_yticks(middles, [_of_rank(each) for each in labelled])
    for side in (axes, right):
        side.tick_params(axis="y", length=0, labelsize=9)
        side.spines[:].set_visible(False)
    axes.spines["bottom"].set_visible(True)
    axes.set(xlabel="seconds", ylim=(0, len(ranks) * _ROW))
    axes.margins(x=0.005)
    axes.grid(axis="x", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    shown = {colour for _, _, colour in _bars(events)}
    names = {
        **_PROGRAM, "other": _OTHER, "program stands still": _STANDING, "moving data": _MOVING,
        "waiting for others": _WAITING,
    }  # fmt: skip
    handles = [Patch(color=c, label=name) for name, c in names.items() if c in shown]
    figure.legend(
        handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(handles),
        frameon=False, fontsize=9, handlelength=1.2, columnspacing=1.6,
    )  # fmt: skip
    figure.tight_layout()
    write_picture(figure, file, "trace summary", dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def _bars(
    events: Sequence[dict[str, Any]],
) -> dict[tuple[int, str, str], list[tuple[float, float]]]:
    """(start, duration) in seconds, by rank, lane and colour; what is drawn on top comes last."""
    found: dict[tuple[int, str, str], list[tuple[float, float]]] = defaultdict(list)
    for layer in ("program", "blocking", "asynchronous", "waiting", "wait"):
        for event in events:
            if event.get("ph") != "X" or event["cat"] != layer:
                continue
            bar = (event["ts"] / 1e6, event["dur"] / 1e6)
            if layer == "program":
                colour = _PROGRAM.get(event["name"], _OTHER)
                found[event["pid"], "program", colour].append(bar)
            elif layer == "wait":
                found[event["pid"], "calls", _WAITING].append(bar)
            if layer in ("blocking", "asynchronous"):
                found[event["pid"], "calls", _MOVING].append(bar)
            if layer in ("blocking", "waiting"):
                found[event["pid"], "standing", _STANDING].append(bar)
    return found


def _of_rank(rank: RankSummary) -> str:
    part = 100 * rank.exposed / rank.total if rank.total else 0.0
    return f"{part:.0f} % exposed"
