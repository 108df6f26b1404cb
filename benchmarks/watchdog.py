"""What being watched costs: training steps with and without the record of calls, in turns.

    mpirun -n 2 python benchmarks/watchdog.py [--model mlp200] [--steps 200] [--json FILE]

Every rank writes down each call that it makes (mpizero/diagnostics/recorder.py), and a thread looks
at that twice a second. The steps of one training take turns at being recorded, so that what
disturbs the machine disturbs both alike. Since the difference drowns in the noise of a step, it is
also worked out: calls a step times the time of writing one down, and the thread's share of a core.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import machine
import numpy as np
import torch
from models import TASKS

import mpizero_torch as mz
from mpizero.diagnostics import recorder as own_recorder
from mpizero.diagnostics.recorder import Lane, Recorder, Span

WARM_UP = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(TASKS), default="mlp200")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    world = mz.init()
    torch.set_num_threads(1)
    task = TASKS[options.model](64)
    model = mz.DistributedDataParallel(task.model())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    recorder, began = own_recorder(), time.perf_counter()
    for step in range(2 * (options.steps + WARM_UP)):
        x, y = task.batch(step * world.size + world.rank)
        is_recorded = (step + step // 2) % 2 == 0  # on, off, off, on: neither is always second
        with nullcontext() if is_recorded else _unrecorded():
            seconds[is_recorded].append(_step(world, model, optimizer, x, y))
    passed = time.perf_counter() - began
    found: dict[str, float] = {
        name: _slowest(world, seconds[on]) for name, on in (("on", True), ("off", False))
    }
    found["calls a step"] = _calls_of(recorder, lambda: _step(world, model, optimizer, x, y))
    found["seconds a call"] = _seconds_a_call(recorder)
    found["thread of a core"] = _watchdog_seconds() / passed
    found["share of a step"] = (
        found["calls a step"] * found["seconds a call"] / found["on"] + found["thread of a core"]
    )
    if world.rank == 0:
        print(
            f"{options.model}, {world.size} ranks: a step takes {found['on'] * 1e3:.2f} ms, and "
            f"{found['off'] * 1e3:.2f} ms without being recorded\n"
            f"  {found['calls a step']:.0f} calls a step, {found['seconds a call'] * 1e6:.2f} us "
            f"each; the watchdog's thread takes {found['thread of a core']:.3%} of a core"
            f": {found['share of a step']:.3%} of a step together"
        )
        if options.json:
            options.json.write_text(json.dumps({"machine": machine.describe(), **found}, indent=1))


def _step(world: Any, model: Any, optimizer: Any, x: Any, y: Any) -> float:
    world.barrier()
    start = time.perf_counter()
    model(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def _slowest(world: Any, seconds: list[float]) -> float:
    """The median over steps, of the slowest rank in each."""
    return float(np.median(world.allreduce(np.array(seconds[WARM_UP:]), "max")))


@contextmanager
def _unrecorded() -> Iterator[None]:
    """No call, line or span is written down meanwhile."""
    span = Span("", 0, 0)
    lane = mock.patch.multiple(
        Lane,
        begin=lambda self, what, nbytes=0, line=0: 0,
        agreed=lambda self, at: None,
        end=lambda self, at: None,
    )
    recorder = mock.patch.multiple(
        Recorder,
        here=lambda self: 0,
        begin_span=lambda self, name: span,
        end_span=lambda self, opened: None,
    )
    with lane, recorder:
        yield


def _calls_of(recorder: Recorder, work: Any) -> float:
    before = recorder.record.calls(time.monotonic_ns())[-1].number
    work()
    return float(recorder.record.calls(time.monotonic_ns())[-1].number - before)


def _seconds_a_call(recorder: Recorder) -> float:
    """Median of many batches of begin, agreed and end, with the line of code looked up."""
    lane = recorder.lane("0", "blocking")
    samples = []
    for _ in range(200):
        start = time.perf_counter()
        for _ in range(100):
            at = lane.begin("allreduce(float32, shape (1000,))", 4000, recorder.here())
            lane.agreed(at)
            lane.end(at)
        samples.append((time.perf_counter() - start) / 100)
    return float(np.median(samples))


def _watchdog_seconds() -> float:
    for thread in threading.enumerate():
        if thread.name == "mpizero-watchdog" and thread.ident is not None:
            return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return 0.0


if __name__ == "__main__":
    main()
