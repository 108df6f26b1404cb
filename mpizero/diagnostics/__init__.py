"""What each rank does, for all to see: records, the watchdog that reads them, traces.

``recorder()`` is this process's; ``watch`` starts its watchdog.
"""

from __future__ import annotations

from mpizero.diagnostics.current import (
    recorder,
    spanned,
    starting,
    stop_watching,
    trace,
    trace_if_asked,
    waits_for_at_most,
    watch,
    when_late,
)
from mpizero.diagnostics.lanes import Lanes
from mpizero.diagnostics.orphans import end_with_launcher
from mpizero.diagnostics.recorder import Lane, Recorder, recorded
from mpizero.diagnostics.threads import in_order, serve

__all__ = [
    "Lane",
    "Lanes",
    "Recorder",
    "end_with_launcher",
    "in_order",
    "recorded",
    "recorder",
    "serve",
    "spanned",
    "starting",
    "stop_watching",
    "trace",
    "trace_if_asked",
    "waits_for_at_most",
    "watch",
    "when_late",
]
