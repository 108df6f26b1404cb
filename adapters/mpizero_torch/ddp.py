"""``DistributedDataParallel``: replicas of a module, gradients averaged during backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from mpizero import ArgumentError, World
from mpizero.engine import GradientReducer, ParameterSpec, Weight
from mpizero_torch import batch_weight, tensors
from mpizero_torch.gradients import GradientHooks
from mpizero_torch.replicate import Buffers, broadcast_tensors
from mpizero_torch.runtime import init


class DistributedDataParallel(nn.Module):
    """Train ``module`` on all ranks of ``world``, each with its own part of the data.

    A drop-in for ``torch.nn.parallel.DistributedDataParallel``. Parameters and buffers start as
    rank 0's. During ``backward`` gradients are averaged over the ranks, in buckets, while the rest
    of backward computes; afterwards every rank's ``.grad`` holds the same bits, as views of the
    buckets. Buffers (BatchNorm's statistics) become rank 0's after each such backward, if any
    rank's have changed.

    Frozen parameters may be unfrozen later and the other way round; parameters that some ranks, or
    all, do not use need no flag (on all: ``.grad`` stays None). ``state_dict`` has the inner
    module's names. Attributes that this class lacks are the inner module's.

    Parameters
    ----------
    module : the module; its parameters on one device, this rank's.
    world : the ranks; ``mz.init()``'s by default.
    broadcast_buffers : keep buffers as rank 0's.
    bucket_cap_mb : size of a gradient bucket in MiB; by default the tuning table's.
    overlap : average while backward runs (where there are cores or a GPU for it) or at its end.
    device_ids, output_device, find_unused_parameters, gradient_as_bucket_view, static_graph :
        taken so that existing calls work; what they ask for is always so.

    Collective. Raises MismatchError if the module differs between ranks, ArgumentError for one
    without trainable parameters or on several devices.
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: Any = None,
        output_device: Any = None,
        *,
        world: World | None = None,
        broadcast_buffers: bool = True,
        bucket_cap_mb: float | None = None,
        overlap: bool = True,
        find_unused_parameters: bool = True,
        gradient_as_bucket_view: bool = True,
        static_graph: bool = False,
    ) -> None:
        super().__init__()
        if bucket_cap_mb is not None and not bucket_cap_mb > 0:
            raise ArgumentError(_NAME, "bucket_cap_mb", str(bucket_cap_mb), "a number > 0")
        self.world = world if world is not None else init()
        self.module = module
        self._bucket_bytes = int(bucket_cap_mb * 2**20) if bucket_cap_mb else None
        self._overlap = overlap
        self._synchronise = True
        self._stated: Weight | None = None
        self._hooks: GradientHooks | None = None
        self._were_trainable: list[bool] = []
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise ArgumentError(
                _NAME,
                "module",
                f"a {type(module).__name__} without trainable parameters",
                "a module with some parameter that requires_grad",
                "It needs no wrapping.",
            )
        ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
        self._named = [(n, p) for n, p in module.named_parameters() if n not in ignored]
        named_buffers = [(n, b) for n, b in module.named_buffers() if n not in ignored]
        self.world.agree(
            [f"{n}: {t.dtype}, shape {tuple(t.shape)}" for n, t in [*self._named, *named_buffers]],
            "parameters and buffers",
        )
        broadcast_tensors([t for _, t in [*self._named, *named_buffers]], self.world, root=0)
        self._buffers_in_sync = Buffers(module, ignored) if broadcast_buffers else None
        self.register_load_state_dict_pre_hook(_restore_prefix)  # type: ignore[no-untyped-call]
        self._watch_parameters()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward on this rank's input. Sends nothing."""
        if torch.is_grad_enabled() and self.training:
            self._watch_parameters()
            if self._hooks is not None:
                self._hooks.check_last_pass()
        output = self.module(*args, **kwargs)
        if self._hooks is not None and torch.is_grad_enabled():
            self._hooks.watch_output(output)
        return output

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in this context keep their gradients on this rank.

        The first one outside adds to them and averages the sum.
        """
        before, self._synchronise = self._synchronise, False
        try:
            yield
        finally:
            self._synchronise = before

    def weigh(self, weight: float) -> None:
        """State how much this rank's next backward pass counts (tokens, samples; 0 for nothing).

        The gradient becomes sum(weight x gradient) / sum(weights), over the ranks and over the
        passes accumulated under ``no_sync``. All ranks must state one, or none. On a rank with
        weight 0 the gradients may be anything, NaN too. Raises ArgumentError for negative or
        non-finite weights.
        """
        self._stated = Weight(float(weight), stated=True)
        batch_weight.state(self._stated)
        self._watch_parameters()

    @contextmanager
    def join(self, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
        """For loops that may end earlier on some ranks: those that are done shadow the rest.

        In ``with model.join(optimizer):`` a rank that has left its loop takes part in the others'
        averages with weight zero, until all have left theirs. The optimizer, if given, takes their
        steps too, so that its state stays the same on every rank; without one, parameters and
        buffers are taken from a rank with most steps at the end. Inside, no other collective may
        be called (``mz.mean``, ``SyncBatchNorm``): ranks that are done would not answer.
        """
        steps_before = self._steps
        yield
        while self._shadow_step(optimizer):
            pass
        if optimizer is None:
            steps = self.world.gather_objects(self._steps - steps_before)
            every = [tensor for _, tensor in self._named] + list(self.module.buffers())
            broadcast_tensors(every, self.world, root=steps.index(max(steps)))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The inner module's state_dict, with its plain names."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load an undistributed module's state_dict (every rank must be given the same)."""
        return self.module.load_state_dict(state_dict, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TypeError(_COPY.format("deepcopied"))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(_COPY.format("pickled"))

    @property
    def _steps(self) -> int:
        return self._hooks.steps if self._hooks is not None else 0

    def _shadow_step(self, optimizer: torch.optim.Optimizer | None) -> bool:
        """Take part in one step of the other ranks; False when all are done."""
        if self._hooks is None or self.world.size == 1:
            return False
        if not self._hooks.shadow():
            return False
        if optimizer is not None:
            optimizer.step()
        for _, parameter in self._named:
            parameter.grad = None
        return True

    def _watch_parameters(self) -> None:
        """Hook the trainable parameters; again whenever some were frozen or unfrozen."""
        if self.world.size == 1 and self._stated is None:
            return
        are_trainable = [parameter.requires_grad for _, parameter in self._named]
        if self._hooks is None or are_trainable != self._were_trainable:
            self._were_trainable = are_trainable
            trainable = [(name, p) for name, p in self._named if p.requires_grad]
            if self._hooks is not None:
                self._hooks.remove()
            self._hooks = GradientHooks(
                self, trainable, lambda fill: self._make_reducer(trainable, fill)
            )
        if self._stated is not None or batch_weight.current().value != 1.0:
            self._hooks.scale_gradients()

    def _make_reducer(
        self,
        trainable: list[tuple[str, nn.Parameter]],
        fill: Callable[[Sequence[int]], None],
    ) -> GradientReducer:
        devices = {parameter.device for _, parameter in trainable}
        if len(devices) > 1:
            raise ArgumentError(
                _NAME,
                "module",
                f"spread over {sorted(map(str, devices))}",
                "a module on one device",
            )
        device = next(iter(devices))
        return GradientReducer(
            self.world,
            [ParameterSpec(n, tuple(p.shape), tensors.numpy_dtype(p.dtype)) for n, p in trainable],
            lambda count, dtype: tensors.zeros(self.world, count, dtype, device),
            bucket_bytes=self._bucket_bytes,
            overlap=self._overlap,
            stream=lambda: tensors.current_stream(device),
            fill=fill,
        )


_NAME = "DistributedDataParallel()"
_COPY = (
    "A DistributedDataParallel cannot be {}: it holds communicators and hooks of this process. "
    "Copy the inner module instead (model.module), and wrap the copy if it is to be trained."
)


def _restore_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Loading a bigger module that contains this one: give the plain names back their 'module.'."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        if not name.startswith(prefix + "module."):
            state_dict[prefix + "module." + name[len(prefix) :]] = state_dict.pop(name)
