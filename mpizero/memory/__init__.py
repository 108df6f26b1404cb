"""Flat memory, wherever it lives: arrays of any library without a copy, and staging for devices."""
