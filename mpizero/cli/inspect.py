"""``mpizero inspect``: what the ranks of a running job are doing, without disturbing it."""

from __future__ import annotations

import click

from mpizero.diagnostics.jobs import Job, jobs
from mpizero.diagnostics.report import report


@click.command()
@click.argument("job", required=False)
def inspect(job: str | None) -> None:
    """Show who waits for whom in a job on this machine, and the Python stacks of its ranks.

    JOB: the scheduler's number of the job, or the process number of its launcher or of any of its
    ranks. Not needed where there is one job only. On several nodes, run it on each; or send
    SIGUSR2 to a rank, and the job prints this for all nodes.
    """
    found = jobs()
    chosen = [each for each in found if job is None or job in each.names]
    if len(chosen) != 1:
        raise click.ClickException(_explain(job, found))
    one = chosen[0]
    try:
        views = one.look()
    except BlockingIOError as error:
        raise click.ClickException(f"{error}; try again") from error
    here = f", {len(views)} of them on this machine" if len(views) < one.size else ""
    click.echo(report(f"what the {one.size} ranks of job {one.label} are doing{here}", views))


def _explain(job: str | None, found: list[Job]) -> str:
    if not found:
        return (
            "no job of yours with mpizero runs on this machine, or its processes may not be looked "
            "at. Run this on a node of the job, as the same user."
        )
    known = "\n".join(
        f"  {each.label}: {len(each.pids)} of {each.size} ranks here, processes "
        f"{', '.join(map(str, each.pids[:8]))}"
        for each in found
    )
    asked = "there are several jobs; name one" if job is None else f"there is no job {job!r} here"
    return f"{asked}:\n{known}"
