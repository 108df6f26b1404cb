"""Let everything happen to a job that may: does it end or go on as promised, and what is left?

    PYTHONPATH=tests python tests/fault_campaign.py [--only NAME ...] [--json FILE]

With the MPI of the Python that runs it. Prints a line for each fault.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from support.fault_judge import NotHereError, judge, mpi_name
from support.faults import FAULTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; 0 if all ended or went on as promised."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults whose name contains this")
    parser.add_argument("--json", type=Path, help="write the verdicts")
    options = parser.parse_args(arguments)
    verdicts, wrong = [], 0
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
        verdicts.append(asdict(verdict))
        print(
            f"{fault.name} [{fault.where}]: {verdict.seconds} s, status {verdict.status}: "
            f"{verdict.said!r}, left {verdict.left}: {verdict.wrong or 'ok'}", flush=True,
        )  # fmt: skip
    print(f"\n{len(verdicts) - wrong} of {len(verdicts)} ended or went on as promised")
    if options.json:
        options.json.write_text(json.dumps(verdicts, indent=1))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
