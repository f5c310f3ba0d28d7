"""Names of the runs that the driver's records are about."""

from __future__ import annotations

PARENT, BASELINE = "parent", "baseline"
