"""Let everything happen to a job that may: does it end or go on as promised, and what is left?

    PYTHONPATH=tests python tests/fault_campaign.py [--only NAME ...] [--write]

With the MPI of the Python that runs it. Prints a line for each fault. ``--write`` keeps the
verdicts in docs/figures, and puts them into the table of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from support import fault_page
from support.fault_judge import NotHereError, judge, mpi_name
from support.fault_table import FAULTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; 0 if all ended or went on as promised."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults whose name contains this")
    parser.add_argument("--write", action="store_true", help="into docs")
    options = parser.parse_args(arguments)
    verdicts, wrong = {}, 0
    for fault in FAULTS:
        if fault.only not in ("", mpi_name()):
            continue
        if options.only and not any(name in fault.name for name in options.only):
            continue
        try:
            verdict = judge(fault)
        except NotHereError as error:
            print(f"{fault.name}: not run here: {error}", flush=True)
            continue
        wrong += bool(verdict.wrong)
        verdicts[fault.name] = asdict(verdict)
        print(
            f"{fault.name} ({fault.where}): {verdict.seconds} s, status {verdict.status}; "
            f"{verdict.said!r}; left {verdict.left or 'nothing'}: {verdict.wrong or 'ok'}",
            flush=True,
        )
    print(f"\n{len(verdicts) - wrong} of {len(verdicts)} ended or went on as promised")
    if options.write:
        fault_page.record(mpi_name(), verdicts)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
