"""Rows of any supported form become conversations, and conversations tokens with labels."""
