"""All that may happen to a job: the rows of docs/reliability.md."""

from __future__ import annotations

import signal

from support.faults import GOES_ON, OPEN_MPI, Fault, signalled

ULFM = {OPEN_MPI: ("--with-ft", "ulfm")}
TWO_NODES = {"MPIZERO_RANKS_PER_NODE": "2"}

KILLED = (signalled(signal.SIGKILL),)
CRASHED = ("Segmentation fault", "in <lambda>")
RAISED = ("ValueError: injected: the learning rate",)
LATE = (r"mpizero: rank \d has waited for \d+ s, longer than MPIZERO_TIMEOUT",)


def missing(rank: int) -> tuple[str, ...]:
    return (*LATE, rf"missing: rank {rank} \(pid")


# fmt: off

ENDINGS = [
    Fault("exception", "raise", who=(0,), says=RAISED),
    Fault(
        "exception, asynchronous calls", "raise", "after", call="asynchronous", thread=True,
        says=RAISED,
    ),
    Fault(
        "exception inside a forked child", "child raises", promise=GOES_ON,
        says=("injected: in a child",),
    ),
    Fault("a forked child is killed", "child is killed", promise=GOES_ON),
    Fault("a forked child calls sys.exit(3)", "child exits", promise=GOES_ON, short=True),
    Fault("a forked child calls os._exit(3)", "child quits", promise=GOES_ON),
    Fault(
        "exception in a thread of the program's", "thread raises", promise=GOES_ON,
        says=("injected: the learning rate",),
    ),
    Fault("exception on all ranks", "raise", who=(0, 1, 2), says=RAISED),
    Fault("sys.exit(3)", "sys.exit(3)", says=(r"\[rank 2\] exited with status 3",)),
    Fault(
        "sys.exit(3) of rank 0", "sys.exit(3)", "after", who=(0,), call="node_shared",
        says=(r"\[rank 0\] exited with status 3",),
    ),
    Fault("os._exit(0)", "os._exit(0)", says=(r"\[rank 2\] left by os\._exit\(0\)",)),
    Fault(
        "os._exit(7)", "os._exit(7)", "inside", who=(0,), call="large", thread=True,
        says=(r"\[rank 0\] left by os\._exit\(7\)",),
    ),
    Fault("SIGKILL", "SIGKILL", says=KILLED),
    Fault(
        "SIGKILL of rank 0", "SIGKILL", "after", who=(0,), call="asynchronous", thread=True,
        says=KILLED,
    ),
    Fault(
        "SIGKILL in a node-shared call", "SIGKILL", "inside", call="node_shared", says=KILLED,
        short=True,
    ),
    Fault(
        "SIGKILL in a node-shared call, rank 0", "SIGKILL", "inside", who=(0,), call="node_shared",
        thread=True, says=KILLED,
    ),
    Fault("SIGKILL of two of three", "SIGKILL", "inside", who=(0, 2), call="large", says=KILLED),
    Fault("segmentation fault", "ctypes.string_at(0)", says=CRASHED),
    Fault(
        "segmentation fault in a call", "ctypes.string_at(0)", "inside", who=(0,), call="large",
        says=CRASHED, short=True,
    ),
    Fault(
        "SIGTERM to a rank", "SIGTERM", "inside", call="large", says=(signalled(signal.SIGTERM),),
    ),
    Fault("SIGINT to a rank", "SIGINT", says=("KeyboardInterrupt",)),
    Fault("abort()", "os.abort()", says=("Fatal Python error: Aborted", "in <lambda>")),
    Fault(
        "bus error", "mapped file",
        says=("Fatal Python error: Bus error", "in read_beyond_the_end"),
    ),
    Fault("illegal instruction", "SIGILL", says=("Fatal Python error: Illegal instruction",)),
    Fault(
        "killed by the kernel for want of memory", "all memory", says=KILLED, memory=500 << 20,
        env={"MPIZERO_TIMEOUT": "60"},
    ),
    Fault("MemoryError", "more memory than allowed", who=(0,), says=(r"\[rank 0\] .*MemoryError",)),
    Fault("SIGINT to the launcher (Ctrl-C)", "SIGINT to the launcher"),
    Fault("SIGTERM to the launcher", "SIGTERM to the launcher", "inside", call="large"),
    Fault("SIGKILL to the launcher", "SIGKILL to the launcher", "inside", call="large", short=True),
]

STARTS = [
    Fault("exception before init", "raise", "before init", says=RAISED),
    Fault(
        "sys.exit(0) before init", "sys.exit(0)", "before init",
        says=(r"mpizero: rank 2 has ended without calling init\(\)",), short=True,
    ),
    Fault("SIGKILL before init", "SIGKILL", "before init", who=(0,), says=KILLED),
    Fault(
        "asleep before init", "sleep", "before init",
        says=(
            r"mpizero: rank \d has waited for 3\d s in init\(\)",
            r"missing: rank 2 \(pid \d+\) has not called init\(\)",
        ),
        limit=40,
    ),
    Fault("exception in init", "raise", "in init", says=RAISED, short=True),
    Fault("SIGKILL in init", "SIGKILL", "in init", who=(0,), says=KILLED),
    Fault(
        "asleep before init, on another node", "sleep", "before init", limit=40,
        around=("env", "-u", "MPI_LOCALNRANKS", "-u", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        says=(r"rank \d has waited for 3\d s in init\(\)",),
    ),
    Fault(
        "exception at exit", "raise", "at exit", promise=GOES_ON,
        says=("injected: the learning rate",),
    ),
    Fault(
        "sys.exit(3) at the end", "sys.exit(3)", "at the end",
        says=(r"\[rank 2\] exited with status 3",),
    ),
    Fault("SIGKILL at exit", "SIGKILL", "at exit", says=KILLED),
    Fault("asleep at exit", "slow", "at exit", promise=GOES_ON),
    Fault(
        "started by the launcher of another MPI", "nothing", "before init", who=(1,), alone=True,
        env={"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "1"},
        says=("every rank would train alone",), short=True,
    ),
]

STANDSTILLS = [
    Fault("stopped by a signal", "SIGSTOP", says=(*missing(2), "is stopped")),
    Fault(
        "stopped by a signal, in a call", "SIGSTOP", "inside", who=(0,), call="node_shared",
        thread=True, says=(*LATE, "in it, rank 0 .* is stopped"), short=True,
    ),
    Fault("endless loop", "loop", who=(0,), says=(*missing(0), "in loop")),
    Fault(
        "endless loop, others in asynchronous calls", "loop", "after", call="asynchronous",
        thread=True, says=missing(2),
    ),
    Fault("endless C call that holds Python's lock", "C", says=missing(2)),
    Fault("sleep", "sleep", says=missing(2)),
    Fault("sleep, and the launcher is stopped", "sleep under a stopped launcher", short=True),
    Fault("waits for a lock that nobody opens", "lock", says=(*missing(2), "in wait_for_a_lock")),
    Fault("reads what never comes", "pipe", who=(0,), says=missing(0)),
    Fault("late by 5 s", "slow", promise=GOES_ON, env={"MPIZERO_TIMEOUT": "60"}),
    Fault("asked by SIGUSR2", "ask", promise=GOES_ON, says=("as asked by SIGUSR2",)),
    Fault(
        "leaves the loop early", "leave",
        says=("rank 2 has come to the end of the program, and others wait",),
    ),
    Fault(
        "blocking against asynchronous calls", "asynchronous",
        says=("wait for each other in different calls",),
    ),
    Fault(
        "blocking against asynchronous calls, overlap", "asynchronous", who=(0,), thread=True,
        says=("wait for each other in different calls",),
    ),
]

MISMATCHES = [
    Fault(
        "another collective", "another collective", says=("MismatchError", r"rank 2: broadcast\("),
    ),
    Fault(
        "another shape", "another shape", who=(0,),
        says=("MismatchError", r"rank 0: allreduce\(float32, shape \(5,\)"),
    ),
    Fault("another dtype", "another dtype", says=("MismatchError", r"rank 2: allreduce\(float64")),
    Fault(
        "another op", "another op", who=(0,), says=("MismatchError", r"rank 0: allreduce\(.*max"),
    ),
    Fault(
        "another root", "another root", call="broadcast",
        says=("MismatchError", r"rank 2: broadcast\(.*1"),
    ),
    Fault(
        "another algorithm", "another algorithm",
        says=("MismatchError", r"rank 2: allreduce\(.*ring"),
    ),
    Fault(
        "an array that cannot be written", "write-protected",
        says=("ArgumentError|MismatchError",),
    ),
    Fault(
        "another shape between nodes", "another shape", ranks=4, env=TWO_NODES,
        says=("MismatchError", r"rank 3: allreduce\(float32, shape \(5,\)"), short=True,
    ),
]

NODES = [
    Fault(
        "SIGKILL on another node", "SIGKILL", "inside", ranks=4, call="large", env=TWO_NODES,
        says=KILLED,
    ),
    Fault("exception on another node", "raise", ranks=4, env=TWO_NODES, says=RAISED),
    Fault("endless loop on another node", "loop", ranks=4, env=TWO_NODES, says=missing(3)),
    Fault(
        "a node falls silent (as if its link were cut)", "SIGSTOP", who=(2, 3), ranks=4,
        env=TWO_NODES, says=LATE, short=True,
    ),
]

ROOM = [
    Fault(
        "/dev/shm too small", "nothing", call="large", who=(0,), shared="24m", promise=GOES_ON,
        says=("/dev/shm has .* MiB free",),
    ),
    Fault(
        "disk full while saving, caught", "nothing", "after", "ddp", (0,), 2, disk="1500k",
        promise=GOES_ON, options={"catches": True}, says=("caught on rank 1.*No space left",),
    ),
    Fault(
        "disk full while saving", "nothing", "after", "zero2", (0,), 2, disk="1500k",
        says=("CheckpointError", "No space left"),
    ),
]

TRAININGS = [
    Fault(
        "exception in a hook", "raise", "backward", "ddp", (-1,), 2, thread=True, says=RAISED,
    ),
    Fault("exception in forward", "raise", "forward", "zero3", (0,), 2, says=RAISED),
    Fault("exception in the optimizer's step", "raise", "update", "zero1", (-1,), 2, says=RAISED),
    Fault(
        "exception in a DataLoader's worker", "raise", "worker", "ddp", (-1,), 2,
        says=("injected: a sample cannot be read",), short=True,
    ),
    Fault(
        "a DataLoader's worker is killed", "SIGKILL", "worker", "zero1", (0,), 2,
        says=("DataLoader worker .* (killed by signal|exited unexpectedly)",),
    ),
    Fault(
        "SIGKILL in backward, ddp", "SIGKILL", "backward", "ddp", (0,), 2, thread=True,
        says=KILLED,
    ),
    Fault("SIGKILL in backward, zero1", "SIGKILL", "backward", "zero1", (-1,), 2, says=KILLED),
    Fault(
        "SIGKILL in backward, zero2", "SIGKILL", "backward", "zero2", (0,), 2, thread=True,
        says=KILLED,
    ),
    Fault(
        "SIGKILL in backward, zero3", "SIGKILL", "backward", "zero3", (-1,), 2, thread=True,
        says=KILLED,
    ),
    Fault("SIGKILL in forward, zero3", "SIGKILL", "forward", "zero3", (0,), 2, says=KILLED),
    Fault(
        "segmentation fault in backward", "ctypes.string_at(0)", "backward", "zero2", (-1,), 2,
        says=CRASHED,
    ),
    Fault(
        "stopped in backward", "SIGSTOP", "backward", "zero2", (-1,), 2, thread=True,
        says=(*LATE, "is stopped"),
    ),
    Fault(
        "endless loop in forward", "loop", "forward", "zero3", (0,), 2, thread=True,
        says=missing(0),
    ),
    Fault(
        "parameters in another order", "another order", "model", "ddp", (-1,), 2,
        says=("MismatchError", "rank 1"),
    ),
    Fault(
        "a model that differs", "another width", "model", "zero1", (0,), 2,
        says=("MismatchError", "rank 1"),
    ),
    Fault(
        "a model that differs, zero3", "another width", "model", "zero3", (-1,), 2,
        says=("MismatchError", "rank 1"),
    ),
    Fault(
        "a parameter frozen on one rank", "frozen", "model", "zero2", (-1,), 2,
        says=("MismatchError", "rank 1.*first.weight: frozen"), short=True,
    ),
    Fault(
        "a parameter frozen on one rank, ddp", "frozen", "model", "ddp", (-1,), 2,
        says=("MismatchError", "rank 1"),
    ),
    Fault(
        "more layers on one rank", "another layer", "model", "ddp", (0,), 2,
        says=("MismatchError", "rank 1"),
    ),
    Fault(
        "a backward skipped, ddp", "skip", "instead of backward", "ddp", (-1,), 2,
        says=("MismatchError|mpizero: ",),
    ),
    Fault(
        "a backward skipped, zero2", "skip", "instead of backward", "zero2", (0,), 2, thread=True,
        says=("MismatchError|mpizero: ",),
    ),
    Fault(
        "leaves the loop early, zero3", "leave", "before", "zero3", (-1,), 2,
        says=("come to the end of the program|MismatchError|mpizero: ",),
    ),
    Fault(
        "evaluates alone, zero3", "evaluate alone", "after", "zero3", (0,), 2, promise=GOES_ON,
        options={"zero": {"share_parameters": False}},
    ),
    Fault(
        "evaluates alone, zero3 on two nodes", "evaluate alone", "after", "zero3", (0,), 2,
        env={"MPIZERO_RANKS_PER_NODE": "1"}, options={"zero": {"share_parameters": False}},
        says=("MismatchError|mpizero: ",),
    ),
    Fault(
        "a parameter frozen on one rank, later", "freeze", "before", "zero2", (-1,), 2,
        says=("MismatchError|mpizero: ",),
    ),
    Fault("saves alone", "save alone", "after", "ddp", (-1,), 2, says=("MismatchError|mpizero: ",)),
    Fault(
        "a gradient that is not finite", "nan", "loss", "zero1", (-1,), 2,
        says=("the gradient of '.*' has NaN in .* on rank 1",),
    ),
    Fault(
        "replicas that differ", "diverge", "after", "ddp", (-1,), 2,
        says=("MismatchError", "middle.weight"),
    ),
    Fault(
        "SIGKILL while saving", "SIGKILL", "save", "zero3", (0,), 2, saves=True, says=KILLED,
    ),
    Fault(
        "SIGKILL while saving in the background", "SIGKILL", "save", "zero1", (-1,), 2,
        thread=True, saves=True, options={"asynchronous": True}, says=KILLED,
    ),
    Fault("exception while saving", "raise", "save", "ddp", (-1,), 2, saves=True, says=RAISED),
    Fault(
        "SIGTERM to a rank with a PreemptionGuard", "SIGTERM, guarded", "before", "zero2", (-1,),
        2, saves=True,
    ),
]

SURVIVED = [
    Fault(
        "SIGKILL, elastic", "SIGKILL", "backward", "elastic", (0,), 3, promise=GOES_ON,
        launcher_arguments=ULFM, only=OPEN_MPI,
    ),
    Fault(
        "SIGKILL, elastic, zero2", "SIGKILL", "update", "elastic", (-1,), 3, thread=True,
        promise=GOES_ON, launcher_arguments=ULFM, only=OPEN_MPI, options={"stage": 2},
    ),
    Fault(
        "SIGKILL, elastic, zero3", "SIGKILL", "before", "elastic", (-1,), 3, promise=GOES_ON,
        launcher_arguments=ULFM, only=OPEN_MPI, options={"stage": 3},
    ),
    Fault(
        "exception, elastic", "raise", "backward", "elastic", (-1,), 3, launcher_arguments=ULFM,
        only=OPEN_MPI, options={"stage": 1}, says=RAISED,
    ),
    Fault(
        "elastic asked of an MPI that cannot", "nothing", "before init", who=(0,),
        options={"elastic": True},
        says=(r"LaunchError: init\(elastic=True\)",),
    ),
]

# fmt: on

FAULTS = [*ENDINGS, *STARTS, *STANDSTILLS, *MISMATCHES, *NODES, *ROOM, *TRAININGS, *SURVIVED]
