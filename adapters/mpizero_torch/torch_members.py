"""Attributes and methods of torch's DistributedDataParallel, with its meaning."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError, MpizeroError
from mpizero_torch import torch_surface
from mpizero_torch.outputs import tensors_in
from mpizero_torch.replicate import Buffers
from mpizero_torch.wrapper import DistributedModule


class TorchMembers(DistributedModule):
    """A distributed module that can be asked what programs ask torch's wrapper."""

    device: torch.device
    device_ids: list[int] | None
    static_graph: bool
    # Names that modules have too, for other things: the inner module's, if it has one.
    _unless_inner: Mapping[str, Any] = {"dim": 0}

    _buffers_before_forward: Buffers | None = None
    _forward_param_sync = True
    _is_copy = False
    _over_all = False  # in a join: is the mean over all ranks, those that are done too?

    @property
    def device_type(self) -> str:
        """The kind of the module's device: "cpu", "cuda"."""
        return self.device.type

    @property
    def join_device(self) -> torch.device:
        """The module's device."""
        return self.device

    @property
    def is_multi_device_module(self) -> bool:
        """Never: a module on several devices is refused."""
        return False

    @property
    def parameters_to_ignore(self) -> set[str]:
        """The names of the parameters and buffers that are left to each rank."""
        return set(self._ignored)

    @property
    def broadcast_buffers(self) -> bool:
        """Are buffers kept as rank 0's?"""
        return self._buffers_in_sync is not None or self._buffers_before_forward is not None

    forward_sync_buffers = broadcast_buffers

    @property
    def require_forward_param_sync(self) -> bool:
        """May the next forward send buffers, if it is to? As in torch, after one that trained."""
        return self._forward_param_sync

    @require_forward_param_sync.setter
    def require_forward_param_sync(self, value: bool) -> None:
        if not value and self._buffers_before_forward is None:
            raise ArgumentError(
                "require_forward_param_sync", "value", repr(value), "True",
                "Forward sends nothing here. Buffers are left to each rank by "
                "forward_sync_buffers=False.",
            )  # fmt: skip
        self._forward_param_sync = bool(value)

    def will_sync_module_buffers(self) -> bool:
        """Are there buffers that will be sent: after the next backward pass, or before forward?"""
        kept = self._buffers_in_sync or self._buffers_before_forward
        return self._forward_param_sync and kept is not None and kept.count > 0

    def _set_static_graph(self) -> None:
        """What a static graph allows is always allowed."""
        self.static_graph = True

    @staticmethod
    def _set_params_and_buffers_to_ignore_for_model(
        module: nn.Module, params_and_buffers_to_ignore: Collection[str]
    ) -> None:
        """Leave these parameters and buffers of a module to each rank; before it is wrapped."""
        # torch's own name for the list, which it reads too.
        module._ddp_params_and_buffers_to_ignore = params_and_buffers_to_ignore  # type: ignore[assignment]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward on this rank's input. Sends nothing, unless it was asked to."""
        if self.device_ids:
            args, kwargs = torch_surface.moved((args, kwargs), self.device)
        if self._buffers_before_forward is None:
            output = super().forward(*args, **kwargs)
        else:
            if self._forward_param_sync:
                self._buffers_before_forward.broadcast(self.world, root=0)
            output = super().forward(*args, **kwargs)
            self._forward_param_sync = torch.is_grad_enabled() and self._synchronise
        if self._is_copy and torch.is_grad_enabled():
            for each in tensors_in(output):
                if each.requires_grad:
                    each.register_hook(_refuse_copy)
        return output

    def weigh(self, weight: float) -> None:
        if self._over_all:
            raise ArgumentError(
                "weigh()", "weight", "stated in join(divide_by_initial_world_size=True)",
                "weights outside of it", "Stated weights have a divisor of their own, their sum.",
            )  # fmt: skip
        super().weigh(weight)

    weigh.__doc__ = DistributedModule.weigh.__doc__

    @contextmanager
    def join(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        divide_by_initial_world_size: bool | None = None,
        enable: bool = True,
        throw_on_early_termination: bool = False,
    ) -> Iterator[None]:
        """For loops that may end earlier on some ranks: those that are done shadow the rest.

        In ``with model.join(optimizer):`` a rank that has left its loop takes part in the others'
        averages with weight zero, until all have left theirs. At the end all ranks have the
        parameters and buffers, and the state of the optimizer if it is given, of a rank with most
        steps. Inside, no other collective may be called (``mz.mean``, ``SyncBatchNorm``): ranks
        that are done would not answer.

        torch's arguments, the same on all ranks: ``divide_by_initial_world_size``: the sum of the
        gradients is divided by all ranks, not by those that still train; ``enable=False`` does
        nothing; ``throw_on_early_termination`` raises MpizeroError on all ranks as soon as one is
        done before the others. Collective.
        """
        self._check_join(optimizer)
        hooks = self._hooks
        if not enable or self.world.size == 1 or hooks is None:
            yield
            return
        over_all = bool(divide_by_initial_world_size)
        self.world.agree(
            [f"divide_by_initial_world_size={over_all}, {throw_on_early_termination=}"],
            "the arguments of join()",
        )
        self._over_all, self._throws = over_all, throw_on_early_termination
        hooks.average_over_all(over_all)
        try:
            with super().join(optimizer):
                yield
        finally:
            self._over_all = self._throws = False
            hooks.average_over_all(False)

    def _check_join(self, optimizer: Any) -> None:
        if isinstance(optimizer, bool):
            raise ArgumentError(
                "join()", "optimizer", repr(optimizer), "an optimizer",
                "Give torch's arguments by name: join(divide_by_initial_world_size=...).",
            )  # fmt: skip
        kept_apart = {id(p) for name, p in self.named_parameters() if name in self._ignored}
        several = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
        groups = [group for each in several if each is not None for group in each.param_groups]
        if any(id(parameter) in kept_apart for group in groups for parameter in group["params"]):
            raise ArgumentError(
                "join()", "optimizer", "one of parameters that are left to each rank",
                "none, or one without these",
                "All ranks get the state of one, at the end, and would lose their own.",
            )  # fmt: skip
        if self._buffers_before_forward is not None:
            raise ArgumentError(
                "join()", "model", "one with forward_sync_buffers=True", "one without",
                "Ranks that are done have no forward in which they would answer.",
            )  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchMembers:
        """A copy of the module that evaluates; it cannot be trained.

        For averages of weights (EMA) and the like, which keep a copy of the model.
        """
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        for name, value in vars(self).items():
            vars(made)[name] = value.copy() if isinstance(value, (dict, OrderedDict)) else value
        vars(made)["_modules"] = {"module": copy.deepcopy(self.module, memo)}
        made._hold_as_own()
        known = dict(made.named_parameters(remove_duplicate=False))
        vars(made).update(
            _named=[(name, known[name]) for name, _ in self._named],
            _hooks=None, _buffers_in_sync=None, _buffers_before_forward=None, _is_copy=True,
        )  # fmt: skip
        return made


def _refuse_copy(_: torch.Tensor) -> None:
    raise MpizeroError(
        "backward(): this model is a copy of a wrapped one, for evaluation: its gradients would "
        "stay on this rank. To train it wrap what it holds: "
        "mz.DistributedDataParallel(model.module)."
    )
