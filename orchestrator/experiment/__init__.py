"""One run from end to end: checks, baseline, search, confirmation, handover, resume."""
