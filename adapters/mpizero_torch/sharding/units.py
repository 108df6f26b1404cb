"""Stage 3 without shared parameters: which modules' parameters are gathered together, and when.

A *unit* is a module small enough, or the parameters that a larger one holds itself. A unit's
parameters are gathered when a module that needs them begins its forward, or when somebody takes one
of them from a module, and released when that module is done; for backward they are gathered when a
gradient for the module's output comes, and released when those for its inputs, or for all the
unit's parameters, have come.

The parameters keep their shapes and their storage object; what comes and goes is the memory behind
it, so that what autograd has saved in forward finds the values again in backward.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from mpizero import MpizeroError
from mpizero.progress import Handle
from mpizero_torch import slices, tensors


class ReleasedParameter(nn.Parameter):
    """A parameter whose values are not on this rank now: it has its form, and explains itself.

    There is no memory behind it: to read there would crash the process.
    """

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _explain_released(function, args, kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<parameter of shape {tuple(self.shape)}, {self.dtype}, sharded over the ranks>"

    def __deepcopy__(self, memo: Any) -> Any:
        raise MpizeroError(
            "A sharded parameter cannot be copied. Copy inside `with mz.gathered(model):`."
        )


@cache
def _released(kind: type) -> type:
    """The class of a parameter of class ``kind`` while its values are not on this rank."""
    if not slices.is_slice_type(kind):
        return ReleasedParameter
    # Of the same layout: an object's class may be changed only to one of those.
    own = {
        name: ReleasedParameter.__dict__[name]
        for name in ("__torch_function__", "__repr__", "__deepcopy__")
    }
    return type("ReleasedSlice", (kind,), {"__slots__": (), "__doc__": kind.__doc__, **own})


def _explain_released(function: Any, args: Any, kwargs: Any) -> Any:
    name = getattr(function, "__name__", str(function))
    is_data = getattr(function, "__self__", None) is torch.Tensor.data
    if is_data or name not in _OF_FORM:
        kinds = ReleasedParameter.__name__, "ReleasedSlice"
        given = (x for x in tree_leaves((args, kwargs)) if type(x).__name__ in kinds)
        raise MpizeroError(
            f"{name}() on a parameter of shape {tuple(next(given).shape)}, which is sharded over "
            "the ranks: its values are gathered only while a module needs them. Read it inside "
            "`with mz.gathered(model):`, or from model.state_dict()."
        )
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **(kwargs or {}))


# What may be asked of a parameter that has no values now.
_OF_FORM = {
    "__get__", "__set__", "__delete__", "__hash__", "__len__", "size", "dim", "numel", "nelement",
    "element_size", "stride", "is_inference", "is_floating_point", "is_complex", "is_contiguous",
    "requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "empty_like",
    "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full",
}  # fmt: skip


class WholeSpace:
    """Memory for all of a space, which is there only while it is needed."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.flat = torch.empty(size, dtype=dtype, device=device)
        self._nbytes = self.flat.untyped_storage().nbytes()
        self._tenants: list[tuple[nn.Parameter, slice, tuple[int, ...]]] = []
        self.drop()

    def drop(self) -> None:
        """Give the memory back."""
        if not self.flat.untyped_storage().resizable():
            # Somebody has taken it as a numpy array, which keeps it: go on with other memory.
            self.flat = torch.empty_like(self.flat)
            for tenant in self._tenants:
                self._place(*tenant)
        self.flat.untyped_storage().resize_(0)

    def settle(self, parameter: nn.Parameter, place: slice, shape: tuple[int, ...]) -> None:
        """Let a parameter lie in it, and see the memory come and go."""
        self._tenants.append((parameter, place, shape))
        self.flat.untyped_storage().resize_(self._nbytes)
        self._place(parameter, place, shape)
        self.drop()

    def leave(self, parameter: nn.Parameter) -> bool:
        """A parameter moves out; returns whether nobody is left."""
        self._tenants = [tenant for tenant in self._tenants if tenant[0] is not parameter]
        return not self._tenants

    def _place(self, parameter: nn.Parameter, place: slice, shape: tuple[int, ...]) -> None:
        slices.move(parameter, self.flat[place].view(shape))

    def make(self) -> Any:
        """Take memory; returns it as an array of the core."""
        self.flat.untyped_storage().resize_(self._nbytes)
        if self.flat.device.type != "cpu":
            return tensors.as_array(self.flat)
        # Not flat.numpy(): that would pin the storage to its size for good.
        memory = (ctypes.c_byte * self._nbytes).from_address(self.flat.data_ptr())
        return np.ctypeslib.as_array(memory).view(tensors.numpy_dtype(self.flat.dtype))


class Unit:
    """Parameters that are gathered together. ``uses`` counts those who need them now."""

    def __init__(self, name: str, root: nn.Module) -> None:
        self.name, self.root = name, root
        self.spaces: list[tuple[int, WholeSpace]] = []  # numbers in the parameter memory
        self.members: list[int] = []
        self.parameters: list[tuple[nn.Parameter, Any]] = []  # and their classes
        self.uses = 0
        self._pending: list[Handle] = []
        self.is_there = False

    def gather(self, memory: Any) -> None:
        """Begin to gather, if it is not there already."""
        if not self.is_there:
            self.is_there = True
            for parameter, kind in self.parameters:
                parameter.__class__ = kind
            what = f"gathering the parameters of '{self.name or 'the module'}'"
            handles = [memory.gather(number, whole.make(), what) for number, whole in self.spaces]
            self._pending = [handle for handle in handles if handle is not None]

    def wait(self) -> None:
        for handle in self._pending:
            handle.wait()
        self._pending = []

    def release(self) -> None:
        if self.is_there:
            self.wait()
            self.drop()

    def drop(self) -> None:
        """Give the memory back, and let nobody read where it was."""
        for _, whole in self.spaces:
            whole.drop()
        for parameter, kind in self.parameters:
            parameter.__class__ = _released(kind)
        self.is_there = False

    @property
    def nbytes(self) -> int:
        return sum(whole.flat.untyped_storage().nbytes() for _, whole in self.spaces)


def find_units(
    module: nn.Module, unit_bytes: int
) -> list[tuple[str, nn.Module, list[nn.Parameter]]]:
    """Cut a module into units: (name, module, parameters), each parameter in one unit.

    A module whose parameters take no more than ``unit_bytes`` is one; of a larger one, the
    parameters of its own are one, and its children are looked at in turn.
    """
    seen: set[int] = set()

    def cut(name: str, part: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Parameter]]]:
        every = [p for p in part.parameters() if id(p) not in seen]
        nbytes = sum(p.numel() * p.element_size() for p in every)
        children = list(part.named_children())
        whole = nbytes <= unit_bytes or not children
        own = every if whole else [p for p in part.parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for p in own)
        if own:
            yield name, part, own
        if not whole:
            for child_name, child in children:
                yield from cut(f"{name}.{child_name}" if name else child_name, child)

    return list(cut("", module))


class _Frame:
    """A module in forward, and the units that are held for it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.held: list[Unit] = []


class UnitSchedule:
    """Gathers and releases units as the module runs.

    ``memory`` is the engine's ParameterMemory; ``units`` in the order in which forward, most
    likely, comes to them: while one is computed the next is gathered, where that takes messages.
    """

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        parameters: Sequence[nn.Parameter],
        memory: Any,
    ) -> None:
        self._units, self._memory = list(units), memory
        self._parameters = list(parameters)
        self._unit_of = {
            id(self._parameters[index]): unit for unit in units for index in unit.members
        }
        for unit in units:
            members = [self._parameters[index] for index in unit.members]
            unit.parameters = [(parameter, type(parameter)) for parameter in members]
            unit.drop()
        self._handles: list[Any] = []  # of hooks that wait for several gradients
        self._stack: list[_Frame] = []
        self._coming: dict[int, set[int]] = {}  # of a unit in backward: gradients not come yet
        for part in module.modules():
            own = [self._unit_of[id(p)] for p in part.parameters(recurse=False)]
            self._hook(part, list(dict.fromkeys(own)))
            part._parameters = _Watched(part._parameters, self)

    def taken(self, parameter: Any) -> None:
        """Somebody takes a parameter from a module: in a forward, it is needed."""
        if self._stack and id(parameter) in self._unit_of:
            self._need(self._unit_of[id(parameter)])

    def gradient_came(self, index: int) -> None:
        """In backward: the gradient of a parameter has been computed."""
        unit = self._unit_of[id(self._parameters[index])]
        coming = self._coming.get(id(unit))
        if coming is not None:
            coming.discard(index)
            if not coming:
                self._let_go(unit)

    def end_of_backward(self) -> None:
        """Nothing is needed any more."""
        for handle in self._handles:  # they and the graph would keep each other for good
            handle.remove()
        self._handles.clear()
        self._coming.clear()
        self._stack.clear()
        for unit in self._units:
            unit.uses = 0
            unit.release()

    def release_all(self) -> None:
        """Before an update: what has been gathered is about to be old."""
        self.end_of_backward()

    def hold_all(self) -> None:
        for unit in self._units:
            unit.uses += 1
            unit.gather(self._memory)
        for unit in self._units:
            unit.wait()

    def hold(self, indices: Collection[int]) -> Callable[[], None]:
        """Let these parameters be there until what is returned is called."""
        units = [unit for unit in self._units if not set(indices).isdisjoint(unit.members)]
        for unit in units:
            unit.uses += 1
            unit.gather(self._memory)
        for unit in units:
            unit.wait()

        def let_go() -> None:
            for unit in units:
                self._done(unit)

        return let_go

    def _hook(self, part: nn.Module, own: Sequence[Unit]) -> None:
        def begin(module: nn.Module, args: Any) -> None:
            self._stack.append(_Frame(module))
            for unit in own:
                self._need(unit)

        def end(module: nn.Module, args: Any, output: Any) -> None:
            self._end(module, args, output)

        part.register_forward_pre_hook(begin)
        part.register_forward_hook(end, always_call=True)

    def _need(self, unit: Unit) -> None:
        """Hold a unit for the module that it belongs to, or else for the one that is running."""
        frame = next((f for f in self._stack if f.module is unit.root), self._stack[-1])
        if unit in frame.held:
            unit.wait()
            return
        frame.held.append(unit)
        unit.uses += 1
        unit.gather(self._memory)
        self._gather_next(unit)
        unit.wait()

    def _gather_next(self, unit: Unit) -> None:
        """While this one is computed, the next one travels."""
        following = self._units.index(unit) + 1
        if unit._pending and following < len(self._units):
            self._units[following].gather(self._memory)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._stack or self._stack[-1].module is not module:
            return
        frame = self._stack.pop()
        if frame.held and torch.is_grad_enabled():
            self._watch_backward(frame.held, args, output)
        for unit in frame.held:
            self._done(unit)

    def _watch_backward(self, units: Sequence[Unit], args: Any, output: Any) -> None:
        outputs = [
            leaf
            for leaf in tree_leaves(output)
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad
        ]
        inputs = [
            leaf
            for leaf in tree_leaves(args)
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad
        ]
        if not outputs:
            return
        held: list[Unit] = []

        def before(gradient: torch.Tensor) -> None:
            if held:
                return
            for unit in units:
                held.append(unit)
                unit.uses += 1
                unit.gather(self._memory)
                if not inputs:
                    self._await_gradients(unit)
            for unit in units:
                unit.wait()

        def after(gradients: Any) -> None:
            for unit in held:
                self._done(unit)
            held.clear()

        for leaf in outputs:
            leaf.register_hook(before)
        if inputs:
            self._handles.append(register_multi_grad_hook(inputs, after))

    def _await_gradients(self, unit: Unit) -> None:
        """Release it when all its gradients have come, if nothing else in it can be needed."""
        parameters = [self._parameters[index] for index in unit.members]
        if all(parameter.requires_grad for parameter in parameters):
            self._coming[id(unit)] = set(unit.members)

    def _let_go(self, unit: Unit) -> None:
        del self._coming[id(unit)]
        self._done(unit)

    def _done(self, unit: Unit) -> None:
        unit.uses = max(0, unit.uses - 1)
        if unit.uses == 0:
            unit.release()


class _Watched(dict):  # type: ignore[type-arg]
    """A module's parameters by name, which tells when one is taken."""

    def __init__(self, parameters: Any, schedule: UnitSchedule) -> None:
        super().__init__(parameters)
        self._schedule = schedule

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        self._schedule.taken(found)
        return found
