"""One file a command that is no search."""
