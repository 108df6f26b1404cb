"""``mz.verify`` tells models that train the same everywhere from those that do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mpizero_torch as mz
from support.models import KINDS, loss

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
