"""Run torch's test suite for distributed backends with "mpizero", with gloo, or with both.

    python tests/conformance/run.py [--table T] [--backend B] [--only NAME] [--json FILE] [--write]

Under the MPI that belongs to this Python, on 3 ranks; what asks for 4 ranks is run again on 4.
``--table ddp``: the tests that make a DistributedDataParallel, with ours in the place of torch's.
``--write`` keeps the results, and brings the tables of docs/conformance.md up to date. Ends with 1
if a test that gloo passes does not pass, and ``reasons.py`` does not say why.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder of all tests, not this one

import torch  # noqa: E402

from conformance import compare, page, stored  # noqa: E402
from conformance.launches import RANKS, Report, Setting, run_tests  # noqa: E402
from conformance.outcomes import FAILED, PASSED, SKIPPED, Outcome  # noqa: E402
from conformance.suite import Suite  # noqa: E402
from conformance.tables import TABLES  # noqa: E402
from support.launch import find_mpirun, is_openmpi  # noqa: E402

_VERDICTS = (PASSED, FAILED, SKIPPED)


def main() -> int:
    """Run what was asked for."""
    options = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # and the launch with it
    table = TABLES[options.table]
    names = Suite("gloo", RANKS, table).names()
    if options.only:
        names = [name for name in names if any(part in name for part in options.only)]
    ours = stored.OPENMPI if is_openmpi(find_mpirun(sys.executable)) else stored.MPICH
    _, columns = stored.read(table.file)
    for column in (stored.GLOO, ours):
        backend = column.split()[0]
        if options.backend in (backend, "both"):
            setting = Setting(sys.executable, backend, options.limit, table=table)
            found = run_tests(setting, names, _teller(backend, options.verbose))
            columns[column] = columns.get(column, {}) | found if options.only else found
            counts = ", ".join(f"{stored.count(found.values(), v)} {v}" for v in _VERDICTS)
            print(f"{column}: {counts}")
    made_with = {"torch": torch.__version__.split("+")[0]}
    short = [
        d for d in compare.differences(columns, table.reasons) if d.falls_short and d.name in names
    ]
    for each in short:
        known = "for a known reason" if each.reason else "and nobody knows why"
        print(f"{each.column}: {each.name} {each.ours}, gloo passes, {known}")
    if options.json:
        chosen = {c: {n: o.as_json() for n, o in columns[c].items() if n in names} for c in columns}
        options.json.write_text(json.dumps(chosen, indent=1) + "\n")
    if options.write:
        stored.write(made_with, columns, table.file)
        page.write(table, *stored.read(table.file))
        print("\n".join(compare.unexplained(columns, table.reasons)))
    return 0 if all(each.reason for each in short) else 1


def _teller(backend: str, verbose: bool) -> Report:
    def report(name: str, outcome: Outcome) -> None:
        why = f"  ({outcome.reason})" if outcome.reason else ""
        said = f"{backend:8} {outcome.verdict:7} {outcome.seconds:6.1f} s  {name}{why}"
        print(said, file=sys.stderr, flush=True)
        if verbose and outcome.verdict == FAILED:
            print(outcome.details, file=sys.stderr, flush=True)

    return report


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--table", choices=TABLES, default="backend")
    parser.add_argument("--backend", choices=("mpizero", "gloo", "both"), default="both")
    parser.add_argument("--only", action="append", metavar="NAME", help="a test, or part of a name")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a test may take")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every test's outcome")
    parser.add_argument("--write", action="store_true", help="keep the results, write the page")
    parser.add_argument("--verbose", action="store_true", help="show why tests fail")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
