"""What was done to tensors without memory, in order, and how to find what one of them holds.

An operation is noted with the memories that it reads and writes, and with where the random number
generator stood. To know a tensor's values, those operations are carried out that they depend on,
in the order in which they were noted: the values are those of ordinary building, to the bit.
(What torchdistx's deferred_init does, by memories instead of tensors, so that views are sound.)
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# Write all of what they are given, whatever was there before.
_OVERWRITING = {
    "zero_", "fill_", "copy_", "normal_", "uniform_", "random_", "exponential_", "cauchy_",
    "log_normal_", "geometric_",
}  # fmt: skip


FILLER = 0xFF  # bytes of what nobody has written: of floats, a NaN that no arithmetic gives


class UndefinedError(Exception):
    """A value was asked for that follows from memory to which nobody has written."""


class Memory:
    """A piece of memory that tensors lie in: how large it would be, and who wrote to it."""

    def __init__(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        # Keeping it keeps its address, by which tensors are known to lie in it.
        self.storage, self.nbytes = storage, nbytes
        self.writers: list[Operation] = []
        self.is_read = False  # by an operation that may be carried out


@dataclass(frozen=True)
class Form:
    """A tensor's place in a memory."""

    memory: Memory
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    conjugate: bool = False
    negative: bool = False

    @classmethod
    def at(cls, memory: Memory, tensor: torch.Tensor) -> Form:
        """Of a tensor that lies in the memory, or that is such a one's form."""
        return cls(
            memory,
            tuple(tensor.shape),
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor.dtype,
            tensor.is_conj(),
            tensor.is_neg(),
        )

    @property
    def covers(self) -> bool:
        """Is it all of the memory, without gaps?"""
        count = 1
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size != 1 and stride != count:
                return False
            count *= size
        return self.offset == 0 and count * self.dtype.itemsize >= self.memory.nbytes

    def of(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The tensor, where the memory's values are in ``storage``."""
        found: torch.Tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        found = found.set_(storage, self.offset, self.size, self.stride)
        if self.conjugate:
            found = torch._conj(found)
        return torch._neg_view(found) if self.negative else found

    def on_meta(self, storages: dict[Memory, torch.UntypedStorage]) -> torch.Tensor:
        """Such a tensor without values, to ask torch what would come out."""
        if self.memory not in storages:
            octets = torch.empty(self.memory.nbytes, dtype=torch.uint8, device="meta")
            storages[self.memory] = octets.untyped_storage()
        return self.of(storages[self.memory])


@dataclass(eq=False)
class Operation:
    """An operation: ``function`` of arguments in which forms stand for tensors."""

    number: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: Sequence[Form]
    writes: Sequence[Form]
    makes: Sequence[Form | None]  # of the tensors that it returns; None: not to be kept
    random: tuple[torch.Generator, torch.Tensor] | None = None
    leaves_undefined: bool = False  # what it makes

    @property
    def name(self) -> str:
        return str(getattr(self.function, "__name__", self.function)).partition(".")[0]

    def overwrites(self, memory: Memory) -> bool:
        """Does nothing of what was in the memory before matter after it?"""
        if any(form is not None and form.memory is memory for form in self.makes):
            return True
        if self.name not in _OVERWRITING:
            return False
        reads = any(form.memory is memory for form in self.reads)
        return not reads and any(f.memory is memory and f.covers for f in self.writes)


@dataclass
class Plan:
    """The operations that something depends on, and the latest that reads each memory."""

    operations: list[Operation]
    last: dict[Memory, int] = field(default_factory=dict)

    @property
    def is_defined(self) -> bool:
        """Is there no value among what it begins with that nobody has written?"""
        return not any(each.leaves_undefined for each in self.operations)

    def touching(self, memory: Memory) -> Iterator[Operation]:
        """The operations that read or write a memory."""
        for each in self.operations:
            forms = [*each.reads, *each.writes, *each.makes]
            if any(form is not None and form.memory is memory for form in forms):
                yield each

    def is_current(self, memory: Memory) -> bool:
        """Have all operations been carried out that have written to a memory?"""
        return bool(memory.writers) and memory.writers[-1] in self.operations


class Tape:
    """Operations in the order in which they were called."""

    def __init__(self) -> None:
        self.now = 0
        # What the last question found, as of then: the next one often goes on from there.
        self._warm: dict[Memory, tuple[int, torch.UntypedStorage]] = {}

    def note(self, operation: Operation) -> None:
        """Write an operation down."""
        for form in operation.reads:
            form.memory.is_read = True
        made = [form for form in operation.makes if form is not None]
        for memory in dict.fromkeys(form.memory for form in [*operation.writes, *made]):
            if operation.overwrites(memory) and not memory.is_read:
                memory.writers.clear()  # nobody will ever ask for what was there
            memory.writers.append(operation)
        self.now = operation.number + 1

    def plan(self, memories: Sequence[Memory], until: int | None = None) -> Plan:
        """What is to be done to know all of these memories."""
        return self._plan(memories, self.now if until is None else until, {})

    def tensors(self, forms: Sequence[Form], keep: bool = False) -> list[torch.Tensor]:
        """What these tensors hold now, in memory of their own: one for those that share theirs.

        ``keep``: the next question is likely to go on from here. Raises UndefinedError if something
        in them follows from memory that nobody has written to.
        """
        memories = list(dict.fromkeys(form.memory for form in forms))
        plan = self.plan(memories)
        if not plan.is_defined:
            self._warm = {}
            return self._tensors_if_written(plan, memories, forms)
        found = self._values(memories, keep)
        return [form.of(found[form.memory]) for form in forms]

    def filled(self, form: Form, filler: int) -> torch.Tensor:
        """What a tensor holds now, with a byte wherever nobody has written."""
        plan = self.plan([form.memory])
        return form.of(carry_out(plan, [form.memory], filler=filler)[form.memory])

    def _tensors_if_written(
        self, plan: Plan, memories: Sequence[Memory], forms: Sequence[Form]
    ) -> list[torch.Tensor]:
        """With two different fillings of what nobody has written: equal if it does not matter."""
        one, other = (carry_out(plan, memories, filler=filler) for filler in (0, 255))
        for form in forms:
            if not torch.equal(
                _octets(form.of(one[form.memory])), _octets(form.of(other[form.memory]))
            ):
                raise UndefinedError
        return [form.of(one[form.memory]) for form in forms]

    def _values(self, memories: Sequence[Memory], keep: bool) -> dict[Memory, torch.UntypedStorage]:
        warm, self._warm = self._warm, {}
        plan = self._plan(memories, self.now, {m: at for m, (at, _) in warm.items()})
        if any(each.number < at for m, (at, _) in warm.items() for each in plan.touching(m)):
            plan, warm = self.plan(memories), {}  # it is asked as of earlier than is known
        held = {memory: storage for memory, (_, storage) in warm.items()}
        found = carry_out(plan, {*plan.last, *memories} if keep else memories, held)
        if not keep:
            return found
        self._warm = {m: (self.now, s) for m, s in found.items() if plan.is_current(m)}
        return {memory: found[memory].clone() for memory in memories}

    def forget(self) -> None:
        """Keep nothing for the next question."""
        self._warm = {}

    def _plan(self, memories: Sequence[Memory], until: int, warm: dict[Memory, int]) -> Plan:
        chosen: dict[int, Operation] = {}
        seen: set[tuple[int, Memory]] = set()
        last = dict.fromkeys(memories, until)
        waiting = [(memory, until) for memory in memories]
        while waiting:
            memory, before = waiting.pop()
            known = warm.get(memory, 0)
            for operation in reversed(memory.writers):
                if operation.number >= before:
                    continue
                if operation.number < known or (operation.number, memory) in seen:
                    break
                seen.add((operation.number, memory))
                chosen[operation.number] = operation
                for form in [*operation.reads, *operation.writes]:
                    at = operation.number
                    last[form.memory] = max(last.get(form.memory, 0), at)
                    if form.memory is not memory:
                        waiting.append((form.memory, at))
                if operation.overwrites(memory):
                    break
        return Plan([chosen[number] for number in sorted(chosen)], last)


def carry_out(
    plan: Plan,
    wanted: Collection[Memory],
    storages: dict[Memory, torch.UntypedStorage] | None = None,
    filler: int | None = None,
) -> dict[Memory, torch.UntypedStorage]:
    """Do what the plan says; returns what the memories hold then.

    The generators stand afterwards where they stood before. ``storages``: what is known already.
    ``filler``: the byte that memory has which nobody has written yet.
    """
    held = {} if storages is None else storages
    stay = set(wanted)
    generators: dict[torch.Generator, torch.Tensor] = {}
    ends: dict[int, list[Memory]] = {}
    for memory, number in plan.last.items():
        ends.setdefault(number, []).append(memory)

    def tensor(form: Form) -> torch.Tensor:
        if form.memory not in held:
            held[form.memory] = blank(form.memory.nbytes, filler)
        return form.of(held[form.memory])

    try:
        with torch.no_grad():
            for operation in plan.operations:
                if operation.random is not None:
                    generator, state = operation.random
                    generators.setdefault(generator, generator.get_state())
                    generator.set_state(state)
                if operation.leaves_undefined:
                    form = operation.makes[0]
                    if form is not None:
                        held[form.memory] = blank(form.memory.nbytes, filler)
                else:
                    args, kwargs = replaced((operation.args, operation.kwargs), Form, tensor)
                    made = operation.function(*args, **kwargs)
                    _keep(operation.makes, made, held)
                for memory in ends.get(operation.number, ()):
                    if memory not in stay:
                        held.pop(memory, None)
            for memory in wanted:
                if memory not in held:
                    held[memory] = blank(memory.nbytes, filler)
    finally:
        for generator, state in generators.items():
            generator.set_state(state)
    return {memory: held[memory] for memory in wanted}


def _keep(
    makes: Sequence[Form | None], made: Any, held: dict[Memory, torch.UntypedStorage]
) -> None:
    """Let what an operation returned be what the memories hold that it made."""
    for form, found in zip(makes, leaves(made, torch.Tensor), strict=True):
        if form is None:
            continue
        storage = found.untyped_storage()
        fits = storage.nbytes() >= form.memory.nbytes and found.stride() == form.stride
        if not fits or found.storage_offset() != form.offset or found.is_conj() or found.is_neg():
            storage = blank(form.memory.nbytes, None)
            form.of(storage).copy_(found)
        held[form.memory] = storage


def blank(nbytes: int, filler: int | None = None) -> torch.UntypedStorage:
    """Memory, which goes back to the system when nobody needs it any more.

    (What is between malloc's small blocks it does not: of a model's parameters, all would stay.)
    """
    if nbytes < 1 << 16:
        octets = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    else:
        octets = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
    if filler is not None:
        octets.fill_(filler)
    return octets.untyped_storage()


def replaced(given: Any, kind: type, by: Callable[[Any], Any]) -> Any:
    """Arguments, or results, of an operation, in which ``by(each)`` is for each of a kind."""
    if isinstance(given, kind):
        return by(given)
    if isinstance(given, list | tuple):
        return type(given)([replaced(each, kind, by) for each in given])
    if isinstance(given, dict):
        return {key: replaced(each, kind, by) for key, each in given.items()}
    return given


def leaves(given: Any, kind: type) -> list[Any]:
    """Those of a kind in arguments, or results, of an operation."""
    found: list[Any] = []
    replaced(given, kind, found.append)
    return found


def _octets(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
