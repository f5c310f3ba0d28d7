"""Whose fault a failure is: the trial's own settings or data, a machine's, or a defect of ours. Only the trial's own is final.

Classes are told by name along their ancestry, so that neither torch nor Ray is imported to judge one.
"""

from __future__ import annotations

import re
import traceback
from pathlib import Path

from orchestrator.records import Fault

_TRIAL = {"TrialError", "ConfigError", "StrategyError", "FloatingPointError", "OutOfMemoryError"}
"""`OutOfMemoryError` is CUDA's: batch size and sharding are settings."""
_MACHINE = {
    "OSError", "MemoryError", "StorageError", "TrackingError", "LaneError", "CheckpointError", "RayError", "DistError", "SafetensorError",
    "ArrowException", "HTTPError", "TransportError",
}  # fmt: skip
_MACHINE_WORDS = re.compile(
    r"CUDA error(?!: device-side assert)|CUDA driver|NCCL|\[\S*gloo\S*\]|Connection (closed|reset|refused)|Broken pipe|Socket Timeout|timed out"
    r"|No space left|Input/output error|can't allocate memory|unable to open shared memory|file write failed|unexpected pos",
    re.IGNORECASE,
)
"""In what torch says as a plain RuntimeError."""
_UNREACHED = re.compile(r"the first: (no connection|timeout|HTTP \d)")
"""In a JudgeError: the judge could not be asked."""
REMEDY = {
    "trial": "",
    "machine": "a machine's fault, not the trial's: `safebasin resume` takes it up again",
    "safebasin": "a defect of safebasin, please report it with the traceback in the trial's result.json; `safebasin resume` tries it again",
}


def of(error: BaseException) -> Fault:
    """Whose fault an exception is that ended a trial. What is not known is ours."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _MACHINE:
        return "machine"
    if "JudgeError" in names:
        return "machine" if _UNREACHED.search(str(error)) else "trial"
    if names & _TRIAL or "ValueError" in names and _refused(error):
        return "trial"
    return "machine" if "RuntimeError" in names and _MACHINE_WORDS.search(str(error)) else "safebasin"


def _refused(error: BaseException) -> bool:
    """Whether a `raise` of ours said so: the settings cannot work. The same class out of a library, or of a mistake, is no such sentence."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    last, home = frames[-1], Path(__file__).resolve().parent.parent
    ours = any(Path(last.filename).is_relative_to(home / name) for name in ("orchestrator", "strategies", "search_spaces"))
    return ours and (last.line or "").startswith("raise ")


def said(text: str, fault: Fault) -> str:
    """The same for a sentence of ours."""
    return f"{text} ({REMEDY[fault]})" if REMEDY[fault] else text
