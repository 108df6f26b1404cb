"""Random programs of what users do with ``mz.zero``, against one process that does the same.

    mpirun -n 2 python tests/support/program_zero.py --count 2000 --seed 0
    mpirun -n 2 python tests/support/program_zero.py --minimise 17

A program is drawn from its seed alone, so that all ranks have the same one. Beside it every rank
does the same in plain torch with all ranks' batches, and compares. A program ends with its last
step ("clean"), with an MpizeroError on all ranks ("refused"), or with a fault: another value,
another exception, an error on some ranks only, ranks that wait for each other.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from mpi4py import MPI

import mpizero_torch as mz
from support.placements import pretended
from support.program_zero_passes import Draw
from support.program_zero_sides import Net, Setting, Side, make_sides
from support.program_zero_steps import Step, draw_steps, random_of

_PATIENCE_SECONDS = 90.0


@dataclass(frozen=True)
class Program:
    """A setting and the steps in it."""

    seed: int
    setting: Setting
    steps: tuple[Step, ...]

    def listing(self, until: int | None = None) -> str:
        """As text; ``until``: the step that was the last."""
        lines = [f"program {self.seed} on {len(self.setting.nodes)} ranks: {self.setting}"]
        for step in self.steps[: None if until is None else until + 1]:
            lines.append(f"  {step.number}: {step}")
        return "\n".join(lines)

    def without(self, numbers: Collection[int]) -> Program:
        """The same, but for these steps."""
        return replace(self, steps=tuple(each for each in self.steps if each.number not in numbers))


@dataclass(frozen=True)
class Outcome:
    """How a program ended on all ranks."""

    kind: str  # "clean", "refused", "faulty", "void"
    text: str = ""
    reason: str = ""


def draw_program(seed: int, size: int) -> Program:
    """The program of a seed."""
    rng = random_of(seed)
    setting = _draw_setting(rng, size)
    names = [name for name, _ in Net(setting.tied, setting.norm).named_parameters()]
    return Program(
        seed, setting, tuple(draw_steps(Draw(rng, size, setting, names), rng.randrange(4, 18)))
    )


def _draw_setting(rng: Any, size: int) -> Setting:
    stage = rng.choice((0, 1, 2, 2, 3, 3, 3))
    nodes = rng.choice(("A" * size, "A" * size, "ABC"[:size], "AAB"[:size]))
    one_node = len(set(nodes)) == 1
    share = rng.choice((None, False)) if one_node else False
    precision = rng.choice((None,) * 8 + ("bf16", "fp16")) if stage else None
    partition = rng.choice(("auto", "flat", "parameter"))
    optimizers = [
        "SGD", "SGD momentum", "SGD foreach", "AdamW", "AdamW foreach", "AdamW fused", "Adam",
        "Adagrad", "RMSprop", "NAdam",
    ]  # fmt: skip
    if partition != "flat" or not stage:
        optimizers += ["Adafactor"]
    optimizer = rng.choice(optimizers) if precision is None else "SGD"
    several = rng.random() < 0.15
    counts = {nodes.count(each) for each in nodes}
    groups = ("world", "world", "world", 1, *(["node"] if len(counts) == 1 else []))
    return Setting(
        stage=stage,
        share=share,
        nodes=nodes,
        progress=rng.choice(("thread", "inline")),
        partition=partition,
        segment_mb=rng.choice((6e-5, 2e-4, 1.0)),
        shard_group=rng.choice(groups) if stage else "world",
        optimizer=optimizer,
        groups=1 if several else rng.choice((1, 1, 2)),
        several=several,
        late=rng.random() < 0.3,
        tied=rng.random() < 0.3,
        norm=rng.random() < 0.1 and precision is None,
        dtype="float64" if precision is None else "float32",
        precision=precision,
        compare=rng.choice(("each", "some", "end", "end")),
        compiled=rng.random() < 0.05 and not (stage == 3 and share is False) and precision is None,
        ema=rng.random() < 0.15,
    )


class Run:
    """One program on this rank."""

    def __init__(self, program: Program, world: mz.World, comm: MPI.Comm, folder: str) -> None:
        self._program, self._comm = program, comm
        self._real, self._oracle = make_sides(program.setting, world, folder)
        self._at = -1

    def outcome(self) -> Outcome:
        """Run it to its end."""
        setting, count = self._program.setting, len(self._program.steps)
        for at, step in enumerate(self._program.steps):
            self._at = at
            if not step.applies(self._oracle):
                continue
            try:
                step.act(self._oracle)
            except Exception:
                return Outcome("void", traceback.format_exc(limit=-4))
            compares = setting.compare == "each" or (setting.compare == "some" and at % 3 == 2)
            found = self._agree(*self._do(step, compares))
            if found is not None:
                return found
        self._at = count - 1
        return self._agree(*self._do(None, True)) or Outcome("clean")

    def _do(self, step: Step | None, compares: bool) -> tuple[str, str]:
        """(what came of it, in words): a step on this side, and a comparison."""
        try:
            if step is not None:
                step.act(self._real)
            found = compare(self._real, self._oracle, compares, step is None)
        except mz.MpizeroError as error:
            return "refused", f"{type(error).__name__}: {error}"
        except Exception:
            return "faulty", traceback.format_exc(limit=-8)
        return ("faulty", "\n    ".join(found[:8])) if found else ("", "")

    def _agree(self, kind: str, said: str) -> Outcome | None:
        """Tell the other ranks; end the job if they do not answer."""
        arrived = self._comm.Ibarrier()
        deadline = time.monotonic() + (30.0 if kind else _PATIENCE_SECONDS)
        while not arrived.Test():
            if time.monotonic() > deadline:
                listing = self._program.listing(self._at)
                print(
                    f"FAULTY (ranks wait) {listing}\n  rank {self._comm.rank}: {said}", flush=True
                )
                MPI.COMM_WORLD.Abort(4)
            time.sleep(0.0003)
        of_all = self._comm.allgather((kind, said))
        kinds = {kind for kind, _ in of_all}
        if kinds == {""}:
            return None
        worst = "refused" if kinds == {"refused"} else "faulty"
        lines = [f"  rank {rank}: {text or 'nothing'}" for rank, (_, text) in enumerate(of_all)]
        text = "\n".join([self._program.listing(self._at), *lines])
        return Outcome(worst, text, of_all[0][1])


def compare(real: Side, oracle: Side, values: bool, states: bool) -> list[str]:
    """What all ranks have that one process has not. Collective with ``values``."""
    exact = real.setting.precision is None
    bound = 1e-9 if exact else 0.2
    found = []
    for (label, got), (_, wanted) in zip(real.results, oracle.results, strict=True):
        found += list(_differences(label, got, wanted, bound))
    real.results.clear()
    oracle.results.clear()
    # With both names of what is tied: parameters that were assigned are tied no longer.
    its = dict(oracle.net.named_parameters(remove_duplicate=False))
    for name, p in real.named if values else ():
        found += list(_differences(name, mz.full_parameter(p), its[name].detach(), bound))
        if not oracle.unreduced and id(its[name]) in oracle.members:
            gradient = mz.full_gradient(p)
            found += list(_differences(f"{name}.grad", gradient, its[name].grad, bound))
            if (p.grad is None) != (its[name].grad is None):
                found.append(f"{name}.grad is {'None' if p.grad is None else 'there'}")
    buffers = dict(oracle.net.named_buffers())
    for name, buffer in real.net.named_buffers() if values else ():
        found += list(_differences(name, buffer, buffers[name], bound))
    if states:
        for at, (each, one) in enumerate(zip(real.optimizers, oracle.optimizers, strict=True)):
            found += list(_differences(f"state {at}", each.state_dict(), one.state_dict(), bound))
    return found


def _differences(label: str, got: Any, wanted: Any, bound: float) -> Iterator[str]:
    """How two values differ, in words."""
    if isinstance(wanted, Mapping) and isinstance(got, Mapping):
        if got.keys() != wanted.keys():
            yield f"{label} has {sorted(map(str, got))}, not {sorted(map(str, wanted))}"
            return
        for key in wanted:
            yield from _differences(f"{label}.{key}", got[key], wanted[key], bound)
    elif isinstance(wanted, (list, tuple)) and isinstance(got, (list, tuple)):
        if len(got) != len(wanted):
            yield f"{label} has {len(got)}, not {len(wanted)}"
        for at, (mine, its) in enumerate(zip(got, wanted, strict=False)):
            yield from _differences(f"{label}.{at}", mine, its, bound)
    elif isinstance(wanted, torch.Tensor) and isinstance(got, torch.Tensor):
        said = _difference(got.detach(), wanted.detach(), bound)
        if said:
            yield f"{label} {said}"
    elif isinstance(wanted, float) and isinstance(got, float):
        if not math.isclose(got, wanted, rel_tol=1e-9):
            yield f"{label} is {got}, not {wanted}"
    elif type(got) is not type(wanted) or got != wanted:
        yield f"{label} is {_short(got)}, not {_short(wanted)}"


def _difference(got: torch.Tensor, wanted: torch.Tensor, bound: float) -> str:
    if got.shape != wanted.shape:
        return f"is of shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
    if bound < 1e-3 and got.dtype != wanted.dtype:
        return f"is {got.dtype}, not {wanted.dtype}"
    if not got.numel():
        return ""
    worst = float((got.double() - wanted.double()).abs().max())
    largest = float(wanted.double().abs().max())
    # Of what is small, rounding of what it was computed from remains.
    if worst <= bound * max(largest, 1.0 if bound < 1e-3 else 0.2):
        return ""
    return f"differs by {worst:.3g} (largest {largest:.3g})"


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        largest = float(value.detach().double().abs().max()) if value.numel() else 0.0
        return f"a tensor up to {largest:.3g}"
    return repr(value)[:80]


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


_worlds: dict[tuple[str, str], mz.World] = {}  # until a program fails in it


def run_program(program: Program, comm: MPI.Comm) -> Outcome:
    """Run a program on all ranks. Collective."""
    setting = program.setting
    key = setting.progress, setting.nodes
    with _progress(setting.progress), pretended(setting.nodes):
        world = _worlds.get(key) or mz.init().split(0)
        assert world is not None
        _worlds[key] = world
        folder = comm.bcast(tempfile.mkdtemp(prefix="programs-") if comm.rank == 0 else None)
        outcome = Run(program, world, comm, folder).outcome()
    if comm.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    if outcome.kind != "clean":
        del _worlds[key]  # something may have been left half done in it
    if setting.compiled:
        torch.compiler.reset()
    gc.collect()
    return outcome


@contextmanager
def programs() -> Iterator[MPI.Comm]:
    """Around a run of programs: the communicator by which their ranks agree. Collective."""
    comm = MPI.COMM_WORLD.Dup()
    gc.freeze()  # what is there already need not be looked through after each
    try:
        yield comm
    finally:
        gc.unfreeze()
    while _worlds:
        _worlds.popitem()[1].close()
    comm.Free()


def minimised(program: Program, comm: MPI.Comm) -> Program:
    """The program with as few steps as it takes for the fault. Collective."""
    numbers = [step.number for step in program.steps]
    for number in reversed(numbers):
        shorter = program.without([number])
        if run_program(shorter, comm).kind == "faulty":
            program = shorter
    return program


def main() -> None:
    """A long run."""
    parser = argparse.ArgumentParser(description="Random programs with ZeRO against one process.")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="store_true", help="at the first fault")
    parser.add_argument("--without", default="", help="steps to leave out, separated by commas")
    parser.add_argument("--minimise", type=int, help="the seed of a program with a fault")
    parser.add_argument("--at", help="a file in which to note the seed that is tried")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    world = mz.init()
    left_out = [int(each) for each in chosen.without.split(",") if each]
    with programs() as comm:
        if chosen.minimise is not None:
            program = minimised(draw_program(chosen.minimise, world.size), comm)
            _show(world.rank, run_program(program, comm))
            return
        _campaign(chosen, left_out, world, comm)


def _campaign(chosen: Any, left_out: Sequence[int], world: mz.World, comm: MPI.Comm) -> None:
    counted: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for seed in range(chosen.seed, chosen.seed + chosen.count):
        if chosen.at and world.rank == 0:
            Path(chosen.at).write_text(str(seed))
        outcome = run_program(draw_program(seed, world.size).without(left_out), comm)
        counted[outcome.kind] += 1
        if outcome.kind == "faulty" or (outcome.kind != "clean" and chosen.count == 1):
            _show(world.rank, outcome)
        if outcome.kind != "clean":
            said = outcome.reason if outcome.kind == "refused" else outcome.text[-60:]
            reasons[f"{outcome.kind}: {said[:110]}"] += outcome.kind in ("refused", "void")
        if outcome.kind == "faulty" and chosen.stop:
            break
    if world.rank == 0:
        print(", ".join(f"{count} {kind}" for kind, count in sorted(counted.items())), flush=True)
        for reason, count in reasons.most_common(25):
            print(f"  {count} {reason}")


def _show(rank: int, outcome: Outcome) -> None:
    if rank == 0:
        print(f"{outcome.kind.upper()} {outcome.text}", flush=True)


if __name__ == "__main__":
    main()
