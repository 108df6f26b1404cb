"""What is known of a job that stands still, as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence

from mpizero.diagnostics.process import GONE, STOPPED
from mpizero.diagnostics.record import Made
from mpizero.diagnostics.views import LEFT, UNSEEN, Stuck, View, name, stuck_calls

_STATES = {
    STOPPED: "is stopped (by a signal or a debugger)",
    GONE: "is gone: killed, crashed, or left by os._exit",
    LEFT: "has come to the end of its program",
    UNSEEN: "cannot be seen from here",
}


def report(title: str, views: Sequence[View], notes: Sequence[str] = ()) -> str:
    """Who waits in which call, who is missing and what it last did, and everyone's stacks."""
    lines = [f"mpizero: {title}", *(f"  {note}" for note in notes)]
    seen = {view.rank: view for view in views}
    stuck = stuck_calls(views)
    for each in stuck:
        lines += _about_call(each, seen)
    told = {rank for each in stuck for rank in (*each.waiting, *each.missing)}
    for view in views:
        if view.rank not in told:
            lines.append(f"  {_about_rank(view)}")
    lines += _stacks(views)
    return "\n".join(lines) + "\n"


def _about_call(stuck: Stuck, seen: dict[int, View]) -> list[str]:
    call = stuck.call
    verb = "waits" if len(stuck.waiting) == 1 else "wait"
    size = f", {_bytes(call.nbytes)}" if call.nbytes else ""
    lines = [
        f"  {name(stuck.waiting)} {verb} in {call.what}{size}: call {call.sequence} of "
        f"{_of_lane(call)}, for {_seconds(call.age)}" + (f", at {call.line}" if call.line else "")
    ]
    still = [rank for rank in stuck.waiting if seen[rank].state in (STOPPED, GONE)]
    lines += [f"    in it, {_who(seen[rank])} {_STATES[seen[rank].state]}" for rank in still]
    if not stuck.missing:
        why = "" if still else ": data is moving, or MPI is stuck"
        return [*lines, f"    all of its ranks have come{why}"]
    for rank in stuck.missing[:16]:
        lines.append(f"    missing: {_about_rank(seen.get(rank, View(rank)))}")
    if len(stuck.missing) > 16:
        lines.append(f"    and {len(stuck.missing) - 16} more: {name(stuck.missing[16:])}")
    return lines


def _about_rank(view: View) -> str:
    """ "rank 1 (pid 123 on n1) is stopped; it last did ... 5 s ago, and is in backward"."""
    parts = [_who(view)]
    state = _STATES.get(view.state)
    if state:
        parts.append(state + ";")
    if view.state == UNSEEN:
        return " ".join(parts).rstrip(";")
    for call in view.open_calls:
        parts.append(f"is in {_briefly(call)} for {_seconds(call.age)};")
    last = view.last_done
    if last is not None:
        ended = last.age - (last.took or 0.0)
        parts.append(f"last did {_briefly(last)}, {_seconds(ended)} ago;")
    elif not view.open_calls:
        parts.append("has made no call yet;")
    if view.phase:
        parts.append(f"in {view.phase} since {_seconds(view.phase_age)}")
    return " ".join(parts).rstrip(";")


def _who(view: View) -> str:
    return f"rank {view.rank}" + (f" (pid {view.pid} on {view.host})" if view.pid else "")


def _briefly(call: Made) -> str:
    where = f" at {call.line}" if call.line else ""
    return f"{call.what}, call {call.sequence} of {_of_lane(call)}{where}"


def _of_lane(call: Made) -> str:
    ranks, _, kind = call.lane.rpartition(" ")
    ranks = ranks.replace(",", ", ")
    return f"{name_of(ranks)} ({kind})"


def name_of(ranks: str) -> str:
    """ "0-3" as "ranks 0-3"."""
    return f"rank{'s' if '-' in ranks or ',' in ranks else ''} {ranks}"


def _stacks(views: Sequence[View]) -> list[str]:
    """Each stack once, with the ranks that have it."""
    by_stack: dict[str, list[int]] = {}
    for view in views:
        if view.state != UNSEEN:
            by_stack.setdefault(view.stack, []).append(view.rank)
    lines = []
    for stack, ranks in by_stack.items():
        if stack:
            lines.append(f"  {name(ranks)}, Python stacks (most recent call first):")
            lines += [f"    {line}" for line in stack.splitlines()]
        else:
            lines.append(f"  {name(ranks)}: no Python stack to be had")
    return lines


def _seconds(age: float) -> str:
    return f"{age:.1f} s" if age < 10 else f"{age:.0f} s"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
