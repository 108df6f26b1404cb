"""Kill a training again and again, at the worst moments, and see it go on as if nothing had been.

    PYTHONPATH=tests python tests/kill_campaign.py [--runs 200] [--seed 0] [--json FILE]

Each run draws a training (2 or 3 ranks, a stage, how it saves) and something that happens to it:
SIGKILL to one rank or to all, before, in or after a call that saving is made of, or anywhere; slow
disks; full and broken ones. Then the same training is started again, and must

* go on from the newest checkpoint that was complete, and from none older than one it was told of;
* have, in every step of every life, bit for bit the loss of a training that nothing happened to;
* leave no more checkpoints than it is to keep, and nothing half done.
"""

from __future__ import annotations

import argparse
import errno
import json
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from support.launch import Finished, LaunchTimeoutError, mpirun

PROGRAM = Path(__file__).parent / "support" / "killed_training.py"
STEPS, EVERY = 26, 4
SECONDS = 60.0  # a life that has not ended by then hangs

# Calls of the file layer, and how often one save makes them, about: on rank 0, and on others.
CALLS = {
    "create": (6, 0), "open_to_write": (8, 3), "write_at": (20, 12), "sync": (10, 3),
    "close": (8, 3), "write_whole": (2, 0), "sync_folder": (2, 0), "rename": (1, 0),
}  # fmt: skip
ON_ALL = ("open_to_write", "write_at", "sync", "close")


@dataclass(frozen=True)
class Training:
    """What is trained, and how it saves."""

    ranks: int
    stage: int
    asynchronous: bool
    keep: int


@dataclass
class Life:
    """What a run did from one start to its end."""

    first: int | None = None
    losses: dict[int, str] = field(default_factory=dict)
    saved: int = 0
    done: bool = False


@dataclass(frozen=True)
class Verdict:
    """A run of the campaign: what happened, and what was wrong, if anything."""

    number: int
    kind: str
    fired: bool
    wrong: str = ""


class Campaign:
    """Runs by number; the same seed and number give the same run."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._references: dict[tuple[int, int], dict[int, str]] = {}

    def run(self, number: int) -> Verdict:
        """One training, what happens to it, and its resurrection."""
        draw = random.Random(f"{self._seed}, {number}")
        training = Training(
            draw.choice((2, 2, 3)), draw.randrange(4), draw.random() < 0.5, draw.choice((1, 2, 3))
        )
        kind, fault = draw_fault(draw, training)
        try:
            with tempfile.TemporaryDirectory(prefix="mpizero-campaign-") as folder:
                fired = self._live_twice(training, fault, Path(folder), draw.random() < 0.2)
        except (WrongError, LaunchTimeoutError) as error:
            return Verdict(number, kind, True, f"{training}, {fault}: {error}")
        return Verdict(number, kind, fired)

    def _live_twice(
        self, training: Training, fault: dict[str, Any], folder: Path, again: bool
    ) -> bool:
        """The life that something happens to, perhaps another one, and the last."""
        expected = self._reference(training)
        told = 0
        faults: list[dict[str, Any] | None] = [fault, fault, None] if again else [fault, None]
        fired = False
        for number, each in enumerate(faults):
            newest = max(complete(folder / "run"), default=0)
            if newest < told:
                raise WrongError(f"step {told} was saved, and there is none after {newest}")
            ended, life = live(training, each, folder, number)
            fired |= number == 0 and (ended.returncode != 0 or "failed" in log(folder, 0))
            if life.first is not None and life.first != newest:
                raise WrongError(f"went on from {life.first}, and the newest was {newest}")
            for step, loss in life.losses.items():
                if loss != expected[step]:
                    raise WrongError(f"life {number}: the loss of step {step} differs")
            told = max(told, life.saved)
        if ended.returncode or not life.done:
            raise WrongError(f"the last life ended with {ended.returncode}: {ended.stderr[-2000:]}")
        if sorted(life.losses) != list(range(newest, STEPS)):
            raise WrongError(f"after {newest} it ran the steps {sorted(life.losses)}")
        left = sorted(each.name for each in (folder / "run").iterdir())
        if [name for name in left if not re.fullmatch(r"step-\d{8}", name)]:
            raise WrongError(f"left behind: {left}")
        if len(left) > training.keep:
            raise WrongError(f"{training.keep} were to be kept, and there are {left}")
        return fired

    def _reference(self, training: Training) -> dict[int, str]:
        """The losses of a training that nothing happens to; those of all stages in one launch."""
        if (training.ranks, 0) not in self._references:
            each = [replace(training, stage=stage) for stage in range(4)]
            with tempfile.TemporaryDirectory() as folder:
                folders = [Path(folder) / str(stage) for stage in range(4)]
                for own in folders:
                    own.mkdir()
                configs = [config(*pair, None, 0) for pair in zip(each, folders, strict=True)]
                ended = start(training.ranks, configs)
                lives = [read(own, 0) for own in folders]
            if ended.returncode or any(len(life.losses) != STEPS for life in lives):
                raise WrongError(f"nothing happened, and yet: {ended.stderr[-2000:]}")
            for stage, life in enumerate(lives):
                self._references[training.ranks, stage] = life.losses
        return self._references[training.ranks, training.stage]


class WrongError(Exception):
    """A run did not go on as it must."""


def draw_fault(draw: random.Random, training: Training) -> tuple[str, dict[str, Any]]:
    """What happens: its kind, and the details for the program."""
    one, all_ranks = [draw.randrange(training.ranks)], list(range(training.ranks))
    ranks = all_ranks if draw.random() < 0.3 else one
    chance = draw.random()
    if chance < 0.15:  # anywhere; a step takes a few milliseconds, a save some more
        moment = {"step": draw.randrange(1, STEPS), "after": draw.uniform(0, 0.03)}
        return "killed anywhere", {"ranks": ranks, **moment}
    if chance < 0.3:  # in the middle of a save that takes long
        moment = {"step": draw.randrange(1, STEPS), "after": draw.uniform(0, 0.3)}
        never = {"call": "write_at", "first": 0, "calls": 0, "slow": 0.02}
        return "killed while writing slowly", {"ranks": ranks, **moment, **never}
    call = draw.choice([*CALLS] if 0 in ranks else ON_ALL)
    often = CALLS[call][0 if 0 in ranks else 1]
    at = {"ranks": ranks, "call": call, "first": draw.randrange(1, 4 * often + 1)}
    if chance < 0.45:
        number = draw.choice((errno.ENOSPC, errno.EIO))
        failing = {**at, "calls": draw.choice((1, 3, 10_000)), "errno": number}
        return f"{call} fails", failing
    moments = ("before", "half", "after") if call == "write_at" else ("before", "after")
    when = draw.choice(moments)
    return f"killed {when} {call}", {**at, "calls": 1, "moment": when}


def live(
    training: Training, fault: dict[str, Any] | None, folder: Path, number: int
) -> tuple[Finished, Life]:
    """Start the training, and wait for its end, whatever that is."""
    ended = start(training.ranks, [config(training, folder, fault, number)])
    return ended, read(folder, number)


def config(
    training: Training, folder: Path, fault: dict[str, Any] | None, number: int
) -> dict[str, Any]:
    """What the program is to do in its life of that number."""
    return {
        "folder": str(folder / "run"), "log": str(folder / f"log-{number}"), "fault": fault,
        "stage": training.stage, "asynchronous": training.asynchronous, "keep": training.keep,
        "every": EVERY, "steps": STEPS,
    }  # fmt: skip


def start(ranks: int, configs: Sequence[dict[str, Any]]) -> Finished:
    """Run the program to its end; raises LaunchTimeoutError if it hangs."""
    return mpirun(ranks, [str(PROGRAM), json.dumps(configs)], timeout=SECONDS)


def read(folder: Path, number: int) -> Life:
    """What the log of a life says."""
    life = Life()
    for line in log(folder, number).splitlines():
        what, *numbers = line.split()
        if what == "from":
            life.first = int(numbers[0])
        elif what == "loss":
            life.losses[int(numbers[0])] = numbers[1]
        elif what == "saved":
            life.saved = int(numbers[0])
        elif what == "done":
            life.done = True
    return life


def log(folder: Path, number: int) -> str:
    path = folder / f"log-{number}"
    return path.read_text() if path.exists() else ""


def complete(folder: Path) -> list[int]:
    """The steps of the checkpoints that are whole, by their names and manifests alone."""
    whole = [each.parent.name for each in folder.glob("*/manifest.json")]
    return [int(name[5:]) for name in whole if re.fullmatch(r"step-\d{8}", name)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign, and print a table of what happened how often."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write every run's verdict")
    options = parser.parse_args(arguments)
    campaign = Campaign(options.seed)
    verdicts = []
    for number in range(options.first, options.first + options.runs):
        verdicts.append(campaign.run(number))
        said = verdicts[-1].wrong or ("ok" if verdicts[-1].fired else "ok (nothing had happened)")
        print(f"run {number}: {verdicts[-1].kind}: {said}", flush=True)
    kinds = Counter(each.kind for each in verdicts)
    wrong = [each for each in verdicts if each.wrong]
    print(f"\n{'what happened':<32} {'runs':>5} {'wrong':>6}")
    for kind in sorted(kinds):
        print(f"{kind:<32} {kinds[kind]:>5} {sum(each.kind == kind for each in wrong):>6}")
    fired = sum(each.fired for each in verdicts)
    right = len(verdicts) - len(wrong)
    print(f"\n{right} of {len(verdicts)} went on rightly; something had happened in {fired}")
    if options.json:
        options.json.write_text(json.dumps([vars(each) for each in verdicts], indent=1))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
