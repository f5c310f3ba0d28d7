"""Shipped experiments: YAML files, read by `orchestrator.config.load`."""
