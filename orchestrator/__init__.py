"""Runs experiments: the only code that knows Ray, DeepSpeed, Optuna and MLflow. Importing it imports none of them.

Its Python API is `orchestrator.api`, whose names are taken from here too: `from orchestrator import Experiment, run, evaluate, compare, check`.
"""

import importlib

__version__ = "0.1.0"

_API = frozenset(
    "Chosen Evaluation Experiment Gate ModelComparison Reproduction RunResult check compare evaluate open_run reproduce resume run".split()
)
"""Names that `orchestrator.api` gives; a test compares."""


def __getattr__(name: str) -> object:
    """Names of the API, at first use (PEP 562): the package itself stays light, and so does who only wants the config."""
    if name in _API:
        return getattr(importlib.import_module("orchestrator.config" if name == "Experiment" else "orchestrator.api"), name)
    raise AttributeError(f"module 'orchestrator' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_API])
