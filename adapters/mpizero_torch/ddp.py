"""``DistributedDataParallel``: replicas of a module, gradients averaged during backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError, World
from mpizero.engine import GradientReducer, ParameterSpec, take_lane
from mpizero_torch import building, names, slices, tensors, torch_surface
from mpizero_torch.bucket_gradients import BucketGradients
from mpizero_torch.bucket_places import layout
from mpizero_torch.replica_hooks import ReplicaHooks, parameter_spec
from mpizero_torch.replicate import Buffers, Structure, start_alike
from mpizero_torch.torch_members import TorchMembers
from mpizero_torch.torch_surface import NAME


class DistributedDataParallel(TorchMembers):
    """Train ``module`` on all ranks of ``world``, each with its own part of the data.

    A drop-in for ``torch.nn.parallel.DistributedDataParallel``. Parameters and buffers start as
    rank 0's. During ``backward`` gradients are averaged over the ranks, in buckets, while the rest
    of backward computes; afterwards every rank's ``.grad`` holds the same bits. Buffers
    (BatchNorm's statistics) become rank 0's after each such backward, if any rank's have changed.
    Ranks whose parameters differ (one has left out an optimizer's step) raise MismatchError there.

    Frozen parameters may be unfrozen later and the other way round; parameters that some ranks, or
    all, do not use need no flag (on all: ``.grad`` stays None). ``state_dict`` has the inner
    module's names. Attributes that this class lacks are the inner module's.

    torch's arguments come in torch's order; docs/from-torch-ddp.md says what becomes of each. Those
    that ask for what is not done here are refused, and name what to use instead.

    Parameters
    ----------
    module : the module; its parameters on one device, this rank's.
    device_ids : move inputs to this GPU, the module's.
    broadcast_buffers : keep buffers as rank 0's; False: neither at the start.
    init_sync : compare the module over the ranks, and let all start as rank 0. False: nor is it
        seen if their parameters differ later.
    process_group, device_mesh : the ranks, as torch has them: of the backend "mpizero".
    bucket_cap_mb : size of a gradient bucket in MiB; by default the tuning table's.
    gradient_as_bucket_view : False lets ``.grad`` have memory of its own. Else it is a view of its
        bucket, except while somebody still holds that of an earlier pass, which keeps its values.
    forward_sync_buffers : True: buffers become rank 0's before each forward, as in torch, and so
        forward is collective; False: only at the start.
    world : the ranks; ``mz.init()``'s by default, ``mesh.replicas`` of a mesh.
    overlap : average while backward runs (where there are cores or a GPU for it) or at its end.

    Collective. Raises MismatchError if the module differs between ranks, ArgumentError for one
    without trainable parameters or on several devices.
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: Any = None,
        output_device: Any = None,
        dim: int = 0,
        broadcast_buffers: bool | None = None,
        init_sync: bool = True,
        process_group: Any = None,
        bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False,
        check_reduction: bool = False,
        gradient_as_bucket_view: bool | None = None,
        static_graph: bool = False,
        delay_all_reduce_named_params: Any = None,
        param_to_hook_all_reduce: Any = None,
        mixed_precision: Any = None,
        device_mesh: Any = None,
        skip_all_reduce_unused_params: bool = False,
        bucket_cap_mb_list: Any = None,
        batched_grad_copy: bool = False,
        forward_sync_buffers: bool | None = None,
        *,
        world: World | None = None,
        overlap: bool = True,
    ) -> None:
        torch_surface.check_arguments(locals())
        building.fill_all(module, NAME)
        ignored = frozenset(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        named = [each for each in names.named_parameters(module) if each[0] not in ignored]
        buffers = [each for each in names.named_buffers(module) if each[0] not in ignored]
        torch_surface.check_module([*named, *buffers])
        _check_trained(module, named)
        super().__init__(module, torch_surface.world_of(world, process_group, device_mesh))
        if process_group is not None:
            self.process_group = process_group
        self._ignored, self._named = ignored, named
        self._each = [parameter for _, parameter in named]
        self._bucket_bytes = int(bucket_cap_mb * 2**20) if bucket_cap_mb else None
        self._overlap, self._alike = overlap, init_sync
        self._own_gradients = gradient_as_bucket_view is False
        self.device = named[0][1].device
        self.device_ids, self.output_device = torch_surface.check_device_ids(
            device_ids, output_device, self.device
        )
        self.find_unused_parameters, self.static_graph = find_unused_parameters, static_graph
        self.gradient_as_bucket_view = gradient_as_bucket_view is not False
        self.skip_all_reduce_unused_params = skip_all_reduce_unused_params
        self.batched_grad_copy, self.mixed_precision = batched_grad_copy, None
        slices.check(NAME, [*named, *buffers], self.world)
        if init_sync:
            self._start_alike(
                buffers, forward_sync_buffers is not None or broadcast_buffers is not False
            )
        self._structure = Structure(module)
        kept = Buffers(self._structure, ignored)
        before_forward = forward_sync_buffers is True
        after_backward = forward_sync_buffers is None and broadcast_buffers is not False
        self._buffers_before_forward = kept if before_forward else None
        self._buffers_in_sync = kept if after_backward else None
        self._watch_parameters()

    @property
    def bucket_bytes(self) -> int:
        """Bytes of the buckets in which this rank's gradients lie."""
        hooks = self._hooks
        return hooks.bucket_bytes if isinstance(hooks, ReplicaHooks) else 0

    def _start_alike(self, buffers: list[tuple[str, torch.Tensor]], with_buffers: bool) -> None:
        """Compare the module over the ranks, and give all rank 0's."""
        forms = [f"{n}: {t.dtype}, shape {tuple(t.shape)}" for n, t in [*self._named, *buffers]]
        self.world.agree(forms, "parameters and buffers")
        start = [*self._named, *buffers] if with_buffers else self._named
        start_alike([tensor for _, tensor in start], self.world)

    def _watch_parameters(self) -> None:
        """Hook the parameters, once; refuse those that have come since."""
        if self._is_copy:
            return
        if self._hooks is None:
            if self.world.size == 1 and self._stated is None and not self.tied.names:
                return
            self._hooks = self._make_hooks()
        elif self._structure.has_other_parameters():
            self._refuse_new_parameters()
        if any(map(vars, self._each)):
            self._refuse_optimizers_in_backward()

    def _refuse_optimizers_in_backward(self) -> None:
        for name, parameter in self._named:
            if "_in_backward_optimizers" in vars(parameter):
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
                NAME,
                "module",
                f"spread over {sorted(map(str, devices))}",
                "a module on one device",
            )
        device = next(iter(devices), torch.device("cpu"))
        lane = take_lane(self.world)

        def make(
            gradients: BucketGradients,
            reformed: Callable[[], Mapping[int, ParameterSpec]],
            mark: Callable[[], float],
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
                mark=mark,
            )

        layouts = self.world.broadcast_object([layout(parameter) for _, parameter in named])
        return ReplicaHooks(
            self,
            named,
            make,
            layouts=layouts,
            own_gradients=self._own_gradients,
            alike=self._alike,
        )

    def _refuse_new_parameters(self) -> None:
        known = {id(parameter) for _, parameter in self._named}
        for name, parameter in names.named_parameters(self.module):
            if parameter.requires_grad and id(parameter) not in known and name not in self._ignored:
                raise ArgumentError(
                    "forward()", "module",
                    f"one whose parameter '{name}' was added or replaced after it was wrapped, on "
                    f"rank {self.world.rank}", "the parameters that were there",
                    "Its gradient would stay on this rank. Change the module first and wrap it "
                    "then (load_state_dict without assign=True keeps the parameters).",
                )  # fmt: skip


def _check_trained(module: nn.Module, named: list[tuple[str, nn.Parameter]]) -> None:
    if not any(parameter.requires_grad for _, parameter in named):
        raise ArgumentError(
            NAME,
            "module",
            f"a {type(module).__name__} without trainable parameters",
            "a module with some parameter that requires_grad",
            "It needs no wrapping: evaluate it as it is.",
        )


def _may_be_trained(parameter: nn.Parameter) -> bool:
    if parameter.requires_grad:
        return True
    is_number = parameter.is_floating_point() or parameter.is_complex()
    return is_number and tensors.has_numpy_dtype(parameter.dtype)
