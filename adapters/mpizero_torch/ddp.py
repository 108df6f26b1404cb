"""``DistributedDataParallel``: replicas of a module, gradients averaged during backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError, World
from mpizero.engine import GradientReducer, ParameterSpec, take_lane
from mpizero_torch import slices, tensors
from mpizero_torch.bucket_gradients import BucketGradients, layout
from mpizero_torch.replica_hooks import ReplicaHooks, parameter_spec
from mpizero_torch.replicate import Buffers, Structure, start_alike
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
        gradient_as_bucket_view: bool | None = None,
        static_graph: bool = False,
    ) -> None:
        if bucket_cap_mb is not None and not bucket_cap_mb > 0:
            raise ArgumentError(_NAME, "bucket_cap_mb", str(bucket_cap_mb), "a number > 0")
        super().__init__(module, world if world is not None else init())
        self._bucket_bytes = int(bucket_cap_mb * 2**20) if bucket_cap_mb else None
        self._overlap = overlap
        self._own_gradients = gradient_as_bucket_view is False
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise ArgumentError(
                _NAME,
                "module",
                f"a {type(module).__name__} without trainable parameters",
                "a module with some parameter that requires_grad",
                "It needs no wrapping.",
            )
        self._ignored = ignored = frozenset(
            getattr(module, "_ddp_params_and_buffers_to_ignore", ())
        )
        self._named = [(n, p) for n, p in module.named_parameters() if n not in ignored]
        named_buffers = [(n, b) for n, b in module.named_buffers() if n not in ignored]
        slices.check(_NAME, [*self._named, *named_buffers], self.world)
        self.world.agree(
            [f"{n}: {t.dtype}, shape {tuple(t.shape)}" for n, t in [*self._named, *named_buffers]],
            "parameters and buffers",
        )
        start_alike([t for _, t in [*self._named, *named_buffers]], self.world)
        self._structure = Structure(module)
        if broadcast_buffers:
            self._buffers_in_sync = Buffers(self._structure, ignored)
        self._watch_parameters()

    @property
    def bucket_bytes(self) -> int:
        """Bytes of the buckets in which this rank's gradients lie."""
        hooks = self._hooks
        return hooks.bucket_bytes if isinstance(hooks, ReplicaHooks) else 0

    def _watch_parameters(self) -> None:
        """Hook the parameters, once; refuse those that have come since."""
        if self._hooks is None:
            if self.world.size == 1 and self._stated is None and not self.tied.names:
                return
            self._hooks = self._make_hooks()
        elif self._structure.has_other_parameters():
            self._refuse_new_parameters()
        for name, parameter in self._named:
            if vars(parameter) and "_in_backward_optimizers" in vars(parameter):
                raise ArgumentError(
                    "forward()", "module",
                    f"one whose '{name}' has an optimizer of _apply_optimizer_in_backward()",
                    "parameters whose optimizers see the averaged gradient",
                    "It would take its step with this rank's own gradient. Take the step in a "
                    "register_post_accumulate_grad_hook(): such hooks are called with the average.",
                )  # fmt: skip

    def _make_hooks(self) -> ReplicaHooks:
        """The parameters that may ever have gradients, in buckets if they are trained now."""
        named = [(name, p) for name, p in self._named if _may_be_trained(p)]
        devices = {parameter.device for _, parameter in named if parameter.requires_grad}
        if len(devices) > 1:
            raise ArgumentError(
                _NAME,
                "module",
                f"spread over {sorted(map(str, devices))}",
                "a module on one device",
            )
        device = next(iter(devices), torch.device("cpu"))
        lane = take_lane(self.world)

        def make(
            gradients: BucketGradients, reformed: Callable[[], Mapping[int, ParameterSpec]]
        ) -> GradientReducer:
            return GradientReducer(
                lane,
                [parameter_spec(name, parameter) for name, parameter in named],
                lambda count, dtype: tensors.zeros(lane.world, count, dtype, device),
                bucket_bytes=self._bucket_bytes,
                overlap=self._overlap,
                stream=lambda: tensors.current_stream(device),
                fill=gradients.fill,
                trained=gradients.trained,
                reformed=reformed,
            )

        layouts = self.world.broadcast_object([layout(parameter) for _, parameter in named])
        return ReplicaHooks(self, named, make, layouts=layouts, own_gradients=self._own_gradients)

    def _refuse_new_parameters(self) -> None:
        known = {id(parameter) for _, parameter in self._named}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and id(parameter) not in known and name not in self._ignored:
                raise ArgumentError(
                    "forward()", "module",
                    f"one whose parameter '{name}' was added or replaced after it was wrapped, on "
                    f"rank {self.world.rank}", "the parameters that were there",
                    "Its gradient would stay on this rank. Change the module first and wrap it "
                    "then (load_state_dict without assign=True keeps the parameters).",
                )  # fmt: skip


def _may_be_trained(parameter: nn.Parameter) -> bool:
    if parameter.requires_grad:
        return True
    is_number = parameter.is_floating_point() or parameter.is_complex()
    return is_number and tensors.has_numpy_dtype(parameter.dtype)


_NAME = "DistributedDataParallel()"
