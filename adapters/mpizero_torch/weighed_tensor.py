"""Tensors that know what their batch weighs, and pass it on to all that is computed from them.

The loader that knows a batch's weight and the module that needs it meet only in the user's loop, in
which batches are read ahead, kept, mixed with others and looked at. So the weight travels with the
batch: its tensors are of a class of their own, which torch asks before every function that it is
called with (``__torch_function__``), and refer to one mark. Where content goes to what is no
tensor of ours (numpy, Python's numbers, a tensor that was there before) nobody can follow it: the
mark says that it has escaped.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mpizero import ArgumentError


class Outlet:
    """Where batches come from; remembers those whose content has escaped for good.

    ``evaluation``: of batches that nothing is trained on, so that no training input can be of them.
    ``has_numbers``: numbers may be of its uneven batches, since a loop over it began; ``fillers``:
    "float", "int" or "size", may be of a filler, since any loop began.
    """

    def __init__(self, evaluation: bool = False) -> None:
        self.evaluation = evaluation
        self.escaped: dict[float | None, Mark] = {}
        self.has_numbers = False
        self.fillers: set[str] = set()

    def note(self, kind: str, filler: bool) -> None:
        """A number of that kind has been made of an uneven batch."""
        self.has_numbers |= kind != "size"
        if filler:
            self.fillers.add(kind)
        with _lock:
            outlets.add(self)


class Mark:
    """What a batch weighs: one for all that comes of it. ``weight`` None: of several, differing.

    ``escaped``: how its content has left the tensors, or "". A number that was looked at may be
    forgotten when the tensors are; what may be kept as data is remembered as long as the outlet is.
    """

    def __init__(
        self, weight: float | None, outlet: Outlet | None = None, of: Sequence[Mark] = ()
    ) -> None:
        self.weight, self.of = weight, tuple(of)
        self.escaped = ""
        self._outlet = None if outlet is None else weakref.ref(outlet)
        with _lock:
            live.add(self)

    @property
    def outlet(self) -> Outlet | None:
        """Where it was handed out, if that is still there."""
        return None if self._outlet is None else self._outlet()

    def escape(self, how: str, for_good: bool, holder: Any = None) -> None:
        """Its content has gone where it cannot be followed: into ``holder``, maybe."""
        for each in self.of:
            each.escape(how, for_good, holder)
        if self.weight == 1.0:  # as everything else that is not marked
            return
        if torch.compiler.is_compiling():  # the compiler looks at the tensors that it is given
            return
        outlet = self.outlet
        if outlet is not None and self.weight is not None:
            for kind, other in (("int", float), ("float", int)):
                if not isinstance(holder, other):
                    outlet.note(kind, self.weight == 0.0)
        if outlet is not None and outlet.evaluation:
            return
        self.escaped = self.escaped or how
        with _lock:
            doubtful.add(self)
        if not for_good:
            return
        if outlet is not None:
            outlet.escaped.setdefault(self.weight, self)
        if isinstance(holder, np.ndarray):
            weakref.finalize(holder, _nothing, self).atexit = False

    def count(self) -> None:
        """Its form was asked for: of a filler, that may be counted as if it were samples."""
        outlet = self.outlet
        if self.weight == 0.0 and outlet is not None and not torch.compiler.is_compiling():
            outlet.note("size", True)


outlets: weakref.WeakSet[Outlet] = weakref.WeakSet()  # of which there are numbers
live: weakref.WeakSet[Mark] = weakref.WeakSet()
doubtful: weakref.WeakSet[Mark] = weakref.WeakSet()
_lock = threading.Lock()


def _nothing(_: Mark) -> None:
    """What a finalizer calls that only keeps something."""


def joint(marks: Sequence[Mark]) -> Mark:
    """The mark of what comes of all of these."""
    if not marks:
        return Mark(None)
    first = marks[0]
    if all(mark is first or mark.weight == first.weight is not None for mark in marks):
        return first
    parts: dict[float | None, Mark] = {}
    for mark in marks:
        for each in mark.of or (mark,):
            parts.setdefault(each.weight, each)
    for mark in marks:
        if mark.weight is None and len(mark.of) == len(parts):
            return mark  # one of them is of all the others already
    return Mark(None, of=list(parts.values()))


class _Following(threading.local):
    """``pass_weight``: of the forward under way in this thread, if one is."""

    pass_weight: float | None = None


following = _Following()


class WeighedTensor(torch.Tensor):
    """A tensor of a batch, or computed from one, that refers to the batch's mark."""

    mark: Mark

    @classmethod
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _call(function, types, args, kwargs or {})

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return str(bare(self).__repr__(**options))

    def __format__(self, spec: str) -> str:
        return str(bare(self).__format__(spec))

    def __copy__(self) -> torch.Tensor:
        return wrapped(copy.copy(bare(self)), self.mark)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            # A memo of its own: in the common one the bare tensor's number would outlive it.
            memo[id(self)] = wrapped(copy.deepcopy(bare(self), {}), self.mark)
        found: torch.Tensor = memo[id(self)]
        return found

    def as_subclass(self, cls: Any) -> Any:
        """Of another class, which passes nothing on."""
        self.mark.escape("as_subclass()", for_good=True)
        return super().as_subclass(cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a plain tensor: weights have no meaning in another process, or another day."""
        self.mark.escape("pickle", for_good=True)
        return bare(self).__reduce_ex__(protocol)


def bare(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, and place in the graph, as a plain tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        if tensor.requires_grad:
            return torch.Tensor.as_subclass(tensor, torch.Tensor)
        return tensor.detach()


def wrapped(tensor: torch.Tensor, mark: Mark) -> torch.Tensor:
    """The same memory, marked; the tensor itself stays as it is. Only for plain and marked ones."""
    if isinstance(tensor, WeighedTensor) and tensor.mark is mark:
        return tensor
    return _become(bare(tensor), mark)


def _become(tensor: torch.Tensor, mark: Mark) -> torch.Tensor:
    # In place: a tensor that requires gradients stays a leaf, a tuple of results as it is.
    tensor.__class__ = WeighedTensor
    tensor.mark = mark  # type: ignore[attr-defined]
    return tensor


def mark_of(tensor: Any) -> Mark | None:
    """The mark of a marked tensor; None for others."""
    return _mark(tensor) if isinstance(tensor, WeighedTensor) else None


def _mark(tensor: torch.Tensor) -> Mark:
    # There is none where torch has made a tensor of our class without asking us.
    found: Mark | None = tensor.__dict__.get("mark")
    return Mark(None) if found is None else found


def _call(function: Any, types: Any, args: Any, kwargs: Any) -> Any:
    name = _name(function)
    asked = name.removeprefix(".")
    if asked in _QUESTIONS or (asked.startswith("is_") and asked != "is_nonzero"):
        with torch._C.DisableTorchFunctionSubclass():
            answer = function(*args, **kwargs)
        if asked in _SIZES:
            for each in _marked(args):
                _mark(each).count()
        if not isinstance(answer, torch.Tensor) or isinstance(answer, WeighedTensor):
            return answer
        if asked == "_base":  # not a new tensor, but somebody's, who may know nothing of us
            return answer
        return _results(answer, name, joint([*map(_mark, _marked(args))]), (), set())
    tensors, marked = [*_tensors((args, kwargs))], _marked((args, kwargs))
    mark = joint([*map(_mark, marked)])
    _check_pass(mark)
    if name == "backward" and not _marked(kwargs.get("inputs")):
        # It runs Python code, which must find torch's functions as they are.
        return function(*_stripped(args), **_stripped(kwargs))
    foreign = [kind for kind in types if not issubclass(kind, WeighedTensor)]
    if foreign:
        result = function(*_stripped(args), **_stripped(kwargs))
        return _results(result, name, mark, marked, {id(each) for each in tensors})
    with torch._C.DisableTorchFunctionSubclass():
        versions = [_version(each) for each in tensors]
        result = function(*args, **kwargs)
        _note_writing(name, mark, marked, tensors, versions)
        return _results(result, name, mark, marked, {id(each) for each in tensors})


def _check_pass(mark: Mark) -> None:
    """Within a forward that was fed with another weight this batch cannot be weighed."""
    weight = following.pass_weight
    if weight is None or mark.weight == weight or not torch.is_grad_enabled():
        return
    raise ArgumentError(
        "forward()", "input", f"what weighs {weight:g}, and within the module a batch that "
        f"{weighs(mark)} is used, which it was not given as an argument",
        "one batch in a forward pass, as arguments of the module",
        "State the weight: model.weigh(...) before each forward, on all ranks.",
    )  # fmt: skip


def weighs(mark: Mark) -> str:
    """For an error."""
    return "is of several weights" if mark.weight is None else f"weighs {mark.weight:g}"


def _note_writing(
    name: str,
    mark: Mark,
    marked: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    versions: Sequence[int | None],
) -> None:
    """What a function has written the batch's content to."""
    for each, before in zip(tensors, versions, strict=True):
        own = mark_of(each)
        if own is mark or not _was_written(each, before, name, each is tensors[0]):
            continue
        if own is None:
            mark.escape(_called(name), for_good=not _is_number(marked))
        elif name == "copy_":  # nothing of what it was is left
            each.mark = next(m for m in map(mark_of, tensors[1:]) if m)  # type: ignore[attr-defined]
        else:
            each.mark = mark  # type: ignore[attr-defined]


def _was_written(tensor: torch.Tensor, before: int | None, name: str, is_first: bool) -> bool:
    if name == ".data":  # being set: its getter gives what is new
        return is_first
    if before is None:  # an inference tensor, which does not count
        return is_first and name.endswith("_")
    return before != tensor._version


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _results(
    result: Any, name: str, mark: Mark, marked: Sequence[torch.Tensor], known: set[int]
) -> Any:
    """Mark what a function returns; the content of what cannot be has escaped."""
    if isinstance(result, torch.Tensor):
        if isinstance(result, WeighedTensor) or id(result) in known:
            return result
        if type(result) is torch.Tensor:
            # A gradient is torch's own, which others may know.
            known_elsewhere = name in (".grad", "._grad")
            return wrapped(result, mark) if known_elsewhere else _become(result, mark)
        mark.escape(_called(name), for_good=True)
    elif isinstance(result, tuple | list | dict) and not isinstance(result, _HARMLESS):
        for each in result.values() if isinstance(result, dict) else result:
            if isinstance(each, torch.Tensor | tuple | list | dict):
                _results(each, name, mark, marked, known)
            elif not isinstance(each, _HARMLESS):
                mark.escape(_called(name), for_good=not _is_number(marked))
    elif not isinstance(result, _HARMLESS):
        number = isinstance(result, int | float | complex) and name != "data_ptr"
        small = name in ("numpy", "__array__") and _is_number(marked)
        mark.escape(_called(name), for_good=not (number or small), holder=result)
    return result


def _is_number(marked: Sequence[torch.Tensor]) -> bool:
    return all(each.numel() == 1 for each in marked)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)


def _marked(value: Any) -> list[torch.Tensor]:
    return [each for each in _tensors(value) if isinstance(each, WeighedTensor)]


def _stripped(value: Any) -> Any:
    if isinstance(value, WeighedTensor):
        return bare(value)
    if isinstance(value, tuple | list) and _marked(value):
        made: Callable[[Iterable[Any]], Any] = getattr(type(value), "_make", type(value))
        return made([_stripped(each) for each in value])
    if isinstance(value, dict):
        return {key: _stripped(each) for key, each in value.items()}
    return value


def _name(function: Any) -> str:
    """A function's name; an attribute's with a dot in front."""
    name = getattr(function, "__name__", "") or type(function).__name__
    if name in ("__get__", "__set__"):
        attribute = getattr(function, "__self__", None)
        attribute = getattr(attribute, "fget", attribute)
        name = f".{getattr(attribute, '__name__', name)}"
    return str(name)


def _called(name: str) -> str:
    return name if name.startswith(".") else f"{name}()"


# Answers that hold no content (unless they are tensors: type() may convert), as all that begin with
# ``is_`` but one: what is asked about the form of a batch lets nothing escape.
# fmt: off
_QUESTIONS = frozenset([
    "__dir__", "__dlpack_device__", "__hash__", "__len__", "_backward_hooks", "_base", "_is_view",
    "_is_zerotensor", "_post_accumulate_grad_hooks", "_version", "can_cast",
    "dense_dim", "device", "dim", "dim_order", "dtype", "element_size", "get_device", "grad_fn",
    "has_names", "itemsize", "layout", "names", "nbytes", "ndim", "ndimension", "nelement", "numel",
    "output_nr", "record_stream", "register_hook", "register_post_accumulate_grad_hook",
    "requires_grad", "requires_grad_", "result_type", "retain_grad", "retains_grad", "shape",
    "size", "sparse_dim", "storage_offset", "stride", "type",
])
# fmt: on
_SIZES = frozenset(["__len__", "nelement", "numel", "shape", "size"])
_HARMLESS = (type(None), str, torch.Size, torch.dtype, torch.device, torch.layout)
