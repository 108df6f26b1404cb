"""``mpizero plan``: memory, traffic and time of a training, before it is started."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import click

from mpizero.cli.outputs import check_picture
from mpizero.cli.plan_output import as_document, draw, show
from mpizero.cli.quantity import memory_size, number
from mpizero.errors import MpizeroError
from mpizero.plan import (
    OPTIMIZERS,
    PRECISIONS,
    STAGES,
    Limits,
    Machine,
    Model,
    Ranks,
    Settings,
    link_of,
    plan,
    tuned,
)

_GIGA, _MICRO = 1e9, 1e-6


@click.command("plan", short_help="Will it fit, and how long will a step take?")
@click.argument("model", required=False, metavar="[MODULE:FUNCTION]")
@click.option("--parameters", type=number, help="How many the model has, such as 7e9.")
@click.option("--layers", type=int, default=0, help="Of a transformer: for activations, flops.")
@click.option("--hidden", type=int, default=0, help="Of a transformer: its width.")
@click.option("--largest", type=number, default=0, help="Parameters of the largest module.")
@click.option(
    "--optimizer", type=click.Choice(list(OPTIMIZERS)), default="adamw", show_default=True
)
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True)
@click.option("--ranks", type=int, default=1, show_default=True)
@click.option("--ranks-per-node", type=int, help="All on one node, by default.")
@click.option("--stage", type=click.IntRange(0, 3), help="Only this one; all four, by default.")
@click.option("--micro-batch", type=int, default=1, show_default=True, help="Samples a rank.")
@click.option("--sequence", type=int, default=0, help="Tokens of a sample.")
@click.option(
    "--share/--no-share", default=True, show_default=True,
    help="Do the ranks of a node keep one copy of the parameters (CPUs)?",
)  # fmt: skip
@click.option("--memory-per-node", type=memory_size, help="Such as 512GB or 480GiB.")
@click.option("--memory-per-rank", type=memory_size, help="The same for each rank.")
@click.option(
    "--headroom", default=0.1, show_default=True, type=click.FloatRange(0, 0.99),
    help="Part of that memory to leave to the system, libraries and the allocator.",
)  # fmt: skip
@click.option("--network-bandwidth", type=float, help="GB/s that a node sends.")
@click.option("--latency", type=float, default=5, show_default=True, help="us of a message.")
@click.option("--memory-bandwidth", type=float, help="GB/s that a node's ranks read and write.")
@click.option("--compute-seconds", type=float, help="Of forward and backward on a rank.")
@click.option("--flops", type=number, help="Operations a rank does a second, such as 2e12.")
@click.option(
    "--measured", type=click.Path(path_type=Path), metavar="FILE",
    help="Bandwidth and latency from `mpizero bench --json FILE`, run with one rank a node.",
)  # fmt: skip
@click.option("--overlap", is_flag=True, help="Ranks have a core beside the one that computes.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw it (PNG).")
def plan_command(
    model: str | None,
    parameters: float | None,
    layers: int,
    hidden: int,
    largest: float,
    optimizer: str,
    precision: str,
    ranks: int,
    ranks_per_node: int | None,
    stage: int | None,
    micro_batch: int,
    sequence: int,
    share: bool,
    memory_per_node: float | None,
    memory_per_rank: float | None,
    headroom: float,
    network_bandwidth: float | None,
    latency: float,
    memory_bandwidth: float | None,
    compute_seconds: float | None,
    flops: float | None,
    measured: Path | None,
    overlap: bool,
    as_json: bool,
    plot_file: Path | None,
) -> None:
    """Will it fit, how long will a step take, and which stage is best?

    The model is given by its --parameters, or as a function that builds it without arguments, and
    may return the inputs of a micro-batch beside it. Nothing is trained, and no memory taken.
    """
    if model is None and parameters is None:
        raise click.UsageError(
            "of which model? Give --parameters NUMBER, such as 7e9, or MODULE:FUNCTION"
        )
    if model is not None and parameters is not None:
        raise click.UsageError("give either --parameters NUMBER or MODULE:FUNCTION, not both")
    check_picture(plot_file, "plan")
    try:
        where = Ranks(ranks, ranks_per_node or max(1, ranks))
        if parameters is not None:
            size = int(largest)
            known = Model(int(parameters), 0, size, size, layers=layers, hidden=hidden)
        else:
            known = _built(str(model), precision)
        settings = Settings(
            OPTIMIZERS[optimizer],
            precision,
            share,
            micro_batch,
            sequence,
            overlap,
            bucket_bytes=tuned(where.local, where.nodes).bucket_bytes,
        )
        bandwidth = None if network_bandwidth is None else network_bandwidth * _GIGA
        seconds = latency * _MICRO
        if measured is not None:
            bandwidth, seconds = link_of(measured)
        machine = Machine(
            bandwidth,
            seconds,
            None if memory_bandwidth is None else memory_bandwidth * _GIGA,
            flops,
            compute_seconds,
        )
        room = 1 - headroom
        limits = Limits(
            None if memory_per_node is None else memory_per_node * room,
            None if memory_per_rank is None else memory_per_rank * room,
        )
        stages = STAGES if stage is None else (stage,)
        found = plan(known, settings, where, machine, limits, stages)
    except MpizeroError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps(as_document(found), indent=1))
    else:
        show(found, machine, limits)
    if plot_file is not None:
        draw(found, machine, limits, plot_file)


def _built(name: str, precision: str) -> Model:
    """The framework is the adapter's business: it is found by name, and only if it is needed."""
    try:
        adapter: Any = importlib.import_module("mpizero_torch.plan")
    except ImportError as error:
        raise click.ClickException(
            f"to build {name} takes torch ({error}): pip install 'mpizero[torch]', or give "
            "--parameters"
        ) from None
    found: Model = adapter.model_of(name, precision)
    return found
