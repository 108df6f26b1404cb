"""Why a test does not go with mpizero's DistributedDataParallel as with torch's on gloo."""

from __future__ import annotations

REASONS: dict[str, str] = {}
