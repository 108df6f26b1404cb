"""``DistributedDataParallel``: replicas of a module, gradients averaged during backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mpizero import ArgumentError, World
from mpizero.engine import GradientReducer, ParameterSpec
from mpizero_torch import slices, tensors
from mpizero_torch.replica_hooks import ReplicaHooks
from mpizero_torch.replicate import Buffers, start_alike
from mpizero_torch.runtime import init
from mpizero_torch.wrapper import DistributedModule


class DistributedDataParallel(DistributedModule):
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
    world : the ranks; ``mz.init()``'s by default, ``mesh.replicas`` of a mesh.
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
        if bucket_cap_mb is not None and not bucket_cap_mb > 0:
            raise ArgumentError(_NAME, "bucket_cap_mb", str(bucket_cap_mb), "a number > 0")
        super().__init__(module, world if world is not None else init())
        self._bucket_bytes = int(bucket_cap_mb * 2**20) if bucket_cap_mb else None
        self._overlap = overlap
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
        slices.check(_NAME, [*self._named, *named_buffers], self.world)
        self.world.agree(
            [f"{n}: {t.dtype}, shape {tuple(t.shape)}" for n, t in [*self._named, *named_buffers]],
            "parameters and buffers",
        )
        start_alike([t for _, t in [*self._named, *named_buffers]], self.world)
        self._buffers_in_sync = Buffers(module, ignored) if broadcast_buffers else None
        self._watch_parameters()

    @property
    def bucket_bytes(self) -> int:
        """Bytes of the buckets in which this rank's gradients lie."""
        hooks = self._hooks
        return hooks.bucket_bytes if isinstance(hooks, ReplicaHooks) else 0

    def _watch_parameters(self) -> None:
        """Hook the trainable parameters; again whenever some were frozen or unfrozen."""
        if self.world.size == 1 and self._stated is None and not self.tied.names:
            return
        are_trainable = [parameter.requires_grad for _, parameter in self._named]
        if self._hooks is None or are_trainable != self._were_trainable:
            self._were_trainable = are_trainable
            trainable = [(name, p) for name, p in self._named if p.requires_grad]
            if self._hooks is not None:
                self._hooks.remove()
            self._hooks = ReplicaHooks(
                self, trainable, lambda fill: self._make_reducer(trainable, fill)
            )
        if self._stated is not None or self._weight.value != 1.0:
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
            [
                ParameterSpec(n, tuple(slices.local(p).shape), tensors.numpy_dtype(p.dtype))
                for n, p in trainable
            ],
            lambda count, dtype: tensors.zeros(self.world, count, dtype, device),
            bucket_bytes=self._bucket_bytes,
            overlap=self._overlap,
            stream=lambda: tensors.current_stream(device),
            fill=fill,
        )


_NAME = "DistributedDataParallel()"
