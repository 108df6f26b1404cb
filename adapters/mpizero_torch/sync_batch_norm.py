"""``SyncBatchNorm``: batch normalisation with the statistics of all ranks' samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError, World
from mpizero_torch import batch_weight
from mpizero_torch.runtime import init
from mpizero_torch.weighed_batches import stripped


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batch of all ranks of ``world`` (in training; as BatchNorm in evaluation).

    Input: (N, C, ...), any number of further axes; N may differ between ranks. What it computes
    on n ranks is what ``BatchNorm`` computes in one process on the concatenated batch, gradients
    included. Collective in training. A rank whose batch weighs nothing (see ``shard``) is
    normalised with the others' statistics and does not contribute to them. What the batch weighs
    must be known in the forward: ``weigh()`` comes before it.
    """

    def __init__(
        self, num_features: int, *args: Any, world: World | None = None, **kw: Any
    ) -> None:
        super().__init__(num_features, *args, **kw)
        self.world = world if world is not None else init()
        self._weights: set[float] = set()  # of the inputs that a backward may compute again
        self._computed_again = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        use_batch = self.training or self.running_mean is None
        if not use_batch or self.world.size == 1:
            return super().forward(input)
        with self.world.telling():
            self._check_input_dim(input)
            own, x = self._weighed(input)
        count = x.numel() // x.shape[1]
        result, mean, variance, total = _Normalise.apply(  # type: ignore[no-untyped-call]
            x, self.eps, self.world, float(count) if own > 0 else 0.0, own
        )
        self._track(mean, variance, float(total))
        if self.affine:
            shape = (1, -1, *[1] * (input.ndim - 2))
            result = result * self.weight.view(shape).to(result.dtype)
            result = result + self.bias.view(shape).to(result.dtype)
        return batch_weight.fed_on(result)  # type: ignore[no-any-return]

    def _weighed(self, input: torch.Tensor) -> tuple[float, torch.Tensor]:
        """What the input weighs; in a backward that computes it again, what it did before."""
        if torch._C._current_graph_task_id() == -1:
            if self._computed_again:
                self._weights.clear()
                self._computed_again = False
            own, x = batch_weight.of_input(input)
            self._weights.add(own)
            return own, x
        self._computed_again = True
        if len(self._weights) > 1:
            raise ArgumentError(
                "SyncBatchNorm()", "input", "computed again by checkpointing, after forwards of "
                f"batches that weigh {', '.join(f'{each:g}' for each in self._weights)}",
                "one batch, or batches of one weight, in front of a backward",
            )  # fmt: skip
        return next(iter(self._weights), 1.0), stripped(input)

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor, total: float) -> None:
        """Running statistics as torch keeps them: the variance there is the unbiased one."""
        if not self.training or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None  # torch sets the three together
        self.num_batches_tracked += 1
        rate = self.momentum
        if rate is None:
            rate = 1.0 / float(self.num_batches_tracked)
        unbiased = variance * (total / max(total - 1.0, 1.0))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), rate)

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.ndim < 2 or input.shape[1] != self.num_features:
            raise ArgumentError(
                "SyncBatchNorm()",
                "input",
                f"of shape {tuple(input.shape)}",
                f"(N, {self.num_features}, ...)",
            )

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, world: World | None = None) -> nn.Module:
        """Replace every BatchNorm in ``module`` (itself, if it is one), keeping its state."""
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, cls):
            return cls._like(module, world)
        for name, child in module.named_children():
            converted = cls.convert_sync_batchnorm(child, world)
            if converted is not child:
                setattr(module, name, converted)
        return module

    @classmethod
    def _like(cls, norm: nn.modules.batchnorm._BatchNorm, world: World | None) -> SyncBatchNorm:
        new = cls(
            norm.num_features,
            norm.eps,
            norm.momentum,
            norm.affine,
            norm.track_running_stats,
            world=world,
        )
        new.weight, new.bias = norm.weight, norm.bias
        new.running_mean, new.running_var = norm.running_mean, norm.running_var
        new.num_batches_tracked = norm.num_batches_tracked
        new.training = norm.training
        return new


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps), with both over all ranks (Ioffe and Szegedy 2015)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, eps: float, world: World, count: float, own: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = _wide(x.dtype)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        mean, variance, total = _statistics(x.to(wide), axes, world, count)
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale = torch.rsqrt(variance + eps)
        normalised = (x.to(wide) - mean.view(shape)) * scale.view(shape)
        ctx.save_for_backward(normalised, scale)
        ctx.world, ctx.axes, ctx.shape = world, axes, shape
        ctx.total, ctx.own = float(total), own
        ctx.mark_non_differentiable(mean, variance, total)
        return normalised.to(x.dtype), mean, variance, total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        normalised, scale = ctx.saved_tensors
        wide = gradient.to(normalised.dtype)
        # The mean and the variance are shared by all ranks, so their part of the gradient is a
        # sum over ranks, in which each counts as its loss counts in the global one.
        sums = torch.stack([wide.sum(ctx.axes), (wide * normalised).sum(ctx.axes)])
        own = ctx.own
        sums = sums * own if own else torch.zeros_like(sums)
        ctx.world.allreduce(sums)
        sums /= (own or 1.0) * max(ctx.total, 1.0)
        through_mean, through_scale = sums[0].view(ctx.shape), sums[1].view(ctx.shape)
        result = (wide - through_mean - normalised * through_scale) * scale.view(ctx.shape)
        return result.to(gradient.dtype), None, None, None, None


def _statistics(
    x: torch.Tensor, axes: list[int], world: World, count: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, biased variance (per channel) and count over all ranks.

    Ranks exchange means and squared deviations from them, combined as Chan, Golub and LeVeque
    (1983) do: the difference of two large sums would lose digits.
    """
    channels = x.shape[1]
    if count:
        mean = x.mean(axes)
        squares = (x - mean.view(1, -1, *[1] * (x.ndim - 2))).square().sum(axes)
    else:
        mean = squares = x.new_zeros(channels)
    mine = torch.cat([mean, squares, mean.new_tensor([count])]).cpu()
    parts = torch.from_numpy(world.allgather(mine)).view(world.size, -1)
    counts = parts[:, -1:]
    total = counts.sum().clamp(min=1.0)
    means, deviations = parts[:, :channels], parts[:, channels:-1]
    mean = (means * counts).sum(0) / total
    variance = (deviations.sum(0) + ((means - mean).square() * counts).sum(0)) / total
    return mean.to(x.device), variance.to(x.device), total


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
