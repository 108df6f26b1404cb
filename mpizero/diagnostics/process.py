"""What the operating system knows about a process of this node."""

from __future__ import annotations

from pathlib import Path

RUNNING, STOPPED, GONE = "running", "stopped", "gone"


def state_of(pid: int) -> str:
    """RUNNING (or sleeping), STOPPED (by a signal or a debugger) or GONE (zombies too)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return RUNNING if not Path("/proc/self/stat").exists() else GONE
    letter = text.rpartition(")")[2].split()[0]
    return {"T": STOPPED, "t": STOPPED, "Z": GONE, "X": GONE}.get(letter, RUNNING)


def parent_of(pid: int) -> int:
    """The process that has started it; 0 if there is none, or it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[1])


def oom_kills() -> int:
    """How often the kernel has killed a process of this one's memory group for want of memory."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
        for folder in (Path("/sys/fs/cgroup") / group.lstrip("/"), Path("/sys/fs/cgroup")):
            events = folder / "memory.events"
            if events.exists():
                pairs = (line.split() for line in events.read_text().splitlines())
                return int(dict(pairs).get("oom_kill", 0))
    except (OSError, ValueError):
        pass
    return 0
