"""Random programs of what users do with distributed modules give what one process gives."""

from __future__ import annotations

import os

import pytest

import mpizero_torch as mz
from support import program_zero
from support.programs import draw_program, programs, run_program

COUNT = 400 if os.environ.get("MPIZERO_TEST_ALL") else 25


@pytest.mark.parallel([1, 2, 3, 4])
def test_random_programs_give_what_one_process_gives() -> None:
    """For more of them: ``mpirun -n 2 python tests/support/programs.py --count 2000``."""
    size = mz.init().size
    kinds = []
    with programs() as comm:
        for seed in range(COUNT):
            outcome = run_program(draw_program(seed, size), comm)
            kinds.append(outcome.kind)
            assert outcome.kind != "faulty", outcome.text
    assert kinds.count("clean") > COUNT // 2


@pytest.mark.parallel([1, 2, 3])
def test_random_programs_with_zero_give_what_one_process_gives() -> None:
    """For more of them: ``mpirun -n 2 python tests/support/program_zero.py --count 2000``."""
    size = mz.init().size
    kinds = []
    with program_zero.programs() as comm:
        for seed in range(COUNT):
            outcome = program_zero.run_program(program_zero.draw_program(seed, size), comm)
            kinds.append(outcome.kind)
            assert outcome.kind != "faulty", outcome.text
    assert kinds.count("clean") > COUNT * 4 // 5
