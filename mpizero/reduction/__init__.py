"""Summing blocks of memory: what a reduction does to the numbers, apart from how they travel."""

from __future__ import annotations

from mpizero.reduction.operation import Operation, operation, quietly

__all__ = ["Operation", "operation", "quietly"]
