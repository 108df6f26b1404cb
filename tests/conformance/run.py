"""Run torch's test suite for distributed backends with "mpizero", with gloo, or with both.

    python tests/conformance/run.py [--backend both] [--only NAME] [--json] [--write]

Under the MPI that belongs to this Python, on 3 ranks; what wants 4 ranks is run on 4.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder of the tests, not this one

from conformance.launches import Setting, run_tests  # noqa: E402
from conformance.outcomes import FAILED, PASSED, SKIPPED, Outcome  # noqa: E402
from conformance.suite import Suite  # noqa: E402

RANKS, MORE_RANKS = 3, 4


def run_suite(setting: Setting, tests: list[str], verbose: bool) -> dict[str, Outcome]:
    """Run the tests with one backend; again on more ranks those that ask for more."""

    def report(name: str, outcome: Outcome) -> None:
        print(f"{setting.backend:8} {outcome.verdict:7} {outcome.seconds:6.1f} s  {name}"
              f"{'  (' + outcome.reason + ')' if outcome.reason else ''}", flush=True)
        if verbose and outcome.verdict == FAILED:
            print(outcome.details, flush=True)

    outcomes = run_tests(setting, tests, report)
    more = [name for name in tests if f"world size of {MORE_RANKS}" in outcomes[name].reason]
    wider = Setting(setting.python, setting.backend, MORE_RANKS, setting.limit)
    outcomes.update(run_tests(wider, more, report))
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("mpizero", "gloo", "both"), default="both")
    parser.add_argument("--only", action="append", metavar="NAME", help="a test, or part of it")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one test")
    parser.add_argument("--verbose", action="store_true", help="tracebacks of what fails")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = Suite("gloo", RANKS).names()
    if options.only:
        names = [name for name in names if any(part in name for part in options.only)]
    backends = ("gloo", "mpizero") if options.backend == "both" else (options.backend,)
    for backend in backends:
        setting = Setting(sys.executable, backend, RANKS, options.limit)
        outcomes = run_suite(setting, names, options.verbose)
        count = {v: sum(o.verdict == v for o in outcomes.values()) for v in (PASSED, FAILED, SKIPPED)}
        print(backend, count)
        if options.out:
            options.out.mkdir(exist_ok=True)
            (options.out / f"{backend}.json").write_text(
                json.dumps({n: o.as_json() for n, o in outcomes.items()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
