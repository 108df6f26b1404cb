"""A watcher for what hangs or dies inside MPI, where no thread of Python runs any more.

It is a small process of its own, started before MPI is. Before each step it is told what will be
done and how long that may take; if the next word does not come in time it says so and ends the
process that it watches. It also says so if that process is gone in the middle of a step.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

_WATCHER = """
import os, select, signal, sys
parent, who, remedy = int(sys.argv[1]), sys.argv[2], sys.argv[3]
words, seconds, step = b"", 60.0, "starting"
def say(what):
    sys.stderr.write("[mpizero doctor] %s: %s. %s\\n" % (who, what, remedy))
    sys.stderr.flush()
while step:
    if not select.select([0], [], [], seconds)[0]:
        if os.getppid() == parent:
            say("no end of %s within %g s" % (step, seconds))
            os.kill(parent, signal.SIGKILL)
        break
    got = os.read(0, 4096)
    if not got:
        say("the process ended while " + step)
        break
    *lines, words = (words + got).split(b"\\n")
    for line in lines:
        number, step = line.decode().split(" ", 1)
        seconds = float(number)
"""

_REMEDY = (
    "Does the launcher belong to the MPI? (srun --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH and "
    "Intel MPI, or the MPI's own mpirun.) See which ranks say this, try two ranks on one host, and "
    "run `mpizero doctor` without a launcher."
)


class Watch:
    """Ends this process, with a message, when a step takes longer than it may.

    ``who`` is this process's name in the message.
    """

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

    def __exit__(self, *_: object) -> None:
        self.step("", 0)  # all is done
        if self._process is not None:
            self._process.communicate()
