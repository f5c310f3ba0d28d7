"""The names of the files in an output folder that several parts read or write, each once."""

from __future__ import annotations

CONFIG = "config.resolved.yaml"
"""The config as it is run, written when a run begins."""
LOCK = ".running.lock"
"""Held by the driver of a run."""
SPEC, RESULT = "spec.json", "result.json"
"""In a trial's folder: what was asked, and how it ended."""
CHECKPOINT, GOOD = "checkpoint", "good"
"""In a trial's folder: where an interrupted training is resumed, and the last state whose probes kept the limit."""
