"""``mpizero doctor`` says in which container it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpizero.doctor import judge
from mpizero.doctor.facts import Facts, Launcher, RankFacts
from mpizero.doctor.findings import Finding
from mpizero.doctor.host import container

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("environ", "file", "kind"),
    [
        ({}, "", ""),
        ({"APPTAINER_CONTAINER": "/images/a.sif"}, "", "Apptainer (a.sif)"),
        ({"SINGULARITY_CONTAINER": "a.sif"}, "", "Singularity (a.sif)"),
        ({"container": "podman"}, "run/.containerenv", "Podman"),
        ({}, ".dockerenv", "Docker"),
        ({"SHIFTER_RUNTIME": "1"}, "", "Shifter"),
        ({"container": "enroot"}, "", "enroot"),
    ],
)
def test_containers_are_known_by_what_they_leave(
    environ: dict[str, str], file: str, kind: str, tmp_path: Path
) -> None:
    if file:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert container(environ, tmp_path) == kind


def found(*kinds: str, size: int = 2) -> list[Finding]:
    ranks = tuple(RankFacts(f"host{at}", at, container=kind) for at, kind in enumerate(kinds))
    facts = Facts(ranks, Launcher(name="mpirun", rank=0, size=size) if size > 1 else Launcher())
    return [each for each in judge(facts) if each.topic == "container"]


def test_what_is_said_of_them() -> None:
    assert found("", "") == []
    [same] = found("Docker", "Docker")
    assert same.verdict == "ok" and "Docker" in same.text
    [alone] = found("Docker", size=1)
    assert "host's launcher" in alone.text
    [mixed] = found("Docker", "")
    assert mixed.verdict == "look" and "none, Docker" in mixed.text and mixed.remedy
