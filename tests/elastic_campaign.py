"""Kill ranks of an elastic training at random moments, and see the others go on.

    PYTHONPATH=tests python tests/elastic_campaign.py [--runs 50] [--seed 0] [--json FILE]

With a Python whose MPI is Open MPI 5. Each run draws a training (2 to 4 ranks, a stage, parameters
shared or not, communication on a thread or not, how often it commits) and who dies when: one or
several ranks, one after the other or together, between two steps, in the middle of backward, of the
optimizer's step or of a commit, or anywhere. The training must end well on the ranks that are left,
and from every death on have, bit for bit, the losses of a training that was restarted from a
checkpoint of that step on so many ranks. Told for each run is the time from a death to the end of
the first step after it, and in that the slowest of all runs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from support.launch import Finished, LaunchTimeoutError, mpirun

PROGRAM = Path(__file__).parent / "support" / "elastic_training.py"
STEPS = 24
SECONDS = 60.0  # a run that has not ended by then hangs
LIMIT = 5.0  # seconds from a death to the first step after it
MOMENTS = ("between", "backward", "update", "commit")
ULFM = ("--with-ft", "ulfm")


@dataclass(frozen=True)
class Training:
    """What is trained, and who dies."""

    ranks: int
    stage: int
    kills: list[dict[str, Any]]
    share: bool | None = None
    thread: bool = False
    every: int = 1
    redundancy: int = 0
    ranks_per_node: int | None = None
    steps: int = STEPS

    @property
    def environment(self) -> dict[str, str]:
        per_node = {"MPIZERO_RANKS_PER_NODE": str(self.ranks_per_node or "")}
        return {"MPIZERO_PROGRESS": "thread" if self.thread else "inline", **per_node}


@dataclass
class Life:
    """What the log of a training says."""

    begins: list[list[int]] = field(default_factory=list)  # step, ranks, global batch
    losses: dict[int, str] = field(default_factory=dict)  # by step, as they were in the end
    pauses: list[float] = field(default_factory=list)  # seconds from a death to the next step
    done: list[str] = field(default_factory=list)

    @property
    def segments(self) -> list[list[int]]:
        """From which step on with how many ranks, as it counted in the end."""
        found: list[list[int]] = []
        for step, ranks, _ in self.begins:
            while found and found[-1][0] >= step:
                found.pop()
            found.append([step, ranks])
        return found


class WrongError(Exception):
    """A run did not go on as it must."""


def run(training: Training, folder: Path) -> Life:
    """Train, with all who die; raises WrongError if it does not end well."""
    log = folder / "log"
    ended = start(training, config(training, {"log": str(log), "kills": training.kills}), ULFM)
    life = read(log)
    if ended.returncode or not life.done:
        raise WrongError(f"ended with {ended.returncode}: {ended.stderr[-3000:]}")
    if sorted(life.losses) != list(range(training.steps)):
        raise WrongError(f"the steps were {sorted(life.losses)}")
    if len({batch for *_, batch in life.begins}) > 1:
        raise WrongError(f"the global batch changed: {life.begins}")
    return life


def expected(
    trainings: Sequence[Training], segments: list[list[int]], batch: int, folder: Path
) -> list[dict[int, str]]:
    """The losses of the same segments, by way of checkpoints on disk, where nobody dies."""
    configs = []
    for number, training in enumerate(trainings):
        own = folder / f"reference-{number}"
        own.mkdir()
        settings = {"log": str(own / "log"), "folder": str(own), "segments": segments}
        configs.append(config(training, {**settings, "batch": batch}))
    ended = start(trainings[0], configs)
    if ended.returncode:
        raise WrongError(f"the reference ended with {ended.returncode}: {ended.stderr[-3000:]}")
    return [read(Path(each["log"])).losses for each in configs]


def judge(training: Training, folder: Path) -> Life:
    """Run it and its reference; raises WrongError where their losses differ by a bit."""
    life = run(training, folder)
    [wanted] = expected([training], life.segments, life.begins[0][2], folder)
    compare(training, life, wanted)
    return life


def compare(training: Training, life: Life, wanted: dict[int, str]) -> None:
    """Raises WrongError where losses differ by a bit."""
    differing = [step for step in range(training.steps) if life.losses[step] != wanted[step]]
    if differing:
        raise WrongError(f"segments {life.segments}: the losses of steps {differing} differ")


def config(training: Training, settings: dict[str, Any]) -> dict[str, Any]:
    """What the program is told."""
    own = ("stage", "share", "every", "redundancy", "steps")
    return {**{name: getattr(training, name) for name in own}, **settings}


def start(training: Training, configs: Any, args: Sequence[str] = ()) -> Finished:
    """Run the program to its end; raises LaunchTimeoutError if it hangs."""
    program = [str(PROGRAM), json.dumps(configs)]
    return mpirun(training.ranks, program, SECONDS, training.environment, args)


def read(log: Path) -> Life:
    """What has been written down."""
    life, killed = Life(), 0.0
    for line in log.read_text().splitlines() if log.exists() else ():
        what, *rest = line.split()
        if what == "begin":
            life.begins.append([int(each) for each in rest])
        elif what == "killed":
            killed = float(rest[0])
        elif what == "loss":
            life.losses[int(rest[0])] = rest[1]
            # Not the step that was under way, which the others may have ended.
            if killed and len(life.begins) > 1 + len(life.pauses):
                life.pauses.append(float(rest[2]) - killed)
        elif what == "done":
            life.done = rest
    return life


def draw(number: int, seed: int) -> Training:
    """The training of a run: the same seed and number give the same."""
    chance = random.Random(f"{seed}, {number}")
    ranks = chance.choice((2, 3, 3, 4))
    mortal = list(range(ranks))
    chance.shuffle(mortal)
    per_node = chance.choice((None, None, None, 1, 2))
    kills, step = [], 0
    for _ in range(chance.choice((1, 1, 2))):
        # Two neighbouring nodes that die at once are more than one copy survives.
        several = () if per_node == 1 else (2,)
        together = min(chance.choice((1, 1, 1, *several)), len(mortal) - 1)
        dying, mortal = mortal[:together], mortal[together:]
        if not dying:
            break
        step += chance.randrange(1, STEPS // 2)
        moment = chance.choice((*MOMENTS, *[str(chance.uniform(0, 0.03))] * 4))
        kills.append({"ranks": dying, "step": step, "moment": moment})
    return Training(
        ranks, chance.randrange(4), kills, chance.choice((None, False)), chance.random() < 0.5,
        chance.choice((1, 1, 3)), int(per_node is not None), per_node,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign, and print what happened."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write every run's verdict")
    options = parser.parse_args(arguments)
    verdicts, pauses, wrong = [], [0.0], 0
    for number in range(options.first, options.first + options.runs):
        training = draw(number, options.seed)
        said, life = "ok", Life()
        try:
            with tempfile.TemporaryDirectory(prefix="mpizero-elastic-") as folder:
                life = judge(training, Path(folder))
        except (WrongError, LaunchTimeoutError) as error:
            said = f"WRONG, {training}: {error}"
        if max(life.pauses, default=0.0) > LIMIT:
            said = f"LATE, {training}"
        wrong += said != "ok"
        pauses += life.pauses
        seconds = ", ".join(f"{pause:.2f} s" for pause in life.pauses) or "nobody died in time"
        moments = ", ".join(f"{each['ranks']} {each['moment'][:6]}" for each in training.kills)
        print(
            f"run {number}: {training.ranks} ranks, stage {training.stage}, killed {moments}: "
            f"{seconds}: {said}", flush=True,
        )  # fmt: skip
        verdicts.append({**asdict(training), "pauses": life.pauses, "said": said})
    print(
        f"\n{options.runs - wrong} of {options.runs} went on rightly; the longest from a death "
        f"to the end of the next step took {max(pauses):.2f} s"
    )
    if options.json:
        options.json.write_text(json.dumps(verdicts, indent=1))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
