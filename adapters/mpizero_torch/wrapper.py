"""What the modules of all strategies have in common: forward, weights, uneven loops, names."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from mpizero import MpizeroError, World
from mpizero.diagnostics import recorder
from mpizero.engine import Weight
from mpizero_torch import batch_weight, names, slices
from mpizero_torch.compiling import as_it_is
from mpizero_torch.hooks import BackwardHooks
from mpizero_torch.replicate import Buffers, broadcast_optimizer, broadcast_tensors
from mpizero_torch.tied_stages import TiedStages
from mpizero_torch.torch_surface import lacking


class DistributedModule(nn.Module):
    """A module that is trained on all ranks of ``world``, each with its own part of the data.

    Whoever walks through it by names meets those of the plain module: it holds the parameters and
    buffers of ``module`` as its own, and gives its parts no prefix.
    """

    _unless_inner: Mapping[str, Any] = {}
    _ignored: Collection[str] = ()  # parameters and buffers that are left to each rank

    def __init__(self, module: nn.Module, world: World) -> None:
        super().__init__()
        self.world = world
        self.module = module
        self._hold_as_own()
        self._synchronise = True
        self._stated: Weight | None = None
        self._hooks: BackwardHooks | None = None
        self._named: list[tuple[str, nn.Parameter]] = []
        self._buffers_in_sync: Buffers | None = None
        self._throws = False
        self.tied = TiedStages(list(names.named_parameters(module)), world)
        self._prefix = ""  # within a bigger module that is being loaded
        self.register_load_state_dict_post_hook(_name_as_asked)  # type: ignore[no-untyped-call]

    def _hold_as_own(self) -> None:
        """Let what the inner module holds itself be found here, by names without a prefix."""
        for held in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            vars(self)[held] = getattr(names.uncompiled(self.module), held)

    @abstractmethod
    def _watch_parameters(self) -> None:
        """Before a pass: see to it that the parameters' gradients are noticed."""

    # The inner module is what torch.compile may compile; what is around it runs as it is.
    @functools.partial(as_it_is, recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward on this rank's input. Sends nothing."""
        weight, (args, kwargs) = self._before_forward(args, kwargs)
        with recorder().span("forward"), batch_weight.under_way(weight):
            output = self.module(*args, **kwargs)
        return self._after_forward(output, weight)

    @as_it_is
    def _before_forward(self, args: Any, kwargs: Any) -> tuple[Weight, tuple[Any, Any]]:
        if torch.is_grad_enabled():
            self._watch_parameters()
            if self._hooks is not None:
                self._hooks.check_last_pass()
        return batch_weight.fed((args, kwargs), self._stated)

    @as_it_is
    def _after_forward(self, output: Any, weight: Weight) -> Any:
        if self._hooks is not None and torch.is_grad_enabled():
            # A stated weight is the next backward's; the batch's own is known to be 0, or 1.
            counted = float(weight is not batch_weight.IDLE) if weight.stated else weight.value
            self._hooks.watch_output(output, counted)
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
    def join(self, optimizer: Any = None) -> Iterator[None]:
        """For loops that may end earlier on some ranks: those that are done shadow the rest.

        In ``with model.join(optimizer):`` a rank that has left its loop takes part in the others'
        averages with weight zero, until all have left theirs. At the end all ranks have the
        parameters and buffers, and the state of the optimizer (or of each in a list) if it is
        given, of a rank with most steps. Inside, no other collective may be called (``mz.mean``,
        ``SyncBatchNorm``): ranks that are done would not answer.
        """
        steps_before = self._steps
        yield
        if self._hooks is None or self.world.size == 1:
            return
        while self._hooks.shadow():
            self._forget_gradients()
            self._after_pass(self._hooks.active)
        steps = self.world.gather_objects(self._steps - steps_before)
        root = steps.index(max(steps))
        buffers = [b for name, b in self.named_buffers() if name not in self._ignored]
        every = [tensor for _, tensor in self._named] + buffers
        broadcast_tensors(every, self.world, root)
        several = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
        for each in several:
            if each is not None:
                broadcast_optimizer(each, self.world, root)

    @property
    def require_backward_grad_sync(self) -> bool:
        """Are gradients averaged by backward passes? What ``no_sync`` sets, to be set by hand."""
        return self._synchronise

    @require_backward_grad_sync.setter
    def require_backward_grad_sync(self, value: bool) -> None:
        self._synchronise = bool(value)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The inner module's state_dict, with its plain names."""
        return names.state_dict(self.module, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load an undistributed module's state_dict (every rank must be given the same).

        Prefixes of torch.compile and of torch's DistributedDataParallel are taken off.
        """
        return names.load_state_dict(self.module, state_dict, *args, **kwargs)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The inner module's, which need no names."""
        return names.uncompiled(self.module).parameters(recurse)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """This module and the parts of the inner one, by their plain names."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, part in self.module.named_modules(memo, prefix, remove_duplicate):
            yield prefix[: len(name)] + names.plain(name[len(prefix) :]), part

    def get_submodule(self, target: str) -> nn.Module:
        """A part of the inner module, by its plain name (or with ``module.`` in front)."""
        try:
            return names.uncompiled(self.module).get_submodule(target)
        except AttributeError:
            return super().get_submodule(target)

    def _fqn_modifiers(self) -> dict[str, str]:
        # Asked by torch.distributed.checkpoint: there is no "module." in names, and a child of
        # that name is the inner module's.
        return {"module": "module"}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A bigger module is loaded, and goes on to the inner one with "module." in its names.
        self._prefix = prefix
        given = {
            name[len(prefix) :]: state_dict.pop(name)
            for name in list(state_dict)
            if name.startswith(prefix)
        }
        rename = names.renaming(self.module, given)
        for name, value in given.items():
            state_dict[f"{prefix}module.{rename(name)}"] = value

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> DistributedModule:
        self.module._apply(fn, recurse)  # not once more for what this one holds too
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
        inner = self.module
        try:
            return getattr(inner, name)
        except AttributeError:
            if hasattr(type(inner), name):
                raise  # a property of its own has
        if name in self._unless_inner:
            return self._unless_inner[name]
        raise lacking(self, inner, name)

    def __deepcopy__(self, memo: Any) -> Any:
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

    def _check_pass(self) -> None:
        """Raise MpizeroError if a pass that averages begins, whose gradients are not all here."""
        if self._synchronise and self.tied.names:
            raise MpizeroError(
                f"backward(): '{self.tied.names[0]}' is also on another stage of the pipeline, "
                "which finds the rest of its gradient. Run the passes of a step inside "
                "`with model.accumulate():`, at whose end gradients are summed and averaged."
            )

    def _after_pass(self, active: float) -> None:
        """A pass was averaged, in which so many ranks had a part of their own."""
        if self._throws and active != self.world.size:
            raise MpizeroError(
                f"join(throw_on_early_termination=True): {self.world.size - active:.0f} of "
                f"{self.world.size} ranks have come to the end of their data, and the others have "
                "not."
            )

    def _forget_gradients(self) -> None:
        for _, parameter in self._named:
            parameter.grad = None


_COPY = (
    "A distributed module cannot be {}: it holds communicators and hooks of this process. "
    "Copy the inner module instead (model.module), and wrap the copy if it is to be trained."
)


def _name_as_asked(module: DistributedModule, found: Any) -> None:
    """After a bigger module has been loaded: what is missing, or too much, by its plain names."""
    within = module._prefix + "module."
    for keys in found:
        keys[:] = [
            module._prefix + names.plain(key[len(within) :]) if key.startswith(within) else key
            for key in keys
        ]
