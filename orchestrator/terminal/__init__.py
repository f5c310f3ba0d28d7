"""What is printed, and what becomes of errors: the one door to Rich, streams that may go away, exit codes."""
