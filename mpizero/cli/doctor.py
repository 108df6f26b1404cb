"""``mpizero doctor``: is this machine, and this launch, as training over MPI needs it?"""

from __future__ import annotations

import json
import sys

import click

from mpizero import doctor as examine
from mpizero.doctor.timings import measure
from mpizero.world.abort import expect_exit


@click.command(short_help="Look at MPI, launcher, binding, memory, GPUs and network.")
@click.option("--json", "as_json", is_flag=True, help="For programs, with the facts behind it.")
@click.option("--no-measure", is_flag=True, help="Leave the timing out.")
def doctor(as_json: bool, no_measure: bool) -> None:
    """Look at MPI, launcher, binding, memory, GPUs and network; a verdict for each.

    Alone, on a login node too, or with mpirun as a job would be started. Every line says ok, look
    (it works, but look at it) or wrong, with the remedy. Exit code 1 if anything is wrong.
    """
    facts, world = examine.gather(None if no_measure else measure)
    status = 1  # of the processes that another one speaks for
    if facts is not None:
        findings = examine.judge(facts)
        status = int(examine.worst(findings) == "wrong")
        if as_json:
            click.echo(json.dumps(examine.as_document(facts, findings), indent=1))
        else:
            examine.show(facts, findings)
    if world is not None:
        status = world.broadcast_object(status)
        expect_exit(status)
    sys.exit(status)
