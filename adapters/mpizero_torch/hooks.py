"""Autograd hooks: from torch's backward to the engine's plan, open, ready, close.

A pass is announced when a gradient comes to the module's output, in whatever run of the engine that
is. It takes place as soon as a parameter gets a gradient; a run that reaches none
(``autograd.grad`` for an input) sends nothing. It ends with the run in which it was announced:
under reentrant checkpointing parameters get their gradients in runs within, whose end is not the
end of the whole.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from mpizero import ArgumentError, MpizeroError, World
from mpizero.diagnostics import recorder
from mpizero.engine import Merge, ReducedPasses, Weight
from mpizero_torch import batch_weight, engine_runs
from mpizero_torch.outputs import tensors_in
from mpizero_torch.replicate import Buffers


class Owner(Protocol):
    """What the hooks need of the module that they serve."""

    world: World
    _synchronise: bool
    _stated: Weight | None
    _buffers_in_sync: Buffers | None

    def _check_pass(self) -> None:
        """May a backward pass begin?"""

    def _after_pass(self, active: float) -> None:
        """A pass was averaged, in which so many ranks had a part of their own."""


@dataclass
class LocalPass:
    """This rank's part of a pass, from its announcement to the end of the engine's run."""

    fed: dict[float, None]  # what the batches weigh whose gradients come
    run: int = -1
    node: Any = field(default=None, repr=False)  # where the first gradient came
    merge: Merge | None = None
    refusal: Exception | None = None
    takes_place: bool = False
    span: Any = None


class BackwardHooks(ABC):
    """Tells a reducer of backward passes; what becomes of gradients is for those who derive."""

    def __init__(self, owner: Owner, reducer: ReducedPasses) -> None:
        self._owner: Any = weakref.proxy(owner)
        self._reducer = reducer
        self._pass: LocalPass | None = None
        self._fed: dict[float, None] = {}  # of the forwards since the last pass
        self._parameters: list[nn.Parameter] = []
        self.steps = 0
        self._handles: list[Any] = []

    def watch(
        self,
        parameters: Sequence[tuple[int, nn.Parameter]],
        announcing: Collection[int] | None = None,
    ) -> None:
        """Watch these parameters, by their numbers, and no others from now on.

        ``announcing``: those whose gradients are announced one by one; by default, all.
        """
        self.remove()
        self._parameters = [parameter for _, parameter in parameters]
        self._handles = [
            register_accumulated(parameter, self._on_accumulated(index))
            for index, parameter in parameters
            if announcing is None or index in announcing
        ]

    def remove(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def watch_output(self, output: Any, weight: float) -> None:
        """After a forward: let backward through ``output`` announce itself.

        ``weight``: what its batch weighs.
        """
        if self._owner._buffers_in_sync is not None:
            self._owner._buffers_in_sync.after_forward()
        self._fed[weight] = None
        found = weakref.ref(self)

        def came(gradient: torch.Tensor) -> None:
            hooks = found()
            if hooks is not None:
                hooks._announce(weight)

        for leaf in tensors_in(output):
            # A parameter that a module returns would keep the hook for good.
            if leaf.requires_grad and not leaf.is_leaf:
                leaf.register_hook(came)

    def check_last_pass(self) -> None:
        """Before a forward: did an exception end the last backward before its end?

        Gradients that stay on this rank may simply be computed again. But averages that had begun
        cannot be taken back from the other ranks: MpizeroError.
        """
        if self._owner._buffers_in_sync is not None:
            self._owner._buffers_in_sync.before_forward()
        if self._pass is None or engine_runs.current_run() != -1:
            return
        if self._reducer.is_open:
            raise MpizeroError(
                "An earlier backward() ended with an exception while gradients were being "
                "averaged, so the ranks may hold different ones. Load the last checkpoint and "
                "wrap the module again."
            )
        engine_runs.forget(self._pass.run)
        self._pass = None
        self._bring_back()

    def average_kept(self) -> None:
        """Average what earlier passes have left on this rank, without a pass of its own."""
        self._reducer.open_kept(changed=self._buffers_changed())
        self._average()

    @property
    def active(self) -> float:
        """How many ranks had a part of their own in the last pass that was averaged."""
        return self._reducer.told.active

    def average_over_all(self, over_all: bool) -> None:
        """Is the mean over all ranks, or over those that have a part of their own?"""
        self._reducer.over_all = over_all

    @abstractmethod
    def kept(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """This rank's part of a parameter's gradient that stayed here, or None."""

    def shadow(self) -> bool:
        """Take part in one pass of the other ranks; False if there is none any more."""
        anywhere = self._reducer.shadow()
        if anywhere is None:
            return False
        self._take_over(anywhere)
        self._after_average(active=False)
        return True

    def _on_accumulated(self, index: int) -> Callable[[torch.Tensor], None]:
        # Called once per parameter and step, hundreds of times: nothing here that can wait. torch
        # keeps hooks where Python's collector does not see them: strong references would keep this
        # module, and its memory, for good.
        found = weakref.ref(self)

        def accumulated(parameter: torch.Tensor) -> None:
            hooks = found()
            if hooks is not None:
                if hooks._pass is None or not hooks._pass.takes_place:
                    hooks._take_place()
                hooks._reducer.ready(index)

        return accumulated

    def _announce(self, weight: float) -> None:
        """A gradient has come to the output of a forward whose batch weighs ``weight``."""
        if self._pass is not None:
            self._pass.fed[weight] = None
            if self._pass.takes_place and len(self._pass.fed) > 1:
                raise _several(self._pass.fed)
            return
        if engine_runs.is_distributed():
            raise MpizeroError(
                "backward(): torch.distributed.autograd calls no hooks of parameters, so their "
                "gradients would stay on this rank. Use loss.backward()."
            )
        self._pass = announced = LocalPass({weight: None}, node=torch._C._current_autograd_node())
        announced.run = engine_runs.at_end(self._reducer.lane.order, self._end)
        stated = self._owner._stated
        if stated is None and weight == 1.0 and self._reducer.is_plain:
            return  # nothing needs to be known of what is kept
        try:
            announced.merge = self._plan(announced)
        except ArgumentError as error:
            announced.refusal = error  # unless no parameter gets a gradient
        else:
            if not announced.merge.is_plain:
                self._put_aside(announced.merge)

    def _plan(self, announced: LocalPass) -> Merge:
        """How the gradients of a pass are added to those that are kept."""
        weight = self._weight(announced)
        plain = not weight.stated and weight.value == 1.0 and self._reducer.is_plain
        return self._reducer.plan(weight, plain or self._any_kept())

    def _weight(self, announced: LocalPass) -> Weight:
        stated = self._owner._stated
        if stated is not None:
            # A rank that its loader has left idle weighs nothing, whatever is stated.
            idle = bool(announced.fed) and not any(announced.fed)
            return Weight(0.0, stated=True) if idle else stated
        if len(announced.fed) > 1:
            raise _several(announced.fed)
        return Weight(next(iter(announced.fed), 1.0))

    def _take_place(self) -> None:
        """The first gradient of a pass has come to a parameter."""
        if self._pass is None:
            self._begin_unannounced()
        under_way = self._pass
        assert under_way is not None  # just begun
        if under_way.refusal is not None:
            raise under_way.refusal
        self._owner._check_pass()
        if len(under_way.fed) > 1 and self._owner._stated is None:
            raise _several(under_way.fed)
        under_way.takes_place = True
        under_way.span = recorder().begin_span("backward")
        merge = under_way.merge or self._plan(under_way)
        if self._owner._synchronise:
            self._reducer.open(merge, changed=self._buffers_changed())
        else:
            self._reducer.accumulate(merge)

    def _begin_unannounced(self) -> None:
        """No gradient has come to an output: it was not found, or the loss does without it."""
        if engine_runs.is_nested():
            raise MpizeroError(
                "backward(): a checkpoint with use_reentrant=True came before the output of the "
                "wrapped module, which cannot be seen in what its forward returned (or the inner "
                "module was called): how many passes this is cannot be known. Let the wrapped "
                "module return tensors, containers or dataclasses of them, or checkpoint with "
                "use_reentrant=False."
            )
        doubt = batch_weight.doubt()
        if not self._fed and doubt is not None and self._owner._stated is None:
            raise ArgumentError(
                "backward()", "weight", f"unknown after a forward of the inner module: {doubt}",
                "batches that go through the wrapped module's own forward",
            )  # fmt: skip
        self._pass = begun = LocalPass(dict(self._fed))
        begun.run = engine_runs.at_end(self._reducer.lane.order, self._end)
        # What was kept before can no longer be told from what has come.
        try:
            begun.merge = self._plan(begun)
            doubtful = begun.merge.stated or not begun.merge.is_plain
        except ArgumentError:
            doubtful = True
        if doubtful:
            raise MpizeroError(
                "backward(): this pass has a weight, or gradients of another weight are kept, and "
                "it came to a parameter without passing an output of the wrapped module. Let it "
                "return tensors, or containers or dataclasses of them, and compute the loss from "
                "these."
            )

    def _end(self) -> None:
        """The engine's run is over: average what is left, and hand the results over."""
        under_way = self._pass
        if under_way is None:
            return
        try:
            if not under_way.takes_place and self._is_empty(under_way):
                self._take_place()
        finally:
            self._pass = None
        if not under_way.takes_place:  # no parameter's gradient was asked for
            self._bring_back()
            if self._was_backward(under_way):  # all are frozen
                self._forget_weights()
            return
        self._forget_weights()
        try:
            if self._reducer.is_open:
                self._average()
            else:
                self._keep()
        finally:
            recorder().end_span(under_way.span)

    def _is_empty(self, under_way: LocalPass) -> bool:
        """Is it a backward pass like any other, that has come to no parameter on this rank?

        Other ranks may use some: this one takes part with nothing.
        """
        trains = any(parameter.requires_grad for parameter in self._parameters)
        return trains and self._was_backward(under_way)

    def _was_backward(self, under_way: LocalPass) -> bool:
        """Or were the gradients of other tensors asked for, as by ``autograd.grad``?"""
        return under_way.node is not None and engine_runs.is_for(self._parameters, under_way.node)

    def _forget_weights(self) -> None:
        """What was stated for the next backward pass has had its pass."""
        self._fed = {}
        self._owner._stated = None

    def _average(self) -> None:
        self.steps += 1
        self._take_over(self._reducer.close())
        self._after_average(active=True)
        self._owner._after_pass(self.active)

    @abstractmethod
    def _any_kept(self) -> bool:
        """Are there gradients on this rank, not all zero, from earlier passes?"""

    @abstractmethod
    def _put_aside(self, merge: Merge) -> None:
        """A pass begins whose gradients cannot just be added to those that are kept."""

    @abstractmethod
    def _bring_back(self) -> None:
        """What was put aside stays as it was: there was no pass."""

    @abstractmethod
    def _keep(self) -> None:
        """A pass has ended whose gradients stay on this rank."""

    @abstractmethod
    def _take_over(self, anywhere: list[bool]) -> None:
        """Give the reduced gradients to those of whose parameters any rank has one."""

    def _buffers_changed(self) -> bool:
        buffers = self._owner._buffers_in_sync
        return buffers is not None and buffers.changed()

    def _after_average(self, active: bool) -> None:
        """What ranks that differ in more than their gradients do then. ``active``: see News."""
        buffers, told = self._owner._buffers_in_sync, self._reducer.told
        if buffers is None or not told.changed:
            return
        root = 0
        if told.active != self._owner.world.size:
            root = self._owner.world.gather_objects(active).index(True)
        buffers.broadcast(self._owner.world, root)


def register_accumulated(parameter: nn.Parameter, hook: Callable[[torch.Tensor], None]) -> Any:
    """Call ``hook`` whenever a gradient has been accumulated, also if it is frozen now."""
    frozen = not parameter.requires_grad
    if frozen:
        parameter.requires_grad_(True)  # torch takes hooks for trained parameters only
    try:
        return parameter.register_post_accumulate_grad_hook(hook)
    finally:
        if frozen:
            parameter.requires_grad_(False)


def times(gradient: torch.Tensor | None, factor: float) -> torch.Tensor | None:
    """A gradient times a factor of a Merge; nothing of it for 0, by which NaN would stay NaN."""
    if gradient is None or factor == 0.0:
        return None
    return gradient if factor == 1.0 else gradient * factor


def check_dense(gradient: torch.Tensor, name: str) -> None:
    """Raise ArgumentError for gradients that cannot lie in flat memory."""
    if gradient.is_sparse or gradient.requires_grad:
        given, remedy = (
            ("sparse", "Make the layer with sparse=False.")
            if gradient.is_sparse
            else ("differentiable (create_graph=True)", "Use torch.autograd.grad() for those.")
        )
        raise ArgumentError(
            "backward()",
            "gradient",
            f"{given} for parameter '{name}'",
            "dense gradients without a graph of their own",
            remedy,
        )


def _several(fed: Collection[float]) -> ArgumentError:
    return ArgumentError(
        "backward()", "loss", f"of batches that weigh {', '.join(map(str, fed))}",
        "batches of one weight in one backward pass",
        "Call backward() for each, or state what they weigh together with model.weigh() on all "
        "ranks.",
    )  # fmt: skip
