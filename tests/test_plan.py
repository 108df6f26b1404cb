"""What is planned is what is measured: bytes held, and bytes between nodes, within a tenth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from mpi4py import MPI
from torch import nn

import mpizero
import mpizero_torch as mz
from mpizero import World
from mpizero.cli import main
from mpizero.collectives.transport import MpiTransport
from mpizero.plan import (
    OPTIMIZERS,
    Limits,
    Machine,
    Model,
    Ranks,
    Settings,
    fewest_ranks,
    link_of,
    memory,
    plan,
    traffic,
)
from mpizero_torch.plan import model_of
from support.placements import Placement, placed

WIDTH, HEIGHT, DEPTH = 256, 768, 10
TENTH = 0.1


def build() -> nn.Module:
    """3.9 million parameters: two segments of the default size in float32."""
    return nn.Sequential(
        *(
            layer
            for _ in range(DEPTH)
            for layer in (nn.Linear(WIDTH, HEIGHT), nn.ReLU(), nn.Linear(HEIGHT, WIDTH))
        )
    )


def train(world: World, stage: int, optimizer: str, precision: str, share: bool) -> Any:
    """A step; returns the model and its optimizer."""
    torch.manual_seed(0)
    model: nn.Module = build()
    kinds: dict[str, Any] = {
        "adamw": lambda p: torch.optim.AdamW(p),
        "sgd": lambda p: torch.optim.SGD(p, 0.1),
        "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    }
    steps = kinds[optimizer](model.parameters())
    if stage == 0:
        model = mz.DistributedDataParallel(model, world=world)
    else:
        model, steps = mz.zero(
            model, steps, stage, world=world, share_parameters=share, precision=precision
        )
    for _ in range(2):
        model(torch.ones(2, WIDTH)).square().mean().backward()
        steps.step()
        steps.zero_grad()
    model(torch.ones(2, WIDTH)).square().mean().backward()
    return model, steps


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "momentum"])
@pytest.mark.parametrize(
    ("stage", "precision", "share"),
    [
        (0, "fp32", False),
        (1, "fp32", True), (1, "bf16", False),
        (2, "fp32", False), (2, "bf16", True),
        (3, "fp32", True), (3, "bf16", False),
    ],
)  # fmt: skip
def test_what_is_held(stage: int, precision: str, share: bool, optimizer: str) -> None:
    world = mpizero.init()
    model, steps = train(world, stage, optimizer, precision, share)
    measured = mz.memory_report(model, steps)
    known = model_of(f"{__name__}:build")
    settings = Settings(OPTIMIZERS[optimizer], precision, share)
    planned = memory(known, settings, Ranks(world.size, world.size), stage)
    for held, report in ((planned.rank, measured.rank), (planned.node, measured.node)):
        pairs = {
            "parameters": (held.parameters, report.parameters),
            "gradients": (held.gradients, report.gradients),
            "optimizer": (held.masters + held.optimizer_state, report.optimizer_state),
            "buffers": (held.buffers, report.buffers),
        }
        for kind, (expected, found) in pairs.items():
            assert found == pytest.approx(expected, rel=TENTH, abs=4096), (kind, planned, measured)


@pytest.fixture
def nodes(request: pytest.FixtureRequest) -> Iterator[World]:
    """The ranks on emulated nodes of these names."""
    with placed(Placement(request.param, (0, 1, 2, 3))) as world:
        yield world


@pytest.mark.parallel(4)
@pytest.mark.parametrize(
    ("nodes", "stage", "precision", "share"),
    [
        ("ABCD", 0, "fp32", False), ("AABB", 0, "fp32", False), ("ABBA", 0, "fp32", False),
        ("ABCD", 1, "fp32", True), ("ABCD", 2, "fp32", False), ("ABCD", 3, "fp32", True),
        ("ABCD", 3, "fp32", False), ("ABCD", 1, "bf16", True),
        ("AABB", 1, "fp32", True), ("ABBA", 2, "fp32", False), ("ABAB", 3, "fp32", True),
        ("ABBA", 3, "fp32", False), ("ABAB", 1, "bf16", True),
    ],
    indirect=["nodes"],
)  # fmt: skip
def test_what_crosses_between_nodes(
    nodes: World, monkeypatch: pytest.MonkeyPatch, stage: int, precision: str, share: bool
) -> None:
    """Counted where blocks are handed to MPI, of those that go to a rank of another node."""
    sent = [0]
    exchange = MpiTransport.exchange
    of_node = nodes.gather_objects(nodes.node_index)
    everyone = nodes.comm.Get_group()

    def counting(
        self: MpiTransport, outgoing: Any, to: int | None, incoming: Any, source: int | None
    ) -> None:
        if to is not None and outgoing is not None:
            group = self._comm.Get_group()
            (there,) = MPI.Group.Translate_ranks(group, [to], everyone)
            group.Free()
            if of_node[there] != nodes.node_index:
                sent[0] += outgoing.nbytes
        exchange(self, outgoing, to, incoming, source)

    model, steps = train(nodes, stage, "sgd", precision, share)
    steps.step()
    monkeypatch.setattr(MpiTransport, "exchange", counting)
    model(torch.ones(2, WIDTH)).square().mean().backward()
    steps.step()
    monkeypatch.undo()
    of_this_node = nodes.node.allreduce(sent[0])
    settings = Settings(OPTIMIZERS["sgd"], precision, share)
    ranks = Ranks(nodes.size, nodes.local_size)
    planned = traffic(model_of(f"{__name__}:build"), settings, ranks, stage)
    assert of_this_node == pytest.approx(planned.network, rel=TENTH)


@pytest.mark.once
def test_the_papers_numbers() -> None:
    """16 bytes a parameter in float32 with Adam; 8 + 8/N, 4 + 12/N, 16/N (FIELD: ZeRO, 2020)."""
    model, settings = Model(10**9), Settings(share=False)
    for stage, each in ((0, 16), (1, 8 + 8 / 64), (2, 4 + 12 / 64), (3, 16 / 64)):
        held = memory(model, settings, Ranks(64), stage).rank
        state = held.parameters + held.gradients + held.masters + held.optimizer_state
        assert state == pytest.approx(each * 1e9)
    sent = [traffic(model, settings, Ranks(64), stage).network / 4e9 for stage in range(4)]
    assert sent == pytest.approx([2 * 63 / 64] * 3 + [3 * 63 / 64])


@pytest.mark.once
def test_the_fewest_ranks_are_enough_and_one_node_less_is_not() -> None:
    model, settings, limits = Model(7 * 10**9), Settings(share=False), Limits(node=200e9)
    assert fewest_ranks(model, settings, 8, limits, 0) == 1
    for stage in (2, 3):
        fewest = fewest_ranks(model, settings, 8, Limits(node=60e9), stage)
        if fewest is None:
            assert memory(model, settings, Ranks(8 << 14, 8), stage).node.total > 60e9
            continue
        assert memory(model, settings, Ranks(fewest, 8), stage).node.total <= 60e9
        assert memory(model, settings, Ranks(fewest - 8, 8), stage).node.total > 60e9


@pytest.mark.once
def test_a_stage_is_taken_with_a_reason() -> None:
    found = plan(
        Model(7 * 10**9), Settings(share=False), Ranks(64, 8),
        Machine(12.5e9, 5e-6, 200e9, compute_seconds=10.0), Limits(node=400e9),
    )  # fmt: skip
    fits = {each.stage: each.fits for each in found.stages}
    assert found.stage is not None and fits[found.stage] and not fits[0]
    assert "stage" in found.reason and "more memory than there is" in found.reason


@pytest.mark.once
def test_the_command(tmp_path: Path) -> None:
    run = CliRunner().invoke
    options = ["--ranks", "4096", "--ranks-per-node", "8", "--memory-per-node", "512GB"]
    shown = run(main, ["plan", "--parameters", "7e9", *options])
    assert shown.exit_code == 0, shown.output
    assert "take: stage" in shown.output and "fewest ranks" in shown.output
    data = json.loads(run(main, ["plan", "--parameters", "7e9", *options, "--json"]).output)
    assert len(data["stages"]) == 4
    file = tmp_path / "plan.png"
    drawn = run(main, ["plan", f"{__name__}:build", "--ranks", "8", "--plot", str(file)])
    assert drawn.exit_code == 0 and file.stat().st_size > 1000
    assert "3,942,400 parameters" in drawn.output


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Give --parameters NUMBER, such as 7e9, or MODULE:FUNCTION"),
        (["--parameters", "1e9", "json:dumps"], "not both"),
        (["--parameters", "0"], "a number > 0"),
        (["--parameters", "1e9", "--ranks", "0"], "a number >= 1"),
        (["--parameters", "1e9", "--ranks", "9", "--ranks-per-node", "4"], "a multiple of the 4"),
        (["nowhere:build"], "module:function"),
        (["json:dumps"], "json:dumps"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: list[str], said: str) -> None:
    refused = CliRunner().invoke(main, ["plan", *arguments])
    assert refused.exit_code != 0 and said in refused.output


@pytest.mark.once
def test_a_link_is_known_by_what_was_measured_on_it(tmp_path: Path) -> None:
    """Three nodes, 1 GB/s, 10 us for a message; "auto" takes longer to agree on the call."""
    alpha, beta = 10e-6, 1e-9

    def row(nbytes: int, algorithm: str, seconds: float) -> dict[str, Any]:
        bandwidth = nbytes / seconds / 1e9
        bus = bandwidth * 4 / 3
        return {
            "bytes": nbytes, "algorithm": algorithm, "microseconds": seconds * 1e6,
            "algorithm_bandwidth": bandwidth, "bus_bandwidth": bus,
        }  # fmt: skip

    large = 4 / 3 * 2**26 * beta
    rows = [row(4, "auto", 8 * alpha), row(4, "MPI", 4 * alpha), row(4, "ring", alpha)]
    rows += [row(2**26, "auto", large), row(2**26, "MPI", 2 * large), row(2**26, "ring", large / 2)]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    assert link_of(file) == pytest.approx((1 / beta, alpha))
    file.write_text("[]")
    with pytest.raises(mpizero.ArgumentError, match="measured"):
        link_of(file)


@pytest.mark.once
def test_units_are_gathered_one_by_one() -> None:
    """Stage 3 without shared parameters: each unit travels by itself, twice, and is asked for."""
    ranks, settings = Ranks(4), Settings(share=False)
    few, many = (
        traffic(Model(10**6, unit=10**6 // units, units=units), settings, ranks, 3)
        for units in (1, 100)
    )
    assert many.network == few.network
    assert many.parameters.messages == 100 * few.parameters.messages == 100 * 2 * (3 + 2 * 2)
    assert traffic(Model(10**6, unit=10**4), settings, ranks, 3).messages == many.messages
    assert model_of(f"{__name__}:build").units == 2 * DEPTH
