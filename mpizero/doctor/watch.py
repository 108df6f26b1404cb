"""A watcher for what may hang inside MPI, where no thread of Python runs any more.

It is a small process of its own, started before MPI is. Before each step it is told what will be
done and how long that may take; if the next word does not come in time it says so and ends the
process that it watches. It goes by itself when that process does.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from types import TracebackType

_WATCHER = """
import os, select, signal, sys
parent, words, seconds, step = int(sys.argv[1]), b"", 60.0, "starting"
while True:
    if not select.select([0], [], [], seconds)[0]:
        if os.getppid() == parent:
            sys.stderr.write("[mpizero doctor] %s: no end of %r within %g s. %s\\n"
                             % (sys.argv[2], step, seconds, sys.argv[3]))
            sys.stderr.flush()
            os.kill(parent, signal.SIGKILL)
        break
    got = os.read(0, 4096)
    if not got:
        break
    *lines, words = (words + got).split(b"\\n")
    for line in lines:
        number, step = line.decode().split(" ", 1)
        seconds = float(number)
"""

_REMEDY = (
    "The ranks do not reach each other, or the launcher and the MPI are different ones: see which "
    "ranks say this, try two ranks on one host, and run `mpizero doctor` without a launcher."
)


class Watch:
    """Ends this process, with a message, when a step takes longer than it may."""

    def __init__(self, who: str, parent: int) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        command = [sys.executable, "-I", "-S", "-c", _WATCHER, str(parent), who, _REMEDY]
        with suppress(OSError):  # no process to be had: then nobody watches
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
            )

    def step(self, name: str, seconds: float) -> None:
        """What is done next, and how long it may take."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.write(f"{seconds} {name}\n".encode())
                self._process.stdin.flush()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.communicate()
