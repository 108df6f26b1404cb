"""``CheckpointManager``: a folder of checkpoints, the newest of which are kept."""

from __future__ import annotations

import logging
import os
import re
import time
from pathlib import Path
from typing import Any

from mpizero import ArgumentError, CheckpointError, PreemptionGuard, World
from mpizero.checkpoint import PendingSave, exists, folder
from mpizero_torch.checkpointing.axes import Axes
from mpizero_torch.checkpointing.save import load, save_run
from mpizero_torch.runtime import init

_NAME = re.compile(r"step-(\d{8,})")
_log = logging.getLogger("mpizero")


class CheckpointManager:
    """Saves a run every so many steps or minutes, and finds the last that was saved.

    ``run`` are the things to save, as ``mz.save`` takes them: model, optimizer, scheduler, loader.
    Checkpoints are folders named ``step-00001000``; the ``keep`` newest stay. ``asynchronous``
    saves are waited for before the next begins, or, with ``when_busy="skip"``, the next is left
    out. With a ``guard``, the step after which the job has to leave is saved too, and ends it.

    To be made on all ranks. Raises ArgumentError for a ``keep`` below 1 or another ``when_busy``.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        asynchronous: bool = False,
        when_busy: str = "wait",
        guard: PreemptionGuard | None = None,
        world: World | None = None,
        **run: Any,
    ) -> None:
        self._of = world or init()
        self.world = Axes.of(self._of).everyone
        with self.world.together("CheckpointManager()"):
            if keep < 1:
                raise ArgumentError("CheckpointManager()", "keep", str(keep), "1 or more")
            if when_busy not in ("wait", "skip"):
                raise ArgumentError(
                    "CheckpointManager()", "when_busy", repr(when_busy), "'wait' or 'skip'"
                )
            self.directory = Path(directory)
            if self.world.rank == 0:
                folder.tidy(self.directory)
        self._keep, self._steps, self._minutes = keep, every_steps, every_minutes
        self._asynchronous, self._when_busy, self._run = asynchronous, when_busy, run
        self._guard = guard
        self._last = time.monotonic()
        self._saved: int | None = None  # the step that was saved last
        self.extra: dict[str, Any] = {}
        self._pending: PendingSave | None = None
        self._staying: set[Path] = set()  # older ones that are not as they were saved

    def step(self, step: int, **extra: Any) -> bool:
        """After training step number ``step``: save if it is time. Returns if so. Collective.

        If the guard says that the job has to leave, saves, and exits by SystemExit.
        """
        due = bool(self._steps) and step % int(self._steps or 1) == 0
        if self._minutes is not None:
            late = time.monotonic() - self._last > self._minutes * 60
            # Clocks differ: rank 0's counts.
            due |= bool(self.world.allreduce(int(late and self.world.rank == 0), "max"))
        saved = due and self.save(step, **extra)
        if self._guard is not None and self._guard.should_stop():
            self._save_before_leaving(step, extra)
            self._guard.exit()
        return saved

    def save(self, step: int, **extra: Any) -> bool:
        """Save now, as of ``step``; False if a save is under way, and is not to be waited for.

        Raises ArgumentError if the folder has checkpoints of later steps, which this run has not
        come from: they would be taken for its newest.
        """
        with self.world.together("CheckpointManager.save()"):
            if self._saved is None:
                self._refuse_later(step)
            if self._pending is not None:
                busy = self._when_busy == "skip" and self._pending.running
                if self._when_busy == "skip" and self.world.allreduce(int(busy), "max"):
                    return False
                self.wait()
            path = self.directory / f"step-{step:08}"
            self._pending = save_run(
                path, **self._run, extra={**extra, "step": step},
                asynchronous=self._asynchronous, world=self._of, managed=True,
            )  # fmt: skip
            self._last, self._saved = time.monotonic(), step
            if self._pending is None:
                self._clean()
            return True

    def restore_latest(self, **options: Any) -> int | None:
        """Load the newest complete checkpoint; returns its step, or None if there is none yet.

        What ``step`` or ``save`` were given beside the step is in ``extra`` then.

        Collective. Raises what ``mz.load`` raises: a damaged one is no reason to go on from an
        older one in silence.
        """
        with self.world.together("CheckpointManager.restore_latest()"):
            self.wait()
            found = self.world.broadcast_object(self.steps() if self.world.rank == 0 else None)
            if not found:
                return None
            path = self.directory / f"step-{found[-1]:08}"
            self.extra = load(path, **self._run, world=self._of, **options)
            self._saved = int(self.extra["step"])
            self._clean()  # a run that was killed may have had one to remove
            return self._saved

    def steps(self) -> list[int]:
        """The steps of which there are complete checkpoints, as this rank sees the folder."""
        if not self.directory.is_dir():
            return []
        names = [_NAME.fullmatch(each.name) for each in self.directory.iterdir()]
        return sorted(int(name[1]) for name in names if name and exists(self.directory / name[0]))

    def wait(self) -> None:
        """Until the save under way is complete. Collective; raises what it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.wait()
            self._clean()

    def _refuse_later(self, step: int) -> None:
        found = self.world.broadcast_object(self.steps() if self.world.rank == 0 else None)
        if found and found[-1] > step:
            raise ArgumentError(
                "CheckpointManager.save()", "step",
                f"{step}, while {self.directory} has a checkpoint of step {found[-1]}",
                "a step after those that are saved",
                "Go on from there with restore_latest(), or save in another folder.",
            )  # fmt: skip

    def _save_before_leaving(self, step: int, extra: dict[str, Any]) -> None:
        try:
            self.wait()
        except CheckpointError as error:  # then this is the last chance to save anything
            _log.warning("%s", error)
            self._saved = None
        if self._saved != step:
            self.save(step, **extra)
            self.wait()

    def _clean(self) -> None:
        if self.world.rank == 0:
            for step in self.steps()[: -self._keep]:
                self._remove(self.directory / f"step-{step:08}")
            folder.tidy(self.directory)  # what was held by processes that had yet to die

    def _remove(self, path: Path) -> None:
        """One that a manager has saved, and nothing else that may be called so."""
        if path in self._staying or not folder.is_managed(path):
            return
        found = folder.discard(path)
        if found.changed:
            self._staying.add(path)
            _log.warning(
                "%s stays: %s not as saved. Remove it yourself if nobody needs it.",
                path, ", ".join(found.changed) + (" is" if len(found.changed) == 1 else " are"),
            )  # fmt: skip
        elif found.others:
            _log.warning("%s is removed but for what others put there: %s", path, found.others)
