"""Whatever happens to a job, it ends within seconds and says why, or goes on; and leaves nothing.

A fault of each family here, all of them with ``MPIZERO_TEST_ALL=1``, and by
``tests/fault_campaign.py``, which writes the table of docs/reliability.md.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from support import fault_page
from support.fault_judge import NotHereError, judge, mpi_name
from support.fault_table import FAULTS
from support.faults import ENDS, GOES_ON, MPICH, OPEN_MPI, Fault

ALL = os.environ.get("MPIZERO_TEST_ALL") == "1"
HERE = [fault for fault in FAULTS if fault.only in ("", mpi_name()) and (ALL or fault.short)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", HERE, ids=lambda fault: fault.name)
def test_a_fault_ends_as_promised(fault: Fault) -> None:
    try:
        verdict = judge(fault)
    except NotHereError as error:
        pytest.skip(str(error))
    assert not verdict.wrong, verdict.wrong


@pytest.mark.once
def test_a_promise_that_is_not_kept_is_noticed() -> None:
    """The judge can say no: the job goes on, and says nothing."""
    [fault] = [fault for fault in FAULTS if fault.name == "a forked child calls sys.exit(3)"]
    verdict = judge(replace(fault, promise=ENDS, says=("out of memory",)))
    assert "ended with status 0" in verdict.wrong
    assert "does not say 'out of memory'" in verdict.wrong


@pytest.mark.once
def test_faults_are_many_and_everywhere() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) > 80
    assert {fault.training for fault in FAULTS} >= {"arrays", "ddp", "zero1", "zero2", "zero3"}
    assert {fault.moment for fault in FAULTS} >= {"before", "inside", "after"}
    for thread in (False, True):
        for first in (False, True):
            assert any(fault.thread == thread and (0 in fault.who) == first for fault in FAULTS)
    assert {fault.promise for fault in FAULTS} == {ENDS, GOES_ON}


@pytest.mark.once
def test_the_documented_table_is_the_measured_one_and_names_every_fault() -> None:
    assert fault_page.table() in fault_page.PAGE.read_text()
    measured = fault_page.measured()
    for fault in FAULTS:
        for mpi in (MPICH, OPEN_MPI):
            if fault.only in ("", mpi):
                assert fault.name in measured[mpi], f"{fault.name}, {mpi}: not in the table"
                assert not measured[mpi][fault.name]["wrong"]
