"""The command ``mpizero``: tools for operators, run alone or under ``mpirun``."""

from __future__ import annotations

import click

from mpizero.cli.bench import bench
from mpizero.cli.checkpoint import checkpoint
from mpizero.cli.doctor import doctor
from mpizero.cli.execute import execute
from mpizero.cli.inspect import inspect
from mpizero.cli.job import job
from mpizero.cli.plan import plan_command
from mpizero.cli.trace import trace
from mpizero.cli.tune import tune


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mpizero")
def main() -> None:
    """Tools for training over MPI. Start bench, doctor and tune with mpirun, srun, ..."""


main.add_command(bench)
main.add_command(checkpoint)
main.add_command(execute)
main.add_command(inspect)
main.add_command(job)
main.add_command(trace)
main.add_command(plan_command)
main.add_command(doctor)
main.add_command(tune)
