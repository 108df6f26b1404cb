"""Random programs of what users do, on all ranks, against one process that does the same.

    mpirun -n 2 python tests/support/programs.py --count 2000 --seed 0

A program is drawn from its seed alone, so that all ranks have the same one. After each backward
pass that averages, and after each step, parameters, gradients and buffers are compared with those
of the oracle. A program ends with its last step ("clean"), with an MpizeroError ("refused"), or
with a fault: another value, another exception, ranks that wait for each other.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from mpi4py import MPI
from torch import nn

import mpizero_torch as mz
from support.program_draw import Draw, Setting
from support.program_oracle import Oracle, RefusalExpectedError, compare
from support.program_sides import (
    After,
    Before,
    Joined,
    Net,
    Saved,
    Shape,
    Side,
    clone,
)
from support.program_steps import Step, draw_steps

_PATIENCE_SECONDS = 60.0

BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Program:
    """A setting and the steps in it."""

    seed: int
    setting: Setting
    steps: list[Step]

    def listing(self, until: int | None = None) -> str:
        """As text; ``until``: the step that was the last."""
        lines = [f"program {self.seed}: {self.setting}"]
        for step in self.steps[: None if until is None else until + 1]:
            lines.append(f"  {step.number}: {step}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Outcome:
    """How a program ended on all ranks."""

    kind: str  # "clean", "refused", "faulty", "void"
    text: str = ""


def draw_program(seed: int, size: int) -> Program:
    """The program of a seed."""
    rng = random.Random(seed)
    conv = rng.random() < 0.2
    shapes = tuple(
        Shape(conv, norm=rng.random() < 0.3, count=rng.random() < 0.2)
        for _ in range(rng.choice((1, 2)))
    )
    options = tuple(
        {
            name: rng.choice(values)
            for name, values in (
                ("gradient_as_bucket_view", (True, False)),
                ("bucket_cap_mb", (1e-5, 1e-4)),
                ("overlap", (False,)),
            )
            if rng.random() < 0.5
        }
        for _ in shapes
    )
    setting = Setting(
        shapes,
        options,
        progress=rng.choice(("thread", "inline")),
        # Alone, a module that was not weighed before its first forward does not watch it.
        weights=rng.choices(("never", "always", "mixed"), (6, 3, 1))[0] if size > 1 else "never",
        optimizer=rng.choice(("SGD", "SGD momentum", "AdamW", "AdamW fused")),
        # Alone, torch itself calls them, under no_sync too.
        hooks=rng.choices(("", "before", "after"), (8, 1, 1))[0] if size > 1 else "",
        converts=rng.random() < 0.15,
    )
    steps = draw_steps(Draw(rng, size, setting), rng.randrange(4, 16))
    return Program(seed, setting, steps)


def make_optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    """By its name in a Setting."""
    if name.startswith("SGD"):
        momentum = 0.9 if "momentum" in name else 0.0
        return torch.optim.SGD(parameters, lr=0.05, momentum=momentum)
    # Of eps no less than what rounding makes of a gradient that is 0.
    return torch.optim.AdamW(parameters, lr=0.01, eps=1e-3, fused="fused" in name)


def _hooks(side: Side, setting: Setting) -> dict[nn.Parameter, Any]:
    """For each parameter what is called with its averaged gradient."""
    found: dict[nn.Parameter, Any] = {}
    if not setting.hooks:
        return found
    for model in range(len(side.models)):
        for parameter in side.parameters(model):
            optimizer = make_optimizer(setting.optimizer, [parameter])
            found[parameter] = lambda p, optimizer=optimizer: optimizer.step()
    return found


class Run:
    """One program on this rank."""

    def __init__(self, program: Program, world: mz.World, comm: MPI.Comm, folder: str) -> None:
        self._program, self._comm = program, comm
        setting = program.setting
        nets = [Net(shape, 5 + at) for at, shape in enumerate(setting.shapes)]
        copies = [Side(rank, world.size, clone(nets), real=False) for rank in range(world.size)]
        self._side = side = Side(world.rank, world.size, list(nets), real=True)
        side.store["folder"] = folder
        if setting.hooks == "before":
            self._install(side)
        side.models = [
            mz.DistributedDataParallel(net, world=world, **options)
            for net, options in zip(nets, setting.options, strict=True)
        ]
        if setting.hooks == "after":
            self._install(side)
        for each in [side, *copies]:
            each.optimizers = [
                None if setting.hooks else make_optimizer(setting.optimizer, model.parameters())
                for model in each.models
            ]
        self._oracle = Oracle(copies, [_hooks(each, setting) for each in copies])
        self._bound = BOUNDS[torch.float64]
        self._at = 0

    def outcome(self) -> Outcome:
        """Run it to its end."""
        for at, step in enumerate(self._program.steps):
            self._at = at
            if not step.applies(self._oracle):
                continue
            found = self._one(step)
            if found is not None:
                return found
        return Outcome("clean")

    def _install(self, side: Side) -> None:
        for parameter, hook in _hooks(side, self._program.setting).items():
            parameter.register_post_accumulate_grad_hook(hook)

    def _one(self, step: Step) -> Outcome | None:
        """Do a step on both sides, segment by segment; an Outcome if it is the last."""
        size = len(self._oracle.sides)
        copies = [step.events(side) for side in self._oracle.sides]
        mine = step.events(self._side)
        while True:
            refusal = False
            try:
                events = [next(each, None) for each in copies]
                if isinstance(events[0], Before):
                    self._oracle.before(events)  # type: ignore[arg-type]
                elif isinstance(events[0], After):
                    self._oracle.after(events[0])
                elif isinstance(events[0], Joined):
                    self._oracle.joined(events)  # type: ignore[arg-type]
                elif isinstance(events[0], Saved):
                    self._oracle.saved(events[0])
            except RefusalExpectedError:
                refusal = True
            except RuntimeError as error:
                return Outcome("void", f"{type(error).__name__}: {error}")
            kind, said = self._real(mine, more=not refusal)
            if refusal and not kind:
                kind, said = "faulty", "accepted what has no meaning"
            found = self._agree(kind, said)
            if found is not None or events == [None] * size:
                return found

    def _real(self, mine: Iterator[Any], more: bool) -> tuple[str, str]:
        try:
            event = next(mine, None)
        except mz.MpizeroError as error:
            return "refused", f"{type(error).__name__}: {error}"
        except Exception:
            return "faulty", traceback.format_exc(limit=-6)
        if not more or isinstance(event, Before):
            return "", ""
        dtype = self._side.parameters(0)[0].dtype
        self._bound = max(self._bound, BOUNDS[dtype])
        found = compare(self._side, self._oracle, self._bound)
        return ("faulty", "\n    ".join(found[:8])) if found else ("", "")

    def _agree(self, kind: str, said: str) -> Outcome | None:
        """Tell the other ranks; end the job if they do not answer."""
        arrived = self._comm.Ibarrier()
        deadline = time.monotonic() + (10.0 if kind else _PATIENCE_SECONDS)
        while not arrived.Test():
            if time.monotonic() > deadline:
                self._end(kind, said)
            time.sleep(0)
        of_all = self._comm.allgather((kind, said))
        kinds = {kind for kind, _ in of_all} - {""}
        if not kinds:
            return None
        worst = "refused" if "refused" in kinds else "faulty"
        lines = [f"  rank {rank}: {text}" for rank, (_, text) in enumerate(of_all) if text]
        return Outcome(worst, "\n".join([self._program.listing(self._at), *lines]))

    def _end(self, kind: str, said: str) -> None:
        verdict = "ENDED" if kind == "refused" else "FAULTY (ranks wait)"
        print(
            f"{verdict} {self._program.listing(self._at)}\n  rank {self._comm.rank}: {said}",
            flush=True,
        )
        MPI.COMM_WORLD.Abort(3 if kind == "refused" else 4)


@contextmanager
def _progress(mode: str) -> Iterator[None]:
    before = os.environ.get("MPIZERO_PROGRESS")
    os.environ["MPIZERO_PROGRESS"] = mode
    try:
        yield
    finally:
        del os.environ["MPIZERO_PROGRESS"]
        if before is not None:
            os.environ["MPIZERO_PROGRESS"] = before


_worlds: dict[str, mz.World] = {}  # for each way of progress, until a program fails in it


def run_program(program: Program, comm: MPI.Comm) -> Outcome:
    """Run a program on all ranks. Collective."""
    progress = program.setting.progress
    with _progress(progress):
        world = _worlds.get(progress) or mz.init().split(0)
        assert world is not None
        _worlds[progress] = world
        folder = comm.bcast(tempfile.mkdtemp(prefix="programs-") if comm.rank == 0 else None)
        outcome = Run(program, world, comm, folder).outcome()
    if comm.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    if outcome.kind != "clean":
        del _worlds[progress]  # something may have been left half done in it
    gc.collect()  # which sets lanes free for the next one
    return outcome


@contextmanager
def programs() -> Iterator[MPI.Comm]:
    """Around a run of programs: the communicator by which their ranks agree. Collective."""
    comm = MPI.COMM_WORLD.Dup()
    frozen = gc.get_freeze_count()  # as in a session of tests, which stays as it is
    if not frozen:
        gc.freeze()  # what is there already need not be looked through after each
    try:
        yield comm
    finally:
        if not frozen:
            gc.unfreeze()
    while _worlds:
        _worlds.popitem()[1].close()
    comm.Free()


def main() -> None:
    """A long run."""
    parser = argparse.ArgumentParser(description="Random programs against one process.")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="store_true", help="at the first fault")
    parser.add_argument("--refusals", action="store_true", help="show them, too")
    chosen = parser.parse_args()
    world = mz.init()
    counted: Counter[str] = Counter()
    with programs() as comm:
        for seed in range(chosen.seed, chosen.seed + chosen.count):
            outcome = run_program(draw_program(seed, world.size), comm)
            counted[outcome.kind] += 1
            shown = outcome.kind == "faulty" or (chosen.refusals and outcome.kind != "clean")
            if world.rank == 0 and shown:
                print(f"{outcome.kind.upper()} {outcome.text}", flush=True)
            if outcome.kind == "faulty" and chosen.stop:
                break
            if world.rank == 0 and sum(counted.values()) % 50 == 0:
                print(f"to seed {seed}: {_table(counted)}", flush=True)
    if world.rank == 0:
        print(_table(counted), flush=True)


def _table(counted: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counted.items()))


if __name__ == "__main__":
    main()
