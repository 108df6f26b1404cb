"""What training will take, before it runs: memory, traffic, time, and the stage to choose.

Pure arithmetic on frozen descriptions; ``mpizero plan`` is its command. docs/planning.md shows how
to read the result, and tests/test_plan.py holds it to what is measured.
"""

from __future__ import annotations

from mpizero.plan.choose import Limits, Plan, StagePlan, fewest_ranks, plan
from mpizero.plan.job import OPTIMIZERS, PRECISIONS, STAGES, Machine, Model, Ranks, Settings
from mpizero.plan.measured import link_of, tuned
from mpizero.plan.memory import Holding, Memory, State, memory, part_of_rank
from mpizero.plan.step_time import StepTime, step_time
from mpizero.plan.traffic import Phase, Traffic, traffic

__all__ = [
    "OPTIMIZERS",
    "PRECISIONS",
    "STAGES",
    "Holding",
    "Limits",
    "Machine",
    "Memory",
    "Model",
    "Phase",
    "Plan",
    "Ranks",
    "Settings",
    "StagePlan",
    "State",
    "StepTime",
    "Traffic",
    "fewest_ranks",
    "link_of",
    "memory",
    "part_of_rank",
    "plan",
    "step_time",
    "traffic",
    "tuned",
]
