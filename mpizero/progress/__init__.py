"""Asynchronous operations: handles, and the thread that overlaps communication with compute."""

from __future__ import annotations

from mpizero.progress.handle import Handle
from mpizero.progress.messages import Message, Messages
from mpizero.progress.worker import Worker, finish_what_was_left, has_core, overlaps

__all__ = [
    "Handle",
    "Message",
    "Messages",
    "Worker",
    "finish_what_was_left",
    "has_core",
    "overlaps",
]
