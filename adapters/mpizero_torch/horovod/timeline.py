"""``start_timeline``, ``stop_timeline``: mpizero's own timeline, by Horovod's names."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from mpizero import ArgumentError
from mpizero_torch.horovod.process_set import global_process_set
from mpizero_torch.timeline import trace

_open: AbstractContextManager[None] | None = None


def start_timeline(file_path: str | Path, mark_cycles: bool = False) -> None:
    """Write a timeline of all ranks into the folder ``file_path`` until ``stop_timeline``.

    Collective. A file for each rank, in the format of Chrome's traces, which ``mpizero trace`` puts
    together. ``mark_cycles`` is taken: there are no cycles. Raises ArgumentError where one is being
    written already, or that folder cannot be.
    """
    global _open
    if _open is not None:
        raise ArgumentError(
            "hvd.start_timeline()", "file_path", f"{file_path}, while another is being written",
            "one at a time: hvd.stop_timeline() first",
        )  # fmt: skip
    opened = trace(file_path, world=global_process_set.world)
    opened.__enter__()
    _open = opened


def stop_timeline() -> None:
    """End the timeline; does nothing if there is none."""
    global _open
    if _open is not None:
        ended, _open = _open, None
        ended.__exit__(None, None, None)
