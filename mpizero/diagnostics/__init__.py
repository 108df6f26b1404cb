"""What each rank does, for all to see: records, the watchdog that reads them, traces.

``recorder()`` is this process's; ``watch`` starts its watchdog.
"""

from __future__ import annotations

from mpizero.diagnostics.recorder import Lane, Recorder, recorded
from mpizero.diagnostics.start import recorder, stop_watching, watch

__all__ = ["Lane", "Recorder", "recorded", "recorder", "stop_watching", "watch"]
