"""Why a test does not go with "mpizero" as with gloo. Every difference needs its line."""

from __future__ import annotations

REASONS: dict[str, str] = {}
