"""What the modules of all strategies have in common: forward, weights, uneven loops, names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from mpizero import MpizeroError, World
from mpizero.diagnostics import recorder
from mpizero.engine import Weight
from mpizero_torch import batch_weight, slices
from mpizero_torch.hooks import BackwardHooks
from mpizero_torch.replicate import Buffers, broadcast_tensors
from mpizero_torch.tied_stages import TiedStages


class DistributedModule(nn.Module):
    """A module that is trained on all ranks of ``world``, each with its own part of the data."""

    def __init__(self, module: nn.Module, world: World) -> None:
        super().__init__()
        self.world = world
        self.module = module
        self._synchronise = True
        self._stated: Weight | None = None
        self._weight = Weight()  # of what the last forward was fed with
        self._hooks: BackwardHooks | None = None
        self._named: list[tuple[str, nn.Parameter]] = []
        self._were_trainable: list[bool] = []
        self._buffers_in_sync: Buffers | None = None
        self.tied = TiedStages(list(module.named_parameters()), world)
        self.register_load_state_dict_pre_hook(_restore_prefix)  # type: ignore[no-untyped-call]

    @abstractmethod
    def _watch_parameters(self) -> None:
        """Hook the trainable parameters; again whenever some were frozen or unfrozen."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward on this rank's input. Sends nothing."""
        self._weight, (args, kwargs) = batch_weight.fed((args, kwargs), self._stated)
        if torch.is_grad_enabled() and self.training:
            self._watch_parameters()
            if self._hooks is not None:
                self._hooks.check_last_pass()
        with recorder().span("forward"), batch_weight.under_way(self._weight):
            output = self.module(*args, **kwargs)
        if self._hooks is not None and torch.is_grad_enabled():
            self._hooks.watch_output(output)
        return batch_weight.fed_on(output)

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

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """The backward passes in this context are one: their gradients' sum is averaged at its end.

        For a pipeline's schedule, which runs the micro-batches' passes by itself; each of their
        losses is to be divided by how many there are, as torch's schedules do. Collective at the
        end. Parameters that several stages hold are summed over these. If the context ends with an
        exception nothing is averaged.
        """
        with self.no_sync():
            yield
        self._watch_parameters()
        if self._hooks is not None:
            self.tied.sum([parameter for _, parameter in self._named], self._hooks.kept)
            self._hooks.average_kept()

    def weigh(self, weight: float) -> None:
        """State how much this rank's next backward pass counts (tokens, samples; 0 for nothing).

        The gradient becomes sum(weight x gradient) / sum(weights), over the ranks and over the
        passes accumulated under ``no_sync``. All ranks must state one, or none. On a rank with
        weight 0 the gradients may be anything, NaN too. Raises ArgumentError for negative or
        non-finite weights.
        """
        self._stated = Weight(float(weight), stated=True)
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
    def named(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are kept equal or sharded over the ranks, by name."""
        return list(self._named)

    @property
    def counts(self) -> list[bool]:
        """For each parameter: does this rank speak for its part, along the axes of a mesh?

        Of the ranks that hold the same part of it, and see the same data, one does.
        """
        return [
            slices.copy_number(parameter, self.world) == 0 and index not in self.tied.later
            for index, (_, parameter) in enumerate(self._named)
        ]

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
        self._forget_gradients()
        return True

    def _check_pass(self) -> None:
        """Raise MpizeroError if a pass that averages begins, whose gradients are not all here."""
        if self._synchronise and self.tied.names:
            raise MpizeroError(
                f"backward(): '{self.tied.names[0]}' is also on another stage of the pipeline, "
                "which finds the rest of its gradient. Run the passes of a step inside "
                "`with model.accumulate():`, at whose end gradients are summed and averaged."
            )

    def _forget_gradients(self) -> None:
        for _, parameter in self._named:
            parameter.grad = None


_COPY = (
    "A distributed module cannot be {}: it holds communicators and hooks of this process. "
    "Copy the inner module instead (model.module), and wrap the copy if it is to be trained."
)


def _restore_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Loading a bigger module that contains this one: give the plain names back their 'module.'."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        if not name.startswith(prefix + "module."):
            state_dict[prefix + "module." + name[len(prefix) :]] = state_dict.pop(name)
