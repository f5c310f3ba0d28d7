"""Pages as Jinja templates, filled by `orchestrator.report`."""
