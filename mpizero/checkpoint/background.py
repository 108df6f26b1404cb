"""Saving while training goes on: the bytes are copied first, and written by a thread."""

from __future__ import annotations

import threading

from mpizero.api import World
from mpizero.checkpoint.write import Save
from mpizero.diagnostics import serve


def carry_out(save: Save, world: World, asynchronous: bool) -> PendingSave | None:
    """Save now, or let a thread do it, once this rank's bytes are copied. Collective."""
    save.prepare()
    if asynchronous:
        try:
            with world.together("copying what is to be saved"):
                save.copy()
        except Exception:
            save.give_up()
            raise
        return PendingSave(save, world)
    save.write()
    return None


class PendingSave:
    """A save under way. ``wait`` for it, on all ranks, to learn how it went.

    The thread talks to the other ranks over communicators of its own. Where MPI serves one thread
    only, it just writes, and ``wait`` does the rest.
    """

    def __init__(self, save: Save, world: World) -> None:
        self._save, self._world = save, world
        self._talks = world.thread_level == "multiple"
        self._apart = world.part("checkpoints", 0) if self._talks and world.size > 1 else world
        self._error: BaseException | None = None
        self._over = False
        # No daemon: a program that ends at once after its last save ends when that is written.
        self._thread = threading.Thread(target=self._run, name="mpizero-checkpoint")
        self._thread.start()

    @property
    def running(self) -> bool:
        """Is this rank still writing?"""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Until the checkpoint is complete. Collective; raises what the save raised."""
        self._thread.join()
        if self._over:
            return
        self._over = True
        if self._error is not None:
            raise self._error
        if not self._talks:
            self._save.commit(self._world)

    def _run(self) -> None:
        serve()
        try:
            if self._talks:
                self._save.write(self._apart)
            else:
                self._save.write_own()
        except BaseException as error:
            self._error = error
