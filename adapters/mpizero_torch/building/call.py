"""One call of an operation in ``mz.deferred()``: noted, carried out at once, or let through."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpizero import ArgumentError
from mpizero_torch.building.tape import Form, Memory, Operation, blank, leaves, replaced

if TYPE_CHECKING:
    from mpizero_torch.building.recording import Recorder


class Call:
    """One call of an operation."""

    def __init__(self, recorder: Recorder, function: Any, args: Any, kwargs: Any) -> None:
        self._recorder, self._function = recorder, function
        self._args, self._kwargs = args, kwargs
        self._given = leaves((args, kwargs), torch.Tensor)
        self._forms = {id(each): recorder.form(each) for each in self._given}
        self._tags = function.tags

    def answer(self) -> Any:
        """What the caller gets."""
        if not any(self._forms.values()):
            if self._makes_one:
                try:
                    return self._note()
                except NotImplementedError:
                    pass
            return self._function(*self._args, **self._kwargs)
        for each in self._given:
            kind = type(each).__torch_dispatch__
            if kind is not torch._C._disabled_torch_dispatch_impl and type(each) not in _KNOWN:
                raise ArgumentError(
                    "deferred()", "model", f"a {type(each).__name__}", "torch's plain tensors",
                    "Build such a model outside.",
                )  # fmt: skip
        if self._is_view:
            return self._function(*self._args, **self._kwargs)
        if self._needs_values:
            return self._now()
        try:
            return self._note()
        except NotImplementedError:  # torch does not know the result's form beforehand
            return self._now()

    @property
    def _makes_one(self) -> bool:
        """Does it make a tensor, on the CPU, out of no other?"""
        returns = self._function._schema.returns
        device = self._kwargs.get("device")
        return (
            not self._given
            and len(returns) == 1
            and str(returns[0].type) == "Tensor"
            and any(argument.name == "device" for argument in self._function._schema.arguments)
            and (device is None or torch.device(device).type == "cpu")
            and self._kwargs.get("layout") in (None, torch.strided)
        )

    @property
    def _is_view(self) -> bool:
        """Does it change only how memory is looked at?"""
        return bool(self._function.is_view) or torch.Tag.inplace_view in self._tags

    @property
    def _needs_values(self) -> bool:
        """Is its result no tensor, or of a form that follows from values, or elsewhere?"""
        schema = self._function._schema
        if self._name in _WRITING_UNSAID:
            return True
        tags = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
        if any(tag in self._tags for tag in tags):
            return True
        if not all("Tensor" in str(each.type) for each in schema.returns):
            return True
        device = self._kwargs.get("device")
        if device is not None and torch.device(device).type != "cpu":
            return True
        if any(each.device.type != "cpu" or each.layout != torch.strided for each in self._given):
            return True
        return any(self._forms[id(each)] is None for each in self._written())

    def _written(self) -> list[torch.Tensor]:
        """The arguments that it writes to."""
        found: list[torch.Tensor] = []
        for at, argument in enumerate(self._function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = self._kwargs.get(argument.name)
                if given is None and at < len(self._args):
                    given = self._args[at]
                found += leaves(given, torch.Tensor)
        return found

    def _now(self) -> Any:
        """Carry it out, with the values that there are by now."""
        written = self._given if self._name in _WRITING_UNSAID else self._written()
        hollow = [f for each in written if (f := self._forms[id(each)]) is not None]
        if hollow:
            self._recorder.realise({form.memory for form in hollow})
        args, kwargs = self._recorder.read((self._args, self._kwargs))
        return self._function(*args, **kwargs)

    def _note(self) -> Any:
        """Note it; the caller gets tensors of the form that the result has."""
        storages: dict[Memory, torch.UntypedStorage] = {}
        random = None
        if torch.Tag.nondeterministic_seeded in self._tags:
            random, stand_ins, made = self._draw()
        else:
            stand_ins, made = self._on_meta(storages)
        for each in self._written():
            form = stand_ins[id(each)]
            if form.shape != each.shape or form.stride() != each.stride():
                raise ArgumentError(
                    "deferred()", "model", f"{self._function} into a tensor of another shape",
                    "a tensor of the shape of what is written to it",
                )  # fmt: skip
        makes: list[Form | None] = []
        owner = {id(stand_ins[id(each)]): each for each in self._given}
        lies_in = {storage._cdata: memory for memory, storage in storages.items()}

        def result(like: torch.Tensor) -> torch.Tensor:
            made = None
            if id(like) in owner:
                found: torch.Tensor = owner[id(like)]
            elif (memory := lies_in.get(like.untyped_storage()._cdata)) is not None:
                found = Form.at(memory, like).of(memory.storage)  # a view of what was given
            elif like.numel() == 0:
                form = like.shape, like.stride()
                found = torch.empty_strided(*form, dtype=like.dtype, device="cpu")
            else:
                found, made = self._recorder.make(like)
            makes.append(made)
            return found

        found = replaced(made, torch.Tensor, result)
        self._write_down(makes, random)
        return found

    def _on_meta(self, storages: dict[Memory, torch.UntypedStorage]) -> tuple[dict[int, Any], Any]:
        """What torch says would come out: the arguments by their id, and the result."""
        stand_ins: dict[int, Any] = {}
        for each in self._given:
            form = self._forms[id(each)]
            stand_ins[id(each)] = form.on_meta(storages) if form else each.to("meta")
        args, kwargs = self._replaced(lambda each: stand_ins[id(each)])
        if "device" in kwargs or self._makes_one:
            kwargs = {**kwargs, "device": torch.device("meta")}
        kwargs.pop("pin_memory", None)
        return stand_ins, self._function(*args, **kwargs)

    def _write_down(self, makes: list[Form | None], random: Any) -> None:
        args, kwargs = self._replaced(lambda each: self._forms[id(each)] or each.clone())
        written = self._written()
        writes = [f for each in written if (f := self._forms[id(each)]) is not None]
        are_written = {id(each) for each in written}
        reads = [
            f for each in self._given
            if id(each) not in are_written and (f := self._forms[id(each)]) is not None
        ]  # fmt: skip
        tape = self._recorder.tape
        operation = Operation(
            tape.now, self._function, args, kwargs, reads, writes, makes, random,
            leaves_undefined=_is_empty(self._function),
        )  # fmt: skip
        tape.note(operation)

    def _replaced(self, replace: Callable[[torch.Tensor], Any]) -> Any:
        return replaced((self._args, self._kwargs), torch.Tensor, replace)

    def _draw(self) -> tuple[tuple[torch.Generator, torch.Tensor], dict[int, Any], Any]:
        """Draw the random numbers, so that the next ones are right, and forget them.

        Returns where it began, and as ``_on_meta`` does.
        """
        given = leaves((self._args, self._kwargs), torch.Generator)
        generator = given[0] if given else torch.default_generator
        state = generator.get_state()
        written = self._written()
        if len(self._given) == len(written) == 1 and self._name in _BY_COUNT:
            form = self._forms[id(written[0])]
            values = [] if form is None else [form.of(blank(form.memory.nbytes))]
        else:
            values = leaves(self._recorder.read((self._args, self._kwargs)), torch.Tensor)
        stand_ins = {id(each): own for each, own in zip(self._given, values, strict=True)}
        args, kwargs = self._replaced(lambda each: stand_ins[id(each)])
        return (generator, state), stand_ins, self._function(*args, **kwargs)

    @property
    def _name(self) -> str:
        return str(self._function.__name__).partition(".")[0]


_KNOWN = (
    (torch.Tensor, nn.Parameter, nn.Buffer)
    if hasattr(nn, "Buffer")
    else (torch.Tensor, nn.Parameter)
)

# Draw numbers by how many elements there are, whatever these are.
_BY_COUNT = {
    "normal_", "uniform_", "random_", "exponential_", "cauchy_", "log_normal_", "geometric_",
    "bernoulli_",
}  # fmt: skip

# Write to some of their arguments, and do not say so.
_WRITING_UNSAID = {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"}


def _is_empty(function: Any) -> bool:
    """Does it make a tensor whose values it leaves to chance?"""
    return str(function.__name__).startswith(("empty", "new_empty"))
