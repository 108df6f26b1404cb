"""How ``mpizero plan`` shows what it has found: tables, a document for programs, a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mpizero.cli.outputs import write_picture
from mpizero.plan import Limits, Machine, Memory, Plan, Ranks, StagePlan, plan

_KINDS = {
    "parameters": "parameters",
    "masters": "float32 masters",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "buffers": "buffers",
    "in_flight": "in flight",
    "activations": "activations",
}

_MOST_DRAWN = 4096  # ranks
_WIDTH = 11

Row = tuple[str, list[str]]
Table = tuple[str, list[Row]]


def show(found: Plan, machine: Machine, limits: Limits) -> None:
    """Print tables, in colour where rich is installed, and what they mean."""
    click.echo(_headline(found))
    heads = [f"stage {each.stage}" for each in found.stages]
    for title, rows in _tables(found):
        _print(title, heads, rows)
    for line in _notes(found, machine, limits):
        click.echo(line)
    if found.stage is None:
        click.echo(f"take: no stage; {found.reason}")
    else:
        click.echo(f"take: stage {found.stage}; {found.reason}")


def as_document(found: Plan) -> dict[str, Any]:
    """For programs: bytes and seconds."""
    stages = []
    for each in found.stages:
        document = asdict(each)
        for place in ("rank", "node"):
            document["holding"][place]["total"] = getattr(each.holding, place).total
        for total in ("network", "memory", "messages"):
            document["traffic"][total] = getattr(each.traffic, total)
        if each.time is not None:
            document["time"]["total"] = each.time.total
        stages.append(document)
    return {
        "model": asdict(found.model),
        "settings": asdict(found.settings),
        "ranks": found.ranks.size,
        "ranks_per_node": found.ranks.local,
        "nodes": found.ranks.nodes,
        "stages": stages,
        "take": found.stage,
        "reason": found.reason,
    }


def draw(found: Plan, machine: Machine, limits: Limits, file: Path) -> None:
    """Memory of a rank, and the time of a step, against the number of ranks, at all stages."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = _sizes(found.ranks)
    plans = [
        plan(found.model, found.settings, Ranks(size, found.ranks.per_node), machine, limits)
        for size in sizes
    ]
    timed = all(each.time is not None for one in plans for each in one.stages)
    figure, axes = plt.subplots(1, 1 + timed, figsize=(6 + 5 * timed, 4.2), squeeze=False)
    curves: list[tuple[str, Callable[[StagePlan], float]]] = [
        ("memory of a rank, GB", lambda each: each.holding.rank.total / 1e9),
        ("a step, seconds", lambda each: each.time.total if each.time else 0.0),
    ]
    for axis, (label, of) in zip(axes[0], curves, strict=False):
        for at, stage in enumerate(plans[0].stages):
            values = [of(one.stages[at]) for one in plans]
            # Stages often coincide: thinner lines lie on thicker ones.
            width = 5 - 1.2 * at
            axis.plot(sizes, values, "-", lw=width, label=f"stage {stage.stage}")
        axis.set(xscale="log", xlabel="ranks", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.axvline(found.ranks.size, color="0.6", ls=":", lw=1)
        axis.grid(alpha=0.3)
    limit = limits.rank if limits.rank is not None else limits.node
    if limit is not None:
        each = limit if limits.rank is not None else limit / found.ranks.local
        axes[0][0].axhline(each / 1e9, color="0.3", ls="--", lw=1, label="there is")
    axes[0][0].legend()
    figure.suptitle(_headline(found), fontsize=9)
    figure.tight_layout()
    write_picture(figure, file, "plan", dpi=120)
    plt.close(figure)


def _tables(found: Plan) -> Iterator[Table]:
    stages, unit = found.stages, _unit(found)

    def row(name: str, values: Sequence[float | None]) -> Row:
        return name, [_amount(value, unit) for value in values]

    def kinds(held: Sequence[Memory]) -> list[Row]:
        named = [(text, [getattr(each, name) for each in held]) for name, text in _KINDS.items()]
        return [row(*each) for each in [*named, ("total", [each.total for each in held])]]

    node = row("in shared memory", [each.holding.shared for each in stages])
    yield f"a rank holds, {unit}", kinds([each.holding.rank for each in stages])
    yield f"a node holds, {unit}", [*kinds([each.holding.node for each in stages]), node]
    yield (
        f"a node moves, {unit}",
        [
            row("sent between nodes", [each.traffic.network for each in stages]),
            row("through its memory", [each.traffic.memory for each in stages]),
            ("messages in a row", [f"{each.traffic.messages:,}" for each in stages]),
        ],
    )
    times = [each.time for each in stages]
    if all(time is not None for time in times):
        names = ("compute", "gradients", "update", "parameters", "hidden", "total")
        rows = [(name, [_seconds(getattr(time, name)) for time in times]) for name in names]
        yield "a step, seconds", rows
    if stages[0].fits is not None:
        fits = ["yes" if each.fits else "no" for each in stages]
        fewest = [f"{each.fewest_ranks:,}" if each.fewest_ranks else "-" for each in stages]
        yield "fits", [(f"{found.ranks.size} ranks", fits), ("fewest ranks that do", fewest)]


def _headline(found: Plan) -> str:
    ranks, settings = found.ranks, found.settings
    where = "one node" if ranks.nodes == 1 else f"{ranks.nodes} nodes"
    return (
        f"{found.model.parameters:,} parameters, {settings.optimizer.name}, {settings.precision}, "
        f"{ranks.size} ranks on {where}"
    )


def _notes(found: Plan, machine: Machine, limits: Limits) -> Iterator[str]:
    """What the figures rest on."""
    model, settings, stages = found.model, found.settings, found.stages
    if stages[0].holding.rank.activations is None:
        yield "activations: not known; give --layers, --hidden and --sequence, or a model's inputs"
    elif model.activation_bytes is not None:
        yield "activations: counted on the model's forward"
    else:
        yield "activations: an estimate for transformers, without logits"
    if not model.largest:
        yield f"largest module: guessed, {model.largest_unit:,} parameters; give --largest"
    if settings.precision == "bf16" and stages[0].stage == 0:
        yield "stage 0 keeps float32 parameters and gradients; its bf16 is torch.autocast"
    if any(each.time is None for each in stages):
        network = "--network-bandwidth or --measured, " if found.ranks.nodes > 1 else ""
        yield f"time: give {network}--memory-bandwidth, and --compute-seconds or --flops"
    else:
        if stages[0].time is not None and stages[0].time.compute is None:
            yield "time: without compute; give --compute-seconds, or --flops and --sequence"
        if machine.memory_bandwidth is None:
            yield "time: what goes through memory is left out; give --memory-bandwidth"
    taken = next((each for each in stages if each.stage == found.stage), None)
    if taken and limits.node is not None and taken.holding.shared > limits.node / 2:
        yield (
            f"stage {taken.stage} wants {_amount(taken.holding.shared, 'GB')} GB in /dev/shm, "
            "which most systems limit to half the memory: see `df /dev/shm`"
        )


def _print(title: str, heads: Sequence[str], rows: Sequence[Row]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:
        click.echo(f"{title:<22}" + "".join(f"{head:>{_WIDTH}}" for head in heads))
        for name, cells in rows:
            click.echo(f"  {name:<20}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells))
        return
    table = RichTable(title, box=None, pad_edge=False, header_style="bold")
    table.columns[0].min_width = 22
    for head in heads:
        table.add_column(head, justify="right", min_width=_WIDTH - 2)
    for name, cells in rows:
        table.add_row(f"  {name}", *cells, style="bold" if name == "total" else None)
    Console(highlight=False).print(table)


def _sizes(ranks: Ranks) -> list[int]:
    """Numbers of ranks to draw: the powers of two on one node, and of full nodes."""
    found = {ranks.size, ranks.per_node}
    found |= {size for size in (2**i for i in range(20)) if size < ranks.per_node}
    nodes = 1
    while nodes * ranks.per_node <= max(_MOST_DRAWN, ranks.size):
        found.add(nodes * ranks.per_node)
        nodes *= 2
    return sorted(found)


def _unit(found: Plan) -> str:
    return "GB" if max(each.holding.node.total for each in found.stages) >= 1e9 else "MB"


def _amount(nbytes: float | None, unit: str) -> str:
    if nbytes is None:
        return "?"
    value = nbytes / (1e9 if unit == "GB" else 1e6)
    if not value:
        return "-"
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return f"{seconds:.3g}" if seconds else "-"
