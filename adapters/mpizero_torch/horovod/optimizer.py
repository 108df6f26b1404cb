"""``DistributedOptimizer``: an optimizer whose gradients are reduced over the ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError, MpizeroError, World
from mpizero_torch.horovod.compression import Compression, Compressor
from mpizero_torch.horovod.gradients import Gradients
from mpizero_torch.horovod.negotiation import Handle
from mpizero_torch.horovod.operations import Adasum, Average, ReduceOp, Sum
from mpizero_torch.horovod.process_set import ProcessSet, global_process_set
from mpizero_torch.horovod.reduce import Reduction, submit_allreduce

Named = list[tuple[str, nn.Parameter]]
Groups = int | Sequence[Sequence[nn.Parameter]] | None

_NAME = "hvd.DistributedOptimizer()"

_TWICE = (
    "optimizer.step() called without optimizer.skip_synchronize() context after "
    "optimizer.synchronize(). Gradients that have been reduced are not reduced again here; in "
    "Horovod that would be done, and take time: put `with optimizer.skip_synchronize():` around it."
)


def DistributedOptimizer(  # noqa: N802  (Horovod's name for it)
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, nn.Parameter]] | None = None,
    compression: type[Compressor] = Compression.none,
    backward_passes_per_step: int = 1,
    op: ReduceOp = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Groups = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """The optimizer, reducing gradients over the ranks before each step.

    What is returned is an optimizer of the same class, with the parameters, options and state of
    ``optimizer``. Gradients are reduced while backward computes the next ones; ``step()`` waits for
    them. To clip them before, call ``synchronize()``, and then ``step()``, under
    ``skip_synchronize()`` if you like.

    Parameters
    ----------
    named_parameters : names for messages, ``model.named_parameters()``; all of the optimizer's.
    compression : what gradients travel as.
    backward_passes_per_step : backward passes whose gradients add up before they are reduced.
    op : Average or Sum of gradients. Adasum: each rank takes its own step, and the steps are
        combined.
    gradient_predivide_factor : with Average, gradients are divided by it before they are summed,
        and the sum is divided by size over it.
    num_groups, groups : taken; gradients are reduced in buckets anyway.
    sparse_as_dense : reduce sparse gradients as dense ones; by default they are gathered. The
        optimizer gets sparse ones back.
    process_set : the ranks that train together; on others this is a plain optimizer.

    Collective. Raises ArgumentError for names that are doubled or missing, and for options that do
    not go together; MismatchError if parameters differ between ranks.
    """

    def make() -> Any:
        _check(op, gradient_predivide_factor, backward_passes_per_step, num_groups, groups)
        names = _names(optimizer, named_parameters)
        base = type(optimizer)
        mixin = _Adasum if op is Adasum else _Reduced
        kind: Any = type(base.__name__, (mixin, base), {})
        new = kind.__new__(kind)
        # Parameters, options and state are those of the optimizer that was given, not copies. But a
        # scheduler that counts its steps has put a step() into it that is the plain one.
        new.__dict__.update((k, v) for k, v in optimizer.__dict__.items() if k != "step")
        new._begin(
            optimizer,
            names,
            process_set,
            compression,
            int(backward_passes_per_step),
            op,
            float(gradient_predivide_factor),
            sparse_as_dense,
        )
        return new

    def together(world: World) -> Any:
        with world.together(_NAME):
            return make()

    if not process_set.included():
        return make()
    # By name, like all that the ranks do together: other threads may be at it, too.
    negotiation = process_set.negotiation
    name = negotiation.name("DistributedOptimizer", None)
    return negotiation.submit(Handle("DistributedOptimizer", name, "an optimizer", together)).wait()


class _Distributed(torch.optim.Optimizer):
    """What both kinds have in common; comes before the optimizer's own class."""

    def _begin(
        self,
        plain: torch.optim.Optimizer,
        names: dict[int, str],
        process_set: ProcessSet,
        compression: type[Compressor],
        passes: int,
        op: ReduceOp,
        predivide: float,
        sparse_as_dense: bool,
    ) -> None:
        self._plain = plain
        self._hvd_names = names
        self._hvd_set = process_set
        self._hvd_compression = compression
        self._hvd_options = passes, op, predivide, sparse_as_dense
        self._hvd_start()

    def _hvd_start(self) -> None:
        """Be ready on the ranks that there are. Again when they have changed."""
        raise NotImplementedError

    def _hvd_named(self) -> Named:
        """The parameters that are trained, and their names."""
        found: Named = []
        for at, group in enumerate(self.param_groups):
            for number, parameter in enumerate(group["params"]):
                if parameter.requires_grad:
                    name = self._hvd_names.get(id(parameter), f"parameter {number} of group {at}")
                    found.append((name, parameter))
        return found

    def _hvd_step(self, closure: Any) -> Any:
        # A scheduler made of the plain optimizer looks there for whether steps are taken.
        self._plain._opt_called = True  # type: ignore[attr-defined]
        return super().step() if closure is None else super().step(closure)


class _Reduced(_Distributed):
    """Average and Sum: gradients are reduced, and then all ranks take the same step."""

    _gradients: Gradients | None = None

    def _hvd_start(self) -> None:
        if self._gradients is not None:
            self._gradients.remove()
        self._gradients = None
        self._waits_in_step = True
        self._is_reduced = False
        process_set = self._hvd_set
        if process_set.included() and process_set.size() > 1:
            passes, op, predivide, sparse_as_dense = self._hvd_options
            self._gradients = Gradients(
                self._hvd_named(),
                process_set,
                compression=self._hvd_compression,
                passes=passes,
                prescale=1.0 / predivide,
                divisor=1.0 if op is Sum else process_set.size() / predivide,
                sparse_as_dense=sparse_as_dense,
            )

    def synchronize(self) -> None:
        """Wait until all gradients are reduced. Collective."""
        gradients = self._gradients
        if gradients is not None:
            named = self._hvd_named()
            late = gradients.unwatched(named)  # unfrozen, or added, since the last time
            if late:
                gradients.add(late)
            gradients.synchronize()
            if late:
                gradients.watch(named)
        self._is_reduced = True

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Steps in this context take gradients as they are: after ``synchronize()``."""
        self._waits_in_step = False
        try:
            yield
        finally:
            self._waits_in_step = True

    def set_backward_passes_per_step(self, passes: int) -> None:
        """How many backward passes add up from now on."""
        self._hvd_options = (passes, *self._hvd_options[1:])
        if self._gradients is not None:
            self._gradients.passes = passes

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Wait for the gradients, if that has not been done, and take the optimizer's step.

        The gradients of a ``closure`` are reduced each time that it is called.
        """
        if self._waits_in_step and closure is None:
            if self._is_reduced:
                warnings.warn(_TWICE, stacklevel=2)
            if not self._has_reduced():
                self.synchronize()
        self._is_reduced = False
        if closure is None or not self._waits_in_step:
            return self._hvd_step(closure)
        given = closure

        def reduced() -> Any:
            with torch.enable_grad():
                loss = given()
            self.synchronize()
            return loss

        return self._hvd_step(reduced)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """As the optimizer's. MpizeroError while gradients are being reduced."""
        if self._gradients is not None and self._gradients.under_way:
            raise MpizeroError(
                "zero_grad() was called after backward() and before step() or synchronize(), while "
                "the gradients are being reduced."
            )
        super().zero_grad(*args, **kwargs)

    def _has_reduced(self) -> bool:
        """Have the gradients been waited for, and none come since?"""
        return self._is_reduced and not (self._gradients is not None and self._gradients.under_way)


class _Adasum(_Distributed):
    """Adasum: each rank takes the step of its own gradients, and the steps are combined."""

    def _hvd_start(self) -> None:
        self._hvd_set.included()  # is it registered?

    def synchronize(self) -> None:
        """Nothing: there is nothing to reduce before the step."""

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Refused with ArgumentError: the reduction is part of the step."""
        raise ArgumentError(
            "skip_synchronize()", "op", "Adasum", "Average or Sum", "With Adasum steps are reduced."
        )
        yield

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the step, and go from where all ranks were by the Adasum of their steps."""
        parameters = [parameter for _, parameter in self._hvd_named()]
        before = [parameter.detach().clone() for parameter in parameters]
        loss = self._hvd_step(closure)
        if self._hvd_set.included() and self._hvd_set.size() > 1:
            deltas = [p.detach() - start for p, start in zip(parameters, before, strict=True)]
            pairs = [self._hvd_compression.compress(each) for each in deltas]
            small = [each for each, _ in pairs]
            handle = submit_allreduce(small, Reduction(Adasum), None, self._hvd_set, True)
            combined = zip(handle.wait(), pairs, strict=True)
            whole = [self._hvd_compression.decompress(each, ctx) for each, (_, ctx) in combined]
            for parameter, start, delta in zip(parameters, before, whole, strict=True):
                parameter.detach().copy_(start + delta)
        return loss


# To torch: the hooks on steps are called by the step of the optimizer's own class, inside of these.
for _step in (_Reduced.step, _Adasum.step):
    vars(_step)["hooked"] = True


def _check(op: ReduceOp, predivide: float, passes: int, num_groups: int, groups: Groups) -> None:
    if op not in (Average, Sum, Adasum):
        raise ArgumentError(_NAME, "op", str(op), "Average, Sum or Adasum")
    if op is not Average and predivide != 1.0:
        raise ArgumentError(
            _NAME, "gradient_predivide_factor", f"{predivide} with op={op}", "with Average only"
        )
    if not predivide > 0:
        raise ArgumentError(_NAME, "gradient_predivide_factor", str(predivide), "a number > 0")
    if passes < 1:
        raise ArgumentError(_NAME, "backward_passes_per_step", str(passes), "a whole number >= 1")
    for argument, value in (("num_groups", num_groups), ("groups", groups)):
        if isinstance(value, int) and value < 0:
            raise ArgumentError(
                _NAME, argument, str(value), "a number >= 0, or lists of parameters"
            )
    if groups is not None and not isinstance(groups, int):
        listed = [id(each) for group in groups for each in group]
        if len(set(listed)) < len(listed):
            raise ArgumentError(
                _NAME, "groups", "a list with a parameter in several groups", "in one group each"
            )


def _names(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]] | None
) -> dict[int, str]:
    """The parameters' names, by identity."""
    if named is None:
        return {}
    pairs = list(named)
    if any(not isinstance(each, tuple) or len(each) != 2 for each in pairs):
        raise ArgumentError(
            _NAME, "named_parameters", "a list of something else than pairs",
            "pairs of name and parameter: model.named_parameters()",
        )  # fmt: skip
    names = [name for name, _ in pairs]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ArgumentError(
            _NAME, "named_parameters", f"with several {doubled}", "one parameter for each name"
        )
    of = {id(parameter): name for name, parameter in pairs}
    unnamed = [
        f"parameter {number} of group {at}, shape {tuple(parameter.shape)}"
        for at, group in enumerate(optimizer.param_groups)
        for number, parameter in enumerate(group["params"])
        if id(parameter) not in of
    ]
    if unnamed:
        raise ArgumentError(
            _NAME, "named_parameters", f"without a name for {', '.join(unnamed[:4])}",
            "names for all of the optimizer's parameters, or None",
        )  # fmt: skip
    return of
