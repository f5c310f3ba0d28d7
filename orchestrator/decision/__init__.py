"""Counts become intervals, verdicts and a choice. Pure: no torch, no files."""
