"""Collective operations: one file per algorithm, one that chooses, one that checks agreement."""
