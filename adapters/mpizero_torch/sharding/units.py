"""Units: which parameters are gathered together, and the life of one.

A *unit* is a module small enough, or the parameters that a larger one holds itself. Its parameters
keep their shapes and their storage object; what comes and goes is the memory behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge, increment_version

from mpizero import MismatchError, MpizeroError
from mpizero.engine import ParameterMemory
from mpizero.progress import Handle
from mpizero_torch import slices
from mpizero_torch.sharding.covered import covered
from mpizero_torch.sharding.whole_space import WholeSpace, hooks_are_allowed

__all__ = ["Unit", "Where", "WholeSpace", "find_units"]


_ALONE = (
    "Over several nodes all ranks gather the parameters of a module together, so all must come to "
    "the same ones. For a module of which each rank calls other parts (experts, in a class MoE), "
    "pass whole=[MoE] to mz.zero(): it is then gathered in one piece whenever it is called. Or "
    "shard at stage 2, or with shard_group='node' where a node has room for all parameters."
)


class Where(Enum):
    """Where the values of a unit's parameters are.

    SHARDED     each rank has its part; there is no memory for all of it
    GATHERING   there is memory, and the values are on their way
    UNSHARDED   the values are in memory, for whoever needs them
    LENT        nobody needs them any more, but somebody still holds the memory: it stays, and its
                values are kept up to date, until it is let go
    """

    SHARDED = "sharded"
    GATHERING = "gathering"
    UNSHARDED = "unsharded"
    LENT = "lent"


class Unit:
    """Parameters that are gathered together.

    ``uses`` counts those who need the values, ``shown`` those among them to whom the parameters
    are plain ones; to everybody else they are covered.
    """

    def __init__(self, name: str, root: nn.Module) -> None:
        self.name, self.root = name, root
        self.spaces: list[tuple[int, WholeSpace]] = []  # numbers in the parameter memory
        self.members: list[int] = []
        self.parameters: list[tuple[nn.Parameter, Any]] = []  # and their classes
        self.state = Where.SHARDED
        self.uses = self.shown = 0
        self.has_parts = any(True for _ in root.children())  # not all of which may be called
        # Has autograd saved of it unseen? Then only the parameters' own count of holders tells.
        self.is_exposed = False
        self._pending: list[Handle] = []
        self._filled = -1  # as of which change of the parameter memory
        self._versions: list[int | None] = []

    def settle(self, parameters: Sequence[nn.Parameter]) -> None:
        """Its parameters have found their places in its spaces: cover them."""
        if not self.parameters:
            self.parameters = [(parameter, type(parameter)) for parameter in parameters]
        self._versions = self._current_versions()
        self._set_classes(shown=False)

    def gather(self, memory: ParameterMemory) -> None:
        """SHARDED or LENT to GATHERING, or UNSHARDED if nothing needs to be sent."""
        if self.state in (Where.GATHERING, Where.UNSHARDED):
            return
        is_current = self.state is Where.LENT and self._filled == memory.changes
        if not is_current or memory.sends_to_gather:  # where others take part, all must
            self._fill(memory)
        self.state = Where.GATHERING if self._pending else Where.UNSHARDED

    def wait(self) -> None:
        """GATHERING to UNSHARDED."""
        if self.state is Where.GATHERING:
            self._arrive()
            self.state = Where.UNSHARDED

    def release(self) -> None:
        """Nobody needs it: UNSHARDED to SHARDED, or LENT while somebody holds the memory."""
        assert not self.uses and not self.shown
        if self.state is Where.SHARDED:
            return
        self.wait()
        if self._is_held():
            self.state = Where.LENT
            return
        for _, whole in self.spaces:
            whole.drop()
        self.is_exposed = False
        self.state = Where.SHARDED

    def refresh(self, memory: ParameterMemory) -> None:
        """After an update: let those who hold the memory see the new values, as in one process.

        LENT stays so. SHARDED becomes it for a moment, where other ranks need this one's part.
        """
        assert self.state in (Where.LENT, Where.SHARDED)
        self._fill(memory)
        self._arrive()
        self.state = Where.LENT
        for parameter, _ in self.parameters:
            increment_version(slices.local(parameter))
        for _, whole in self.spaces:
            increment_version(whole.flat)
        self._versions = self._current_versions()

    def show(self) -> None:
        """One more for whom its parameters are plain ones, with values."""
        assert self.state in (Where.GATHERING, Where.UNSHARDED)
        self.shown += 1
        if self.shown == 1:
            self._set_classes(shown=True)
            self._check_unwritten()

    def cover(self, *, written: bool = False) -> None:
        """One less. ``written``: it was allowed to write to them."""
        self.shown -= 1
        if written:
            self._filled = -1
        if self.shown == 0:
            try:
                if written:
                    self._versions = self._current_versions()
                else:
                    self._check_unwritten()
            finally:
                self._set_classes(shown=False)

    @property
    def addresses(self) -> list[int]:
        """Of the memory of its spaces."""
        return [whole.address for _, whole in self.spaces]

    @property
    def nbytes(self) -> int:
        return sum(whole.nbytes for _, whole in self.spaces)

    def _fill(self, memory: ParameterMemory) -> None:
        what = f"gathering the parameters of '{self.name or 'the module'}'"
        self._filled = memory.changes
        with _explained():
            handles = [memory.gather(number, whole.make(), what) for number, whole in self.spaces]
        self._pending = [handle for handle in handles if handle is not None]

    def _arrive(self) -> None:
        pending, self._pending = self._pending, []
        with _explained():
            for handle in pending:
                handle.wait()

    def _is_held(self) -> bool:
        if any(whole.is_held for _, whole in self.spaces):
            return True
        if not self.is_exposed:
            return False
        if not hooks_are_allowed():  # still in there
            return True
        return any(_is_kept(parameter) for parameter, _ in self.parameters)

    def _set_classes(self, *, shown: bool) -> None:
        for parameter, kind in self.parameters:
            parameter.__class__ = kind if shown else covered(kind)

    def _current_versions(self) -> list[int | None]:
        """How often torch has written to each parameter (while they are plain ones).

        None: in memory of ``torch.inference_mode``, where nobody counts.
        """
        return [
            None if parameter.is_inference() else slices.local(parameter)._version
            for parameter, _ in self.parameters
        ]

    def _check_unwritten(self) -> None:
        """Raise MpizeroError if somebody has written to gathered values, which nobody keeps."""
        before, self._versions = self._versions, self._current_versions()
        counts = enumerate(zip(before, self._versions, strict=True))
        at = next((at for at, (old, new) in counts if None not in (old, new) and old != new), None)
        if at is None:
            return
        self._filled = -1
        shape = tuple(self.parameters[at][0].shape)
        raise MpizeroError(
            f"A parameter of '{self.name or 'the module'}', of shape {shape}, was written to in "
            "place while it was gathered: it is sharded over the ranks, and what is written to the "
            "gathered values is lost. Write inside `with mz.gathered(model, modify=True):`, or "
            "shard with stage 1 or 2."
        )


def find_units(
    module: nn.Module, unit_bytes: int, whole: Sequence[Any] = ()
) -> list[tuple[str, nn.Module, list[nn.Parameter]]]:
    """Cut a module into units: (name, module, parameters), each parameter in one unit.

    A module whose parameters take no more than ``unit_bytes`` is one; of a larger one, the
    parameters of its own are one, and its children are looked at in turn. Those in ``whole``, or of
    the classes in there, are one however large.
    """
    kinds = tuple(each for each in whole if isinstance(each, type))
    seen: set[int] = set()

    def cut(name: str, part: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Parameter]]]:
        every = [p for p in part.parameters() if id(p) not in seen]
        nbytes = sum(p.numel() * p.element_size() for p in every)
        children = list(part.named_children())
        asked = isinstance(part, kinds) or any(part is each for each in whole)
        is_one = asked or nbytes <= unit_bytes or not children
        own = every if is_one else [p for p in part.parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for p in own)
        if own:
            yield name, part, own
        if not is_one:
            for child_name, child in children:
                yield from cut(f"{name}.{child_name}" if name else child_name, child)

    return list(cut("", module))


@contextmanager
def _explained() -> Iterator[None]:
    """Add to what is said of ranks that do not gather the same."""
    try:
        yield
    except MismatchError as error:
        raise MismatchError(f"{error}\n{_ALONE}") from error


def _is_kept(parameter: nn.Parameter) -> bool:
    """Does something in C++, as autograd's nodes, hold the parameter itself?"""
    own: Any = slices.local(parameter)
    with torch._C.DisableTorchFunctionSubclass():
        # Python's object, and the node that adds its gradients up, which is there for now.
        node = get_gradient_edge(own).node if own.requires_grad else None
        return bool(own._use_count() > 1 + (node is not None))
