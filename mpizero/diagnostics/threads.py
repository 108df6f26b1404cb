"""Which threads of this process run the program's code, and may do what other ranks wait for."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_OURS = (str(Path(__file__).resolve().parents[1]) + os.sep, f"{os.sep}mpizero_torch{os.sep}")
_PACKAGES = f"{os.sep}site-packages{os.sep}"
_STANDARD = (sysconfig.get_path("stdlib") + os.sep, "<frozen ")

_local = threading.local()

_serving: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def serve() -> None:
    """The calling thread serves the program, for good: it begins nothing by itself.

    It carries out what other threads have begun. Where that leads it into code of the program's
    (what somebody has hung onto a result, say), it is a thread like others.
    """
    _serving.add(threading.current_thread())


def serves(thread: threading.Thread) -> bool:
    """Is it one that has said ``serve``?"""
    return thread in _serving


@contextmanager
def in_order() -> Iterator[None]:
    """In here the calls of several threads have one order, which the ranks have agreed upon."""
    _local.depth = getattr(_local, "depth", 0) + 1
    try:
        yield
    finally:
        _local.depth -= 1


def is_in_order() -> bool:
    """Is the calling thread within ``in_order``?"""
    return getattr(_local, "depth", 0) > 0


def is_ours(file: str) -> bool:
    """Is it a file of mpizero's?"""
    return any(part in file for part in _OURS)


def of_program() -> list[int]:
    """The threads that run the program's code, the main thread first."""
    main = threading.main_thread().ident or 0
    serving = {thread.ident for thread in threading.enumerate() if thread in _serving}
    return [
        main,
        *(
            ident
            for ident, frame in sys._current_frames().items()
            if ident != main and not (ident in serving and _serves(frame))
        ),
    ]


def _serves(frame: FrameType | None) -> bool:
    """Is it in no code but ours and the standard library's?"""
    while frame is not None:
        file = frame.f_code.co_filename
        if not is_ours(file) and (_PACKAGES in file or not file.startswith(_STANDARD)):
            return False
        frame = frame.f_back
    return True
