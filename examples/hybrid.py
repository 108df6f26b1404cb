"""The GPT over a mesh: layers cut into slices and into stages, sequences into stretches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import mpizero_torch as mz
from gpt import GPT, VOCABULARY


def spread(gpt: GPT, mesh: mz.Mesh) -> None:
    """Leave this rank its part of the model, in place."""
    if mesh.pp.size > 1:
        keep_stage(gpt, mesh.pp.rank, mesh.pp.size)
    if mesh.tp.size > 1:
        cut_layers(gpt, mesh)
    if mesh.sp.size > 1:
        share_sequences(gpt, mesh.sp)


def keep_stage(gpt: GPT, stage: int, stages: int) -> None:
    """Let only one stage's layers stay, under the names that they have in the whole model."""
    layers = list(gpt.blocks)
    for at, name in enumerate(layers):
        if at * stages // len(layers) != stage:
            del gpt.blocks[name]
    is_last = stage == stages - 1
    if stage > 0 and not is_last:
        gpt.embed = None
    if not is_last:
        gpt.norm = gpt.output = None


def cut_layers(gpt: GPT, mesh: mz.Mesh) -> None:
    """Deal out heads and hidden units: columns, then rows (Megatron-LM, arXiv 1909.08053)."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan: dict[str, Any] = {
        "query_key_value": ColwiseParallel(),
        "project": RowwiseParallel(),
        "feed_forward.1": ColwiseParallel(),
        "feed_forward.3": RowwiseParallel(),
    }
    for block in gpt.blocks.values():
        parallelize_module(block, mesh.device_mesh["tp"], plan)


def share_sequences(gpt: GPT, world: mz.World) -> None:
    """Give each rank a stretch of every sequence, and of attention some of the heads."""
    gpt.first_position = mz.stretch(gpt.context, world).start
    for block in gpt.blocks.values():
        block.attention = mz.SequenceParallelAttention(world)


def share_nothing(gpt: GPT) -> None:
    """Let each rank attend to whole sequences again."""
    gpt.first_position = 0
    for block in gpt.blocks.values():
        del block.attention
        block.attention = F.scaled_dot_product_attention


class Pipeline:
    """Runs a step through all stages, micro-batch after micro-batch (1F1B, arXiv 2006.09503)."""

    def __init__(self, model: Any, mesh: mz.Mesh, micro_batches: int) -> None:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        self.model, self.world = model, mesh.pp
        group = mesh.device_mesh["pp"].get_group()
        device = torch.device(mesh.world.device.name)
        stage = PipelineStage(model, mesh.pp.rank, mesh.pp.size, device, group=group)
        self.schedule = Schedule1F1B(stage, micro_batches, loss_fn=loss_of)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward; the loss, on every stage."""
        losses: list[Tensor] = []
        with self.model.accumulate():  # the micro-batches' passes are one
            if self.world.rank == 0:
                self.schedule.step(inputs)
            elif self.world.rank == self.world.size - 1:
                self.schedule.step(target=targets, losses=losses)
            else:
                self.schedule.step()
        loss = torch.stack(losses).mean().detach() if losses else torch.zeros(())
        self.world.broadcast(loss, root=self.world.size - 1)
        return loss


def loss_of(guesses: Tensor, targets: Tensor) -> Tensor:
    """How badly each byte is guessed from those before it, in nats."""
    return F.cross_entropy(guesses.flatten(0, 1), targets.flatten())


def forward(model: nn.Module, gpt: GPT, tokens: Tensor, stages: mz.World) -> Tensor:
    """The model's guesses on every stage, without gradients."""
    x = tokens
    for stage in range(stages.size):
        if stage == stages.rank:
            x = model(x)
        else:
            width = VOCABULARY if stage == stages.size - 1 else gpt.width
            x = torch.empty(*tokens.shape, width, device=tokens.device)
        stages.broadcast(x, root=stage)
    return x
