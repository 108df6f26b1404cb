"""Which samples a sharded loader loads, step by step: drawn from a seed, or by rank 0's sampler."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

from mpizero import ArgumentError, World
from mpizero.sampling import ShardedBatches, Share
from mpizero_torch.data.followed import Followed
from mpizero_torch.data.generators import Generators, are_of_an_epoch
from mpizero_torch.data.sampler import tell_epoch


@dataclass(frozen=True)
class Step:
    """What this rank loads for a step, and how much its mean counts.

    ``stop``: how much of the epoch all ranks have been given with it. ``check``: of what was drawn
    of it, where that is not known beforehand.
    """

    samples: Sequence[Any]
    weight: float
    stop: int
    check: int = 0


class Plan(ABC):
    """The steps of each epoch, the same number on all ranks."""

    unit: str  # in which ``stop`` counts

    @abstractmethod
    def __len__(self) -> int:
        """Steps of a whole epoch."""

    @abstractmethod
    def own_steps(self) -> int:
        """How many of them have samples for this rank."""

    @abstractmethod
    def begin(self, epoch: int, done: int) -> tuple[Iterator[Step], bool]:
        """What is left of an epoch of which ``done`` is done, and whether steps may be uneven."""

    @property
    def width(self) -> int | None:
        """Samples of a step over all ranks, where that is fixed; else None."""
        return None

    @property
    @abstractmethod
    def data(self) -> dict[str, Any]:
        """What must be the same where the epoch is to be gone on with."""

    @property
    def state(self) -> dict[str, Any]:
        """What else there is to save."""
        return {}

    def set_width(self, samples: int) -> None:
        """From the next ``begin`` on; only where there is a ``width``."""
        raise NotImplementedError

    def handed_out(self, step: Step) -> None:  # noqa: B027 (most need not know)
        """The loop has been given the step's batch."""

    def end_epoch(self) -> None:  # noqa: B027
        """The loop has been given all, and has ended."""

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Be as ``state`` says, from the next ``begin`` on."""

    def set_epoch(self, epoch: int) -> None:  # noqa: B027
        """The next ``begin`` begins this epoch, anew."""


class SeededPlan(Plan):
    """What follows from a seed and the epoch's number, for the samplers that torch makes itself."""

    unit = "samples"

    def __init__(self, batches: ShardedBatches) -> None:
        self.batches = batches

    @property
    def width(self) -> int:
        return self.batches.width

    def set_width(self, samples: int) -> None:
        self.batches.width = samples

    def __len__(self) -> int:
        return len(self.batches)

    def own_steps(self) -> int:
        batches = self.batches
        return _own_steps(batches.count, self.width, batches.share, batches.drop_last)

    @property
    def data(self) -> dict[str, Any]:
        batches = self.batches
        return {"of": batches.count, "shuffle": batches.shuffle, "seed": batches.seed}

    def begin(self, epoch: int, done: int) -> tuple[Iterator[Step], bool]:
        steps = [
            Step(batch.indices.tolist(), batch.weight, batch.stop)
            for batch in self.batches.epoch(epoch, skip=done)
        ]
        return iter(steps), any(step.weight != 1.0 for step in steps)


class FollowedPlan(Plan):
    """What rank 0's sampler draws, a step at a time: samplers may be endless, and seeds differ.

    It goes on within an epoch by letting the sampler draw again, from where its generators were.
    """

    def __init__(self, sampler: Any, world: World) -> None:
        self._sampler, self._world = sampler, world
        everyone = world if world.mesh is None else world.mesh.world
        self._followed = Followed(everyone, f"{self.unit} of a {type(sampler).__name__}")
        self._is_leader = everyone.rank == 0
        self._places: list[int] = everyone.gather_objects(world.rank)
        self._generators = Generators(sampler)
        # Rank 0's, as the epoch began that is under way, or is next.
        self._start: dict[str, Any] = everyone.broadcast_object(self._generators.own())
        self._after: dict[str, Any] = {}
        self._check = 0
        self._restored = False
        self._told: int | None = None  # the epoch that the sampler was told last

    @property
    def count(self) -> int:
        """What the sampler says it draws in an epoch; TypeError if it does not say."""
        return len(self._sampler)

    @property
    def data(self) -> dict[str, Any]:
        counted = None
        with suppress(TypeError):  # endless, or it does not say
            counted = self.count
        return {"of": counted, "sampler": type(self._sampler).__name__}

    @property
    def state(self) -> dict[str, Any]:
        return {"generators": self._start, "check": self._check, "told": self._told}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._start, self._check = dict(state.get("generators") or {}), state.get("check", 0)
        self._restored = True
        if state.get("told") is not None:
            self._tell(state["told"])

    def set_epoch(self, epoch: int) -> None:
        if self._restored and self._is_leader:
            self._generators.set_own(self._start)
        self._restored, self._check = False, 0
        self._tell(epoch)

    def _tell(self, epoch: int) -> None:
        if tell_epoch(self._sampler, epoch):
            self._told = epoch

    def handed_out(self, step: Step) -> None:
        self._check = step.check

    def end_epoch(self) -> None:
        self._start, self._check = self._after, 0

    def begin(self, epoch: int, done: int) -> tuple[Iterator[Step], bool]:
        restored, self._restored = self._restored, False
        if restored and self._is_leader:
            self._generators.set_own(self._start)
        check, self._check = (self._check, self._check) if restored else (0, 0)
        start = self._start if restored and are_of_an_epoch(self._start) else None
        reading = self._followed.read(
            lambda: self._deal(start, done, check), goes_on=start is not None
        )
        self._start = next(reading)
        return self._steps(reading), self._may_be_uneven

    @property
    def _may_be_uneven(self) -> bool:
        return self._world.size > 1

    def _steps(self, reading: Iterator[Any]) -> Iterator[Step]:
        for each in reading:
            if isinstance(each, Step):
                yield each
            else:
                self._after = each

    def _deal(self, start: dict[str, Any] | None, done: int, check: int) -> Iterator[Sequence[Any]]:
        """On rank 0: a part of each step for everyone, between where generators were and are.

        ``start``: where they were when the epoch began that is gone on with.
        """
        if start is None:
            start, drawn = self._generators.all(), _Checked(self._sampler)
        else:
            drawn = self._passed_over(start, done, check)
        cut = self._cut(drawn, done)
        yield [start] * len(self._places)
        for steps in cut:
            yield [steps[place] for place in self._places]
        yield [self._generators.own()] * len(self._places)

    def _passed_over(self, start: dict[str, Any], done: int, check: int) -> _Checked:
        self._generators.set(start)
        drawn = _Checked(self._sampler)
        for _ in islice(drawn, done):
            pass
        if done and drawn.check != check:
            raise ArgumentError(
                "load()", "loader", f"one whose {type(self._sampler).__name__} does not draw "
                "again what it drew before the state was saved",
                "a sampler that draws the same from the same random numbers",
                "Let it have a generator of its own, or leave loader= out to begin anew.",
            )  # fmt: skip
        return drawn

    @abstractmethod
    def _cut(self, drawn: _Checked, done: int) -> Iterator[list[Step]]:
        """What each rank of the world gets in each step."""


class FollowedSamples(FollowedPlan):
    """Indices as rank 0's sampler draws them, a global batch at a time."""

    unit = "samples"

    def __init__(
        self, sampler: Any, world: World, share: Share, batch_size: int, drop_last: bool
    ) -> None:
        super().__init__(sampler, world)
        self._share, self._drop_last = share, drop_last
        self._width = batch_size * world.size

    @property
    def width(self) -> int:
        return self._width

    def set_width(self, samples: int) -> None:
        self._width = samples

    def __len__(self) -> int:
        whole, rest = divmod(self.count, self.width)
        return whole + (rest > 0 and not self._drop_last)

    def own_steps(self) -> int:
        return _own_steps(self.count, self.width, self._share, self._drop_last)

    @property
    def _may_be_uneven(self) -> bool:
        alone = self._world.size == 1
        return not alone and not (self._drop_last and len({*self._share.cut(self.width)}) == 1)

    def _cut(self, drawn: _Checked, done: int) -> Iterator[list[Step]]:
        while together := [*islice(drawn, self.width)]:
            if len(together) < self.width and self._drop_last:
                return
            done += len(together)
            counts = self._share.cut(len(together))
            ends = [*accumulate(counts)]
            yield [
                Step(
                    together[end - count : end] or together[:1],
                    count * len(counts) / len(together), done, drawn.check,
                )
                for count, end in zip(counts, ends, strict=True)
            ]  # fmt: skip
            if len(together) < self.width:
                return


class FollowedBatches(FollowedPlan):
    """Batches as rank 0's batch sampler draws them: one for each rank in a step.

    Each weighs what it counts in samples; a rank for which none is left gets the step's first
    one, which counts nothing there.
    """

    unit = "batches"

    def __len__(self) -> int:
        return -(-self.count // self._world.size)

    def own_steps(self) -> int:
        whole, rest = divmod(self.count, self._world.size)
        return whole + (self._world.rank < rest)

    def _cut(self, drawn: _Checked, done: int) -> Iterator[list[Step]]:
        size = self._world.size
        while together := [list(batch) for batch in islice(drawn, size)]:
            done += len(together)
            counts = [len(batch) for batch in together] + [0] * (size - len(together))
            yield [
                Step(
                    together[rank] if rank < len(together) else together[0],
                    counts[rank] * size / max(sum(counts), 1), done, drawn.check,
                )
                for rank in range(size)
            ]  # fmt: skip
            if len(together) < size:
                return


class FollowedItems(FollowedPlan):
    """What rank 0's sampler draws, all of it for every rank: one item in a step."""

    unit = "batches"

    def __len__(self) -> int:
        return self.count

    def own_steps(self) -> int:
        return self.count

    def _cut(self, drawn: _Checked, done: int) -> Iterator[list[Step]]:
        for at, item in enumerate(drawn, done + 1):
            yield [Step([item], 1.0, at, drawn.check)] * self._world.size


def _own_steps(count: int, width: int, share: Share, drop_last: bool) -> int:
    whole, rest = divmod(count, width)
    return whole * (share.weight(width) > 0) + (
        rest > 0 and not drop_last and share.weight(rest) > 0
    )


class _Checked:
    """What a sampler draws, and a number that follows from all that it has drawn."""

    def __init__(self, sampler: Any) -> None:
        self._drawn = iter(sampler)
        self._hash = hashlib.blake2b(digest_size=6)

    @property
    def check(self) -> int:
        return int.from_bytes(self._hash.digest(), "little")

    def __iter__(self) -> _Checked:
        return self

    def __next__(self) -> Any:
        item = next(self._drawn)
        self._hash.update(f"{item!r}\n".encode())
        return item
