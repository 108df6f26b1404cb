"""``mpizero job``: a job script for the scheduler, printed."""

from __future__ import annotations

import click

from mpizero.cli.quantity import memory_size
from mpizero.errors import MpizeroError
from mpizero.job import MPIS, SCHEDULERS, Job, loaded_mpi, script, seconds_of


@click.command("job")
@click.argument("scheduler", type=click.Choice(list(SCHEDULERS)))
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- PROGRAM ...")
@click.option("--nodes", type=int, required=True)
@click.option("--ranks-per-node", type=int, required=True)
@click.option("--time", "limit", required=True, help="Of the job: 4:00:00, 1-12:00:00.")
@click.option("--cpus-per-rank", default=1, show_default=True, help="Cores, and threads.")
@click.option("--gpus-per-node", default=0, show_default=True)
@click.option("--mem", "memory", type=memory_size, help="Of each node: 480GiB, 512GB.")
@click.option("--partition", "--queue", "queue", default="", help="Where to submit to.")
@click.option("--account", default="", help="Whom to charge.")
@click.option("--name", default="train", show_default=True, help="Of the job.")
@click.option(
    "--mpi", type=click.Choice(list(MPIS)), help="By default the one that mpi4py loads here."
)
@click.option("--module", "modules", multiple=True, help="To load; may be repeated.")
@click.option(
    "--before", multiple=True, metavar="LINE",
    help="Of shell, such as 'source ~/train/bin/activate'; may be repeated.",
)  # fmt: skip
@click.option("--env", "variables", multiple=True, metavar="NAME=VALUE", help="May be repeated.")
@click.option(
    "--signal", default=120, show_default=True, metavar="SECONDS",
    help="Before the end, for mpizero.PreemptionGuard to save in; 0: no signal.",
)  # fmt: skip
@click.option(
    "--requeue/--no-requeue", default=True, show_default=True,
    help="Start again when the program ends with status 75, as PreemptionGuard.exit does?",
)  # fmt: skip
@click.option("--output", default="", help="File for what the job prints.")
@click.option(
    "--script", "script_file", default="", metavar="FILE",
    help="That the script will be kept in (a PBS job submits it again); NAME.sh by default.",
)  # fmt: skip
def job(
    scheduler: str,
    command: tuple[str, ...],
    nodes: int,
    ranks_per_node: int,
    limit: str,
    cpus_per_rank: int,
    gpus_per_node: int,
    memory: float | None,
    queue: str,
    account: str,
    name: str,
    mpi: str | None,
    modules: tuple[str, ...],
    before: tuple[str, ...],
    variables: tuple[str, ...],
    signal: int,
    requeue: bool,
    output: str,
    script_file: str,
) -> None:
    """Print a job script for Slurm, PBS or LSF that runs PROGRAM on all ranks.

    Ranks are bound to their cores and have as many threads; before the time limit they are told to
    save, and a job that has saved and is not done starts again. PROGRAM's words are quoted: what
    the shell of the job is to expand belongs into --before.
    """
    try:
        wanted = Job(
            command=command,
            nodes=nodes,
            ranks_per_node=ranks_per_node,
            seconds=seconds_of(limit),
            mpi=loaded_mpi() if mpi is None else MPIS[mpi],
            cpus_per_rank=cpus_per_rank,
            gpus_per_node=gpus_per_node,
            memory=memory,
            queue=queue,
            account=account,
            name=name,
            modules=modules,
            before=before,
            variables=dict(map(_variable, variables)),
            signal=signal,
            requeue=requeue,
            output=output,
            script=script_file,
        )
        click.echo(script(scheduler, wanted), nl=False)
    except MpizeroError as error:
        raise click.ClickException(str(error)) from None


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--env")
    return name, value
