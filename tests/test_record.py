"""What a rank writes down of its calls can be read whatever their number and their names."""

from __future__ import annotations

import os
import time

from mpizero.diagnostics.record import RING
from mpizero.diagnostics.recorder import Recorder


def test_calls_keep_their_descriptions_however_many_there_have_been() -> None:
    """A program with arrays of ever new sizes has ever new descriptions."""
    recorder = Recorder(0, 1)
    try:
        lane = recorder.lane("0-0", "blocking")
        long = "x" * 960
        whats = [f"all_reduce {number} {long}"[:1000] for number in range(4 * RING)]
        seen = 0
        for number, what in enumerate(whats):
            lane.end(lane.begin(what, 8 * number))
            if number % 100 and number != len(whats) - 1:
                continue
            calls = recorder.record.calls(time.monotonic_ns())
            assert [call.what for call in calls] == whats[max(0, number + 1 - RING) : number + 1]
            seen += 1
        assert seen > 10
        lane.end(lane.begin("barrier"))
        assert recorder.record.calls(time.monotonic_ns())[-1].what == "barrier"
        assert recorder.record.calls(time.monotonic_ns())[-1].lane == lane.name
    finally:
        os.close(recorder.fd)
