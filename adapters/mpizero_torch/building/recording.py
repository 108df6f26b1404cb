"""``deferred``: in its context, operations on tensors are noted instead of carried out."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mpizero import ArgumentError
from mpizero_torch.building.call import Call
from mpizero_torch.building.hollow import Nothing, hide
from mpizero_torch.building.tape import (
    FILLER,
    Form,
    Memory,
    Tape,
    UndefinedError,
    leaves,
    replaced,
)

SOURCE = "_mpizero_deferred"  # the attribute of a parameter that says where its values come from

# Functions that read or write a tensor's memory by themselves.
_RAW = {
    "numpy", "__array__", "tolist", "__dlpack__", "data_ptr", "untyped_storage", "storage",
    "_typed_storage", "apply_", "map_", "map2_", "share_memory_", "__reduce_ex__", "__reduce__",
    "_reduce_ex_internal", "to_dlpack", "__cuda_array_interface__",
}  # fmt: skip

# Functions that make tensors, or text, of numbers, which tensors among their arguments may be.
_OF_NUMBERS = {"tensor", "as_tensor", "asarray", "new_tensor", "new", "__repr__"}


@contextmanager
def deferred() -> Iterator[None]:
    """Modules made in this context get no memory; ``mz.zero`` gives them theirs, sharded.

    What constructors and initialisers do to their parameters in here is noted, and done when
    ``mz.zero`` (or ``mz.DistributedDataParallel``) comes to the parameter: the values are those of
    ordinary building with the same seed, and so are the random numbers that are drawn afterwards.
    Buffers and other tensors get their values when the context ends. What is asked for in between
    (``.item()``, ``if``) is computed at once.

    Tensors on GPUs are made as ever. Raises ArgumentError for tensors of other libraries' classes.
    """
    if getattr(_active, "recorder", None) is not None:  # by whoever has opened it first
        yield
        return
    recorder = _active.recorder = Recorder()
    try:
        with _Functions(recorder), _Operations(recorder):
            yield
        recorder.finish()
    finally:
        _active.recorder = None
        recorder.hide_all()


_active = threading.local()


class Recorder:
    """Knows the tensors that have no memory, and what was done to them."""

    def __init__(self) -> None:
        self.tape, self._nothing = Tape(), Nothing()
        self._memories: dict[int, Memory] = {}  # by the address of their storage
        self._holders: list[torch.Tensor] = []

    def form(self, tensor: torch.Tensor) -> Form | None:
        """Where a tensor without memory lies; None for one that has some."""
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            return None
        try:
            memory = self._memories.get(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # of another kind, without a storage
            return None
        if memory is None:
            return None
        return Form.at(memory, tensor)

    def make(self, like: torch.Tensor) -> tuple[torch.Tensor, Form]:
        """A tensor without memory of the form of one of torch's meta device."""
        nbytes = like.untyped_storage().nbytes()
        memory = Memory(self._nothing.storage(nbytes), nbytes)
        self._memories[memory.storage._cdata] = memory
        form = Form.at(memory, like)
        return form.of(memory.storage), form

    def read(self, given: Any) -> Any:
        """Arguments in which tensors without memory are replaced by what they hold."""
        forms = [f for x in leaves(given, torch.Tensor) if (f := self.form(x)) is not None]
        try:
            values = iter(self.tape.tensors(forms, keep=True))
        except UndefinedError:
            raise ArgumentError(
                "deferred()", "model", "a constructor that reads values which nobody has written",
                "values that are written before they are read",
            ) from None  # fmt: skip
        return replaced(given, torch.Tensor, lambda x: x if self.form(x) is None else next(values))

    def realise(self, memories: set[Memory]) -> None:
        """Give these memories, and all tensors that lie in them, their values for good."""
        found = [(t, f) for t, f in self.tensors() if f.memory in memories]
        for memory in memories:
            whole = Form(memory, (memory.nbytes,), (1,), 0, torch.uint8)
            try:
                storage = self.tape.tensors([whole])[0].clone().untyped_storage()
            except UndefinedError:
                storage = self.tape.filled(whole, FILLER).untyped_storage()
            for tensor, form in found:
                if form.memory is memory:
                    tensor.data = form.of(storage)
            del self._memories[memory.storage._cdata]

    def tensors(self) -> list[tuple[torch.Tensor, Form]]:
        """All tensors that lie in memory that there is not, wherever they are kept."""
        found: list[tuple[torch.Tensor, Form]] = []
        with torch._C.DisableTorchFunction():
            for each in gc.get_objects():
                if issubclass(type(each), torch.Tensor) and (form := self.form(each)) is not None:
                    found.append((each, form))
        return found

    def finish(self) -> None:
        """Give everything but parameters its values."""
        self.tape.forget()
        if not self._memories:
            return
        found = self.tensors()
        of_parameters = {form.memory for each, form in found if isinstance(each, nn.Parameter)}
        storages: dict[Memory, torch.UntypedStorage | None] = {}
        for tensor, form in found:
            if form.memory in of_parameters or tensor.grad_fn is not None:
                continue
            if form.memory not in storages:
                storages[form.memory] = self._final(form.memory)
            storage = storages[form.memory]
            if storage is not None:
                tensor.data = form.of(storage)

    def _final(self, memory: Memory) -> torch.UntypedStorage | None:
        try:
            whole = Form(memory, (memory.nbytes,), (1,), 0, torch.uint8)
            return self.tape.tensors([whole])[0].clone().untyped_storage()
        except UndefinedError:
            return None  # it stays without, and says so

    def hide_all(self) -> None:
        """The context is left: let what has no memory explain itself."""
        if self._memories:
            for tensor, form in self.tensors():
                vars(tensor)[SOURCE] = (self.tape, form)
                hide(tensor)
        self._memories = {}


class _Functions(TorchFunctionMode):
    """Lets tensors have memory before something reads it that is none of torch's operations."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in _RAW:
            with _quietly():
                forms = [self._recorder.form(x) for x in leaves((args, kwargs), torch.Tensor)]
                memories = {form.memory for form in forms if form is not None}
                if memories:
                    self._recorder.realise(memories)
        elif name in _OF_NUMBERS:
            own = args[:1] if name.startswith("new") else ()
            with _quietly():
                args, kwargs = self._recorder.read((args[len(own) :], kwargs))
            args = (*own, *args)
        elif name == "__deepcopy__" and self._is_hollow(args[0]):
            copy = args[0].detach().clone().requires_grad_(args[0].requires_grad)
            args[1][id(args[0])] = copy
            return copy
        return function(*args, **kwargs)

    def _is_hollow(self, tensor: torch.Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return self._recorder.form(tensor) is not None


class _Operations(TorchDispatchMode):
    """Notes operations on tensors that have no memory."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would import torch's compiler for this, which takes seconds

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            return Call(self._recorder, function, args, kwargs or {}).answer()


@contextmanager
def _quietly() -> Iterator[None]:
    """In here torch is not watched."""
    with ExitStack() as stack:
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(_disable_current_modes())
        yield
