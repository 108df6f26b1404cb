"""``mz.verify`` tells models that train the same everywhere from those that do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mpizero_torch as mz
from mpizero.engine import gradient_shards
from mpizero_torch import clip
from mpizero_torch.replicate import Buffers
from mpizero_torch.sharding.hooks import ShardHooks
from mpizero_torch.sharding.mean_gradients import MeanGradients
from mpizero_torch.sharding.optimizer import ShardedOptimizer
from mpizero_torch.sharding.state import ShardedState
from mpizero_torch.sharding.writes import Writes
from mpizero_torch.wrapper import DistributedModule
from support.models import KINDS, loss
from support.reference import seeded

ranks = pytest.mark.parallel([1, 2, 3, 4])
several_ranks = pytest.mark.parallel([2, 3, 4])

TRANSFORMER = next(kind for kind in KINDS if kind.name == "transformer")
CONVNET = next(kind for kind in KINDS if kind.name == "convnet")


def built(kind: Any, make_optimizer: Any = torch.optim.AdamW, convert: bool = False) -> Any:
    model = kind.make().double()
    if convert:
        model = mz.SyncBatchNorm.convert_sync_batchnorm(model)
    return model, make_optimizer(model.parameters(), lr=1e-3), loss


class WholeNorm(torch.optim.Optimizer):
    """Steps along the gradient divided by its norm, which a slice does not know."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad / (p.grad.norm() + 1e-3), alpha=-group["lr"])


@ranks
@pytest.mark.parametrize("samples", [12, 13])
def test_a_transformer_is_the_same_at_all_stages(samples: int) -> None:
    batches = [TRANSFORMER.batch(samples, step) for step in range(4)]
    report = mz.verify(lambda: built(TRANSFORMER), batches)
    assert report.ok, str(report)
    assert [result.stage for result in report.results] == [0, 1, 2, 3]
    assert all(str(report) == other for other in mz.init().gather_objects(str(report)))


@several_ranks
def test_batch_norm_of_its_own_on_each_rank_is_found() -> None:
    batches = [CONVNET.batch(12, step) for step in range(3)]
    report = mz.verify(lambda: built(CONVNET), batches, stages=(0, 2))
    assert not report.ok and "BatchNorm" in str(report)
    assert mz.verify(lambda: built(CONVNET, convert=True), batches, stages=(0, 2)).ok


@several_ranks
def test_slices_for_an_optimizer_that_wants_parameters_are_found() -> None:
    batches = [TRANSFORMER.batch(12, step) for step in range(3)]
    report = mz.verify(lambda: built(TRANSFORMER, WholeNorm), batches, partition="flat")
    assert [result.ok for result in report.results] == [True, False, False, False], str(report)
    assert "partition='parameter'" in str(report)
    assert all(result.parameter for result in report.results if not result.ok)
    right = mz.verify(lambda: built(TRANSFORMER, WholeNorm), batches, partition="parameter")
    assert right.ok, str(right)


@several_ranks
def test_batches_that_are_too_small_are_refused() -> None:
    with pytest.raises(mz.ArgumentError, match="samples"):
        mz.verify(lambda: built(TRANSFORMER), [TRANSFORMER.batch(1, 0)])


# Faults that a sharded model could have without a word: each is put in, and has to be found.


def no_write_to_stand_ins(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MeanGradients, "_change", lambda *_: None)


def called_for_each_run(patch: pytest.MonkeyPatch) -> None:
    def step(self: Any) -> None:
        for run in self.runs:
            run.lend()
        gradients = [run.parameter.grad for run in self.runs]
        for at, run in enumerate(self.runs):
            for each in self.runs:
                each.parameter.grad = None
            run.parameter.grad = gradients[at]
            self.inner.step()
        for run in self.runs:
            run.show()

    patch.setattr(ShardedOptimizer, "_step_inner", step)


def writes_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Writes, "find", lambda self: ([], 0, None))


def writes_in_gathered_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ShardedState, "adopt", lambda self, indices: None)


def another_mean(patch: pytest.MonkeyPatch) -> None:
    plain = gradient_shards.mean_into_shard

    def doubled(rows: Any, out: Any, divisor: float, *others: Any) -> Any:
        return plain(rows, out, divisor * 2, *others)

    patch.setattr(gradient_shards, "mean_into_shard", doubled)


def no_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DistributedModule, "weigh", lambda self, weight: None)


def never_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mz.ShardedModule, "forget_gradients", lambda *_: None)


def not_forgotten_by_hand(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MeanGradients, "forget", lambda self, indices: None)


def one_not_reduced(patch: pytest.MonkeyPatch) -> None:
    plain = ShardHooks._fill

    def fill(self: Any, key: Any, fillings: Any) -> Any:
        for parameter in self._all[:1]:
            if mz.init().rank and parameter.grad is not None:
                parameter.grad.zero_()
        return plain(self, key, fillings)

    patch.setattr(ShardHooks, "_fill", fill)


def updates_of_neighbours(patch: pytest.MonkeyPatch) -> None:
    plain = ShardedOptimizer._step_inner

    def step(self: Any) -> None:
        before = [run.parameter.detach().clone() for run in self.runs]
        plain(self)
        for run, old in zip(self.runs, before, strict=True):
            change = (run.parameter.detach() - old).reshape(-1).roll(1)
            run.parameter.detach().copy_(old + change.view(old.shape))

    patch.setattr(ShardedOptimizer, "_step_inner", step)


def clipped_by_parts(patch: pytest.MonkeyPatch) -> None:
    plain = clip._global_norm
    patch.setattr(clip, "_global_norm", lambda model, cuts, *others: plain(model, [], *others))


FAULTS = [
    (no_write_to_stand_ins, {}, "halved"),
    (called_for_each_run, {}, "called"),
    (writes_lost, {"precision": "bf16", "share_parameters": False}, "written to"),
    (writes_in_gathered_lost, {}, "written to"),
    (another_mean, {}, "gradient of"),
    (no_weights, {"samples": 13}, "gradient of"),
    (never_forgotten, {}, "losses"),
    (not_forgotten_by_hand, {}, "halved"),
    (one_not_reduced, {}, "gradient of"),
    (updates_of_neighbours, {}, "losses"),
    (clipped_by_parts, {}, "norm of gradients"),
]


@several_ranks
@pytest.mark.parametrize(
    ("fault", "options", "said"), FAULTS, ids=[fault.__name__ for fault, _, _ in FAULTS]
)
def test_silent_faults_are_found(
    fault: Any, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = dict(options)
    batches = [TRANSFORMER.batch(own.pop("samples", 12), step) for step in range(2)]

    def check() -> Any:
        return mz.verify(lambda: built(TRANSFORMER), batches, (2,), segment_mb=0.002, **own)

    with monkeypatch.context() as patch:
        fault(patch)
        report = check()
    assert not report.ok and said in str(report), str(report)


class Counted(nn.Module):
    """Has a buffer of which it is said to each rank how much it grows."""

    seen: torch.Tensor

    def __init__(self, grows: float) -> None:
        super().__init__()
        self.layer, self.grows = nn.Linear(3, 2), grows
        self.register_buffer("seen", torch.zeros(1))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(self.grows)
        return self.layer(x)


@several_ranks
@pytest.mark.parametrize("sent", [True, False])
def test_buffers_that_are_not_sent_are_found(sent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Any:
        model = Counted(float(mz.init().rank))  # as if only some ranks had counted
        return model, torch.optim.SGD(model.parameters(), 0.1), lambda m, x: m(x).square().mean()

    if not sent:
        monkeypatch.setattr(Buffers, "broadcast", lambda *_: None)
    batches = [(seeded(step, 6 * mz.init().size, 3),) for step in range(2)]
    found = "between ranks" in str(mz.verify(build, batches, (0, 2)))
    assert found == (not sent)
