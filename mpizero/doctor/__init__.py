"""What this machine and this launch are like for training over MPI: found out, judged, told.

``gather`` collects facts on every rank, ``judge`` turns them into findings without asking anything
further (so that every judgement can be tried with made-up facts), ``report`` prints them.
"""

from __future__ import annotations

from mpizero.doctor.facts import Facts, RankFacts, Timings
from mpizero.doctor.findings import Finding, Verdict
from mpizero.doctor.gather import gather
from mpizero.doctor.judge import judge, worst
from mpizero.doctor.report import as_document, show

__all__ = [
    "Facts",
    "Finding",
    "RankFacts",
    "Timings",
    "Verdict",
    "as_document",
    "gather",
    "judge",
    "show",
    "worst",
]
