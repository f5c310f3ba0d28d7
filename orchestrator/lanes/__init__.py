"""Worker groups on a Ray cluster: trials go in, events and results come out."""
