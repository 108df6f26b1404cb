"""The gradients' mean in this rank's shards, and what the program does to it between the passes.

A program changes gradients through ``.grad``: None means that a gradient is forgotten, ``zero_()``
that it is zero, and a tensor put there is the gradient from then on, the same one on all ranks.
What is done to a stand-in reaches this rank's part at once; what takes its place is found before
the shards are used the next time. Either is noted down as a *mark*, which the ranks compare.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError, MpizeroError
from mpizero_torch import slices
from mpizero_torch.sharding.guards import Guards
from mpizero_torch.sharding.optimizer import ShardedOptimizer
from mpizero_torch.sharding.runs import Run
from mpizero_torch.sharding.stand_in import ShardedGradient

_UNTOUCHED = 1  # the mark of a gradient as the pass has left it


class MeanGradients:
    """Of ``named`` parameters, in the runs of ``optimizers``.

    ``is_reduced(index)``: is this parameter's gradient averaged at all? ``kept()``: the numbers of
    those that have a gradient of this rank's own beside, which no pass has averaged. ``come()``: a
    gradient is about to be added to one of these.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        optimizers: Sequence[ShardedOptimizer],
        is_reduced: Callable[[int], bool],
        kept: Callable[[], Collection[int]],
        come: Callable[[], None],
    ) -> None:
        self._names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        self._optimizers, self._is_reduced, self._kept = list(optimizers), is_reduced, kept
        self.marks: dict[int, int] = {}  # of those that have a gradient in the shards
        self._changed: dict[int, str] = {}  # and what was done to them since the ranks agreed
        self._as_left: dict[int, tuple[Any, int]] = {}  # of those that have one here, too
        self._weakly = weakref.ref(self)
        self._seen: list[int] = []
        self.as_summed = True  # are they all as the last pass has summed them?
        self._stand_ins = [
            ShardedGradient.for_parameter(parameter, name, self._changer(index))
            for index, (name, parameter) in enumerate(named)
        ]
        self._guards = Guards(self._parameters, come)

    def placed(self, anywhere: Sequence[bool]) -> None:
        """A pass has put gradients into the shards, of these parameters."""
        for index, used in enumerate(anywhere):
            if used:
                self.marks.setdefault(index, _UNTOUCHED)
        self.as_summed = True
        self.saw()
        self.show()

    @property
    def own(self) -> list[torch.Tensor]:
        """This rank's part of them, as it is."""
        return [run.gradient for run in self._runs()]

    def show(self) -> None:
        """Let ``.grad`` say where the gradients are."""
        for index in self.marks:
            if self._parameters[index].grad is None:
                self.stand_in(index)

    def give_way(self) -> None:
        """Autograd is about to add gradients to what is there: not to a stand-in."""
        self._guards.remove()
        for parameter in self._parameters:
            if isinstance(parameter.grad, ShardedGradient):
                parameter.grad = None

    def stand_in(self, index: int, shown: ShardedGradient | None = None) -> None:
        """Let a stand-in, the mean's by default, be a parameter's ``.grad``."""
        self._parameters[index].grad = self._stand_ins[index] if shown is None else shown
        self._guards.watch(index)

    def saw(self) -> None:
        """The shards are as the passes, and what is done here, have left them."""
        self._seen = [run.gradient._version for run in self._runs()]

    @property
    def written(self) -> bool:
        """Has anybody else written to the shards since then?"""
        return [run.gradient._version for run in self._runs()] != self._seen

    def left_here(self) -> None:
        """A pass has ended whose gradients stay on this rank: note what lies beside a mean."""
        self.show()
        self._as_left = {
            index: _state(self._parameters[index].grad)
            for index in self._kept()
            if index in self.marks
        }

    def follow(self, came: bool = False) -> None:
        """Do to the shards what has been done to ``.grad``. On this rank: the marks tell of it.

        ``came``: some of a pass's gradients may have come already, so that what lies in ``.grad``
        is averaged with the rest of them.
        """
        self._follow_parts()
        kept = self._kept()
        gone: list[int] = []
        new: dict[int, torch.Tensor] = {}
        for index, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if gradient is None or (came and index not in kept and _is_plain(gradient)):
                if index in self.marks:
                    gone.append(index)
            elif gradient is not self._stand_ins[index] and index not in kept:
                if isinstance(gradient, ShardedGradient):
                    raise _not_its_own(self._names[index])
                if not kept and self._is_reduced(index):
                    new[index] = gradient
        if len(gone) < len(self.marks) and ((kept and gone) or self._changed_here(kept)):
            raise _half_way(self._names[(gone or list(self._as_left))[0]])
        self.forget(gone)
        if new and self.marks and self.written:
            raise MpizeroError(
                f".grad of '{self._names[min(new)]}' was set, and the optimizer's own gradients "
                "were written to (GradScaler.unscale_?): in which order cannot be told. Use "
                "mz.set_gradient(p, gradient), which sets it at once."
            )
        for index, gradient in new.items():
            self.set(index, gradient)

    def forget(self, indices: Collection[int]) -> None:
        """Leave these without a gradient, as if no pass had come to them."""
        if not indices:
            return
        was_written = self.written
        for index in indices:
            del self.marks[index]
            self._changed.pop(index, None)
            self._as_left.pop(index, None)
        if self.marks:
            for optimizer in self._optimizers:
                optimizer.forget(set(indices).__contains__)
        else:
            self.clear_all()
        self.as_summed = False
        self._changed.update(dict.fromkeys(indices, "forgotten") if self.marks else {})
        if not was_written:
            self.saw()

    def clear(self, members: Collection[int]) -> None:
        """Forget those of these parameters: all, or all of some of the optimizers."""
        if len(members) == len(self._parameters):
            self.clear_all()
        else:
            self.forget(sorted(self.marks.keys() & set(members)))

    def clear_all(self) -> None:
        """Forget all."""
        self.marks.clear()
        self._changed.clear()
        self._as_left.clear()
        for optimizer in self._optimizers:
            for run in optimizer.runs:
                run.forget()

    def zero(self, members: Collection[int]) -> None:
        """Let those of these parameters be zero: all, or all of some of the optimizers."""
        own = set(members)
        for run in self._runs():
            if own.issuperset(piece.index for piece in run.pieces):
                run.gradient.zero_()
        for index in own & self.marks.keys():
            self._note(index, "zero_")

    def set(self, index: int, gradient: torch.Tensor) -> None:
        """Let this be a parameter's gradient: this rank keeps its part of it."""
        name = self._names[index]
        if gradient.is_sparse or gradient.requires_grad:
            raise ArgumentError(
                ".grad", "gradient", f"sparse or differentiable for parameter '{name}'",
                "dense gradients without a graph of their own",
            )  # fmt: skip
        was_written = self.written
        flat = self._local(index, gradient).detach().reshape(-1)
        for run, piece in self._pieces(index):
            run.gradient.view(-1)[piece.place].copy_(flat[piece.elements])
        self.marks.pop(index, None)
        for optimizer in self._optimizers:
            if index in optimizer.members:
                optimizer.receive(lambda each: each == index)
        self._note(index, "set", flat)
        self.stand_in(index)
        if not was_written:
            self.saw()

    @property
    def digest(self) -> int:
        """Of all marks: 0 if there is no gradient, else equal for ranks that have done the same."""
        if not self.marks:
            return 0
        return 1 + digest_of([str(sorted(self.marks.items()))])

    def agree(self) -> None:
        """The ranks have found that they have the same marks."""
        if self._changed:
            self._changed.clear()
            self.marks = dict.fromkeys(self.marks, _UNTOUCHED)

    @property
    def description(self) -> str:
        """What this rank has, for an error that compares."""
        have = f"gradients of {len(self.marks)} parameters" if self.marks else "no gradients"
        done = [
            f"'{self._names[index]}' {what}{self._number(index)}"
            for index, what in sorted(self._changed.items())
        ]
        return ", ".join([have, *done[:8], *(["..."] if done[8:] else [])])

    def _number(self, index: int) -> str:
        """Tells changes by other values apart."""
        return f" (#{self.marks[index] % (1 << 24):06x})" if index in self.marks else ""

    def _runs(self) -> Iterator[Run]:
        return (run for run in self._all_runs() if run.has_gradient)

    def _all_runs(self) -> Iterator[Run]:
        return (run for optimizer in self._optimizers for run in optimizer.runs)

    def _pieces(self, index: int) -> Iterator[tuple[Run, Any]]:
        for run in self._all_runs():
            for piece in run.pieces:
                if piece.index == index:
                    yield run, piece

    def _changer(self, index: int) -> Callable[[str, tuple[Any, ...], dict[str, Any]], None]:
        found = self._weakly  # a stand-in must not keep the model for good

        def change(method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            gradients = found()
            if gradients is not None:
                gradients._change(index, method, args, kwargs)

        return change

    @torch.no_grad()
    def _change(
        self, index: int, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Do to this rank's part of a gradient what ``method`` does to all of it."""
        if self._kept():
            raise _half_way(self._names[index])
        if method == "__setitem__":
            method, args = self._as_masked(index, *args)
        was_written = self.written
        given = [self._spread(index, each) for each in args]
        named = {key: self._spread(index, each) for key, each in kwargs.items()}
        for run, piece in self._pieces(index):
            part = run.gradient.view(-1)[piece.place]
            own = [_part(each, piece.elements, part) for each in given]
            others = {key: _part(each, piece.elements, part) for key, each in named.items()}
            if method == "where":
                part.copy_(torch.where(own[0], own[1], part))
            else:
                getattr(part, method)(*own, **others)
        self._note(index, method, *given, *named.items())
        if not was_written:
            self.saw()

    def _as_masked(self, index: int, key: Any, value: Any) -> tuple[str, tuple[Any, ...]]:
        """An assignment to elements: to which, and a tensor that has what they become."""
        if slices.is_slice(self._parameters[index]):
            raise _of_a_slice(self._names[index])
        stand_in = self._stand_ins[index]
        there = torch.zeros(stand_in.shape, dtype=torch.bool, device=stand_in.device)
        there[key] = True
        values = torch.zeros(stand_in.shape, dtype=stand_in.dtype, device=stand_in.device)
        values[key] = value
        return "where", (there, values)

    def _spread(self, index: int, given: Any) -> Any:
        """A tensor that is given, for all of this rank's slice of the parameter, 1-D."""
        if not isinstance(given, torch.Tensor):
            return given
        if given.dim() == 0:
            return given.item()
        shape = slices.local(self._parameters[index]).shape
        return self._local(index, given).detach().expand(shape).reshape(-1)

    def _local(self, index: int, given: torch.Tensor) -> torch.Tensor:
        parameter = self._parameters[index]
        if slices.is_slice(parameter) and given.dim():
            form: Any = given
            like: Any = parameter
            if not slices.is_slice(given) or form.placements != like.placements:
                raise _of_a_slice(self._names[index])
        return slices.local(given)

    def _note(self, index: int, what: str, *given: Any) -> None:
        """A gradient was changed on this rank: another must have done the same."""
        known = self.marks.get(index, 0)
        self.as_summed = False
        self.marks[index] = digest_of([str(known), what, *map(octets, given)])
        self._changed[index] = _WORDS.get(what, f"changed by {what}()")

    def _follow_parts(self) -> None:
        """What was done to ``.grad`` of the optimizer's own parameters, this rank's shards."""
        runs = list(self._runs())
        lost = [run for run in runs if run.parameter.grad is None]
        if lost and len(lost) < len(runs):
            raise MpizeroError(
                "some of the gradients of a sharded optimizer's parameters were set to None: they "
                "are this rank's shards, and lie in other places on the others. Set p.grad = None "
                "for parameters of the model, or call optimizer.zero_grad()."
            )
        if lost:
            for parameter in self._parameters:
                if isinstance(parameter.grad, ShardedGradient):
                    parameter.grad = None
            self.clear_all()
            return
        for run in runs:
            run.take_changes()

    def _changed_here(self, kept: Collection[int]) -> bool:
        return any(
            now[0] is not before[0] or now[1] != before[1]
            for index, before in self._as_left.items()
            if index in kept and (now := _state(self._parameters[index].grad))
        )


def _is_plain(gradient: torch.Tensor) -> bool:
    return not isinstance(gradient, ShardedGradient)


_WORDS = {"set": "set", "zero_": "zeroed", "where": "assigned to"}


def _part(given: Any, elements: slice, like: torch.Tensor) -> Any:
    if not isinstance(given, torch.Tensor):
        return given
    part = given[elements]
    return part.to(like.device) if part.dtype == torch.bool else part.to(like)


def _state(gradient: Any) -> tuple[Any, int]:
    """Which tensor it is, and how often it has been written to."""
    held = vars(gradient).get("held", gradient) if gradient is not None else None
    return gradient, -1 if held is None else held._version


def digest_of(parts: Iterable[str | bytes]) -> int:
    """A number for all of these, the same on every rank that has the same."""
    found = hashlib.blake2b(digest_size=7)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(f"{len(data)}:".encode() + data)
    return int.from_bytes(found.digest(), "little")


def octets(value: Any) -> bytes:
    """What a value is, bit for bit."""
    if not isinstance(value, torch.Tensor):
        return repr(value).encode()
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _not_its_own(name: str) -> MpizeroError:
    return MpizeroError(
        f".grad of '{name}' was set to another parameter's, which is sharded over the ranks. Use "
        "mz.set_gradient(p, mz.full_gradient(q))."
    )


def _of_a_slice(name: str) -> ArgumentError:
    return ArgumentError(
        ".grad", "gradient", f"a plain tensor for '{name}', which tensor parallelism has cut up",
        "numbers, or a DTensor that is cut up as the parameter is",
    )  # fmt: skip


def _half_way(name: str) -> MpizeroError:
    return MpizeroError(
        f".grad of '{name}' was changed while some of the gradients are averaged already, and "
        "others have been accumulated on this rank, under no_sync(). Change gradients after the "
        "backward() that averages them, or forget all with optimizer.zero_grad()."
    )
