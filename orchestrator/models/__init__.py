"""Models found, checked, loaded, copied for trials, saved and read back."""
