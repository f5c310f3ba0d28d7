"""Puts this folder on the import path, so that `made_up` is shared by the tiers."""
