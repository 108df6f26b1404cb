"""Train tiny models of transformers' architectures sharded, beside one process.

    mpirun -n 2 python tests/conformance/models.py [--only NAME ...] [--every N] [--lines FILE]

Each takes three steps in float32 at stages 0, 2, 3 and 3 without shared parameters, and must have
the losses and the parameters of one process with the whole batch; and one backward pass in bfloat16
and float16, whose gradient's norm must be that of one process in float32. What is no better in one
process in 16 bits, without mpizero, is the model's own. Ends with 1 if anything else differs, or
raises.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder of all tests, not this one

import torch  # noqa: E402

import mpizero_torch as mz  # noqa: E402
from conformance.architectures import Architecture, architectures  # noqa: E402

STEPS, PER_RANK, RATE = 3, 2, 0.05
WAYS: dict[str, dict[str, Any]] = {
    "stage 0": {"stage": 0},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3},
    "stage 3 private": {"stage": 3, "share_parameters": False, "segment_mb": 0.05},
}
# Of the largest element: float32 rounds at 6e-8, and a model sums some hundred terms.
EXACT = 1e-5
# Of the norm. The scale is one with which no gradient of these models overflows.
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
OF_THE_NORM, SCALE = 2e-2, 64.0
LEFT_OUT = "left out"
OWN = "as in one process: "  # the model's own doing


def train(found: Architecture, size: int, **way: Any) -> tuple[list[float], dict[str, Any]]:
    """Losses of the whole batch, and the parameters after the last step; alone without ``way``."""
    model, rank = found.make(), 0
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=RATE)
    if way:
        model, optimizer = mz.zero(model, optimizer, **way)
        rank = mz.init().rank
    losses = []
    for step in range(STEPS):
        batch = found.batch(size * PER_RANK, step)
        own = {key: _part(value, rank) if way else value for key, value in batch.items()}
        loss = model(**own).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(mz.mean(loss.detach())) if way else float(loss.detach()))
    return losses, {key: value.clone() for key, value in model.state_dict().items()}


def norm(found: Architecture, size: int, **way: Any) -> float:
    """Of the first gradient."""
    model, rank = found.make(), 0
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=RATE)
    if way:
        model, optimizer = mz.zero(model, optimizer, **way)
        rank = mz.init().rank
    batch = found.batch(size * PER_RANK, 0)
    own = {key: _part(value, rank) if way else value for key, value in batch.items()}
    model(**own).loss.backward()
    if way:
        return float(mz.clip_grad_norm_(model, math.inf))
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf))


def norm_alone(found: Architecture, size: int, dtype: torch.dtype) -> float:
    """Of the first gradient of one process whose model is in 16 bits, without mpizero."""
    model = found.make().to(dtype)
    batch = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in found.batch(size * PER_RANK, 0).items()
    }
    (model(**batch).loss.float() * SCALE).backward()
    gradients = [p.grad.double() for p in model.parameters() if p.grad is not None]
    return math.sqrt(sum(float(each.pow(2).sum()) for each in gradients)) / SCALE


def check(found: Architecture) -> dict[str, str]:
    """For each way "" or what is wrong. Collective."""
    world = mz.init()
    losses, parameters = train(found, world.size)
    results = {}
    for name, way in WAYS.items():
        results[name] = _of_all(lambda way=way: _compare(found, way, losses, parameters))
    expected = norm(found, world.size)
    for name, dtype in HALF.items():
        precision = mz.MixedPrecision(dtype, initial_scale=SCALE)
        results[name] = _of_all(
            lambda precision=precision: _compare_norm(
                expected, norm(found, world.size, stage=2, precision=precision)
            )
        )
        if results[name]:
            results[name] = _or_own(results[name], expected, found, dtype)
    gc.collect()
    return results


def _or_own(said: str, expected: float, found: Architecture, dtype: torch.dtype) -> str:
    """Say so if one process has the same trouble with this dtype."""
    try:
        alone = norm_alone(found, mz.init().size, dtype)
    except Exception as error:
        return f"{OWN}{type(error).__name__}: {str(error)[:100]}"
    wrong = _compare_norm(expected, alone)
    return f"{OWN}{wrong}" if wrong else said


def _compare(
    found: Architecture, way: dict[str, Any], losses: list[float], parameters: dict[str, Any]
) -> str:
    its_losses, its = train(found, mz.init().size, **way)
    for step, (ours, theirs) in enumerate(zip(its_losses, losses, strict=True)):
        if not abs(ours - theirs) <= EXACT * max(1.0, abs(theirs)):
            return f"loss {step} is {ours:.8g} for {theirs:.8g}"
    if its.keys() != parameters.keys():
        return f"other names: {sorted(its.keys() ^ parameters.keys())[:4]}"
    for key, value in parameters.items():
        if value.is_floating_point():
            most = max(1.0, float(value.abs().max())) if value.numel() else 1.0
            differs = float((its[key] - value).abs().max()) if value.numel() else 0.0
            if not differs <= EXACT * most:
                return f"'{key}' differs by {differs:.3g}"
    return ""


def _compare_norm(expected: float, found: float) -> str:
    if abs(found - expected) <= OF_THE_NORM * expected:
        return ""
    return f"the gradient's norm is {found:.5g} for {expected:.5g}"


def _of_all(work: Any) -> str:
    """What is wrong on the first rank on which something is."""
    try:
        said = work()
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        said = (
            f"{type(error).__name__}: {str(error)[:300]} ({Path(line.filename).name}:{line.lineno})"
        )
    every = mz.init().gather_objects(said)
    return next((each for each in every if each), "")


def _part(value: torch.Tensor, rank: int) -> torch.Tensor:
    return value[rank * PER_RANK : (rank + 1) * PER_RANK]


def _note(lines: Path | None, name: str, found: dict[str, str]) -> None:
    """At once: the next one may end the launch."""
    if lines and mz.init().rank == 0:
        with lines.open("a") as file:
            file.write(json.dumps({name: found}) + "\n")


def main() -> int:
    """Run them all, or some."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="*", help="these, by their names")
    parser.add_argument("--every", type=int, default=1, help="only each so many-th")
    parser.add_argument("--lines", type=Path, help="add what was found, a line of JSON for each")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    world = mz.init()
    table: dict[str, Any] = {}
    number = 0
    only = chosen.only

    def wanted(name: str) -> bool:
        return not only or name in only

    for name, found, why in architectures(wanted):
        # All ranks must go on with the same.
        if not all(world.gather_objects(found is not None)) or found is None:
            table[name] = {LEFT_OUT: why}
            _note(chosen.lines, name, table[name])
            continue
        number += 1
        if (number - 1) % chosen.every:
            continue
        results = table[name] = check(found)
        _note(chosen.lines, name, results)
        wrong = {way: said for way, said in results.items() if said}
        if world.rank == 0:
            shown = "; ".join(f"{way}: {said}" for way, said in wrong.items()) or "as one process"
            print(f"{name}: {shown}", flush=True)
    tried = {name: found for name, found in table.items() if LEFT_OUT not in found}
    bad = [
        name
        for name, found in tried.items()
        if any(said and not said.startswith(OWN) for said in found.values())
    ]
    if world.rank == 0:
        print(f"{len(tried)} architectures, {len(bad)} differ: {', '.join(bad) or 'none'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
