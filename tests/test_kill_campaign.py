"""A short kill campaign; the long one is run by hand (docs/reliability.md)."""

from __future__ import annotations

import random

import pytest

import kill_campaign
from kill_campaign import CALLS, Campaign, Training, draw_fault

RUNS = 10


@pytest.fixture(scope="module")
def campaign() -> Campaign:
    return Campaign(seed=1)


@pytest.mark.once
@pytest.mark.parametrize("number", range(RUNS))
def test_what_was_killed_goes_on(campaign: Campaign, number: int) -> None:
    verdict = campaign.run(number)
    assert not verdict.wrong, verdict.wrong


@pytest.mark.once
def test_saves_are_favoured_and_every_call_has_its_turn() -> None:
    training = Training(ranks=2, stage=1, asynchronous=False, keep=2)
    drawn = [draw_fault(random.Random(number), training) for number in range(1000)]
    kinds = [kind for kind, _ in drawn]
    for call in CALLS:
        assert f"{call} fails" in kinds and f"killed before {call}" in kinds
    assert sum(kind != "killed anywhere" for kind in kinds) > 800
    assert {len(fault["ranks"]) for _, fault in drawn} == {1, 2}


@pytest.mark.once
def test_a_loss_that_differs_is_noticed(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The campaign can fail: here one loss of the last life is not what it was."""
    live = kill_campaign.live

    def changed(*arguments: object) -> object:
        ended, life = live(*arguments)  # type: ignore[arg-type]
        if arguments[1] is None:
            life.losses[max(life.losses)] = "0x0p+0"
        return ended, life

    monkeypatch.setattr(kill_campaign, "live", changed)
    assert "the loss of step" in campaign.run(0).wrong
