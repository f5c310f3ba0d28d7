"""What a person reads while a search runs, on a terminal and in a job's log."""

from __future__ import annotations

import io

import made_up
import pytest
from rich.console import Console

from orchestrator.config import Limits
from orchestrator.decision import limits as constraint
from orchestrator.experiment.progress import Dashboard, duration


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (75, "1m15s"), (3700, "1h01m"), (-5, "0s")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def lines(terminal: bool):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=160, color_system=None)
    untouched = made_up.result("baseline", "", {}, phase="baseline", asr=0.02)
    limits = Limits(max_degradation=0.1)
    with Dashboard(console, total=3, lanes=2) as board:
        board.event("t1", {"kind": "train", "recipe": "full", "step": 5, "steps": 10, "loss": 1.5})
        board.event("t1", {"kind": "probe", "step": 4, "n": 50, "degradation": 0.02, "breach": False})
        board.event("t1", {"kind": "probe", "step": 5, "n": 50, "degradation": 0.3, "breach": True})
        back = {"kind": "rollback", "step": 5, "to_step": 4, "rollbacks": 1, "rate_factor": 0.5, "peak_rate": 1e-3}
        board.event("t1", back)
        board.event("t1", back | {"added": "safegrad", "rollbacks": 2})
        board.event("t1", back | {"kind": "last_safe", "rollbacks": 2})
        for result in (made_up.result("t1", "full", {}, asr=0.9), made_up.result("t2", "safegrad", {}, asr=0.02)):
            board.finished(result, constraint.judge(result, untouched, limits))
        eta = board.eta()
    return out.getvalue(), eta


def test_a_log_gets_one_line_per_trial_with_count_and_eta():
    text, eta = lines(terminal=False)
    assert "[1/3] t1" in text and "[2/3] t2" in text and "best so far" in text.splitlines()[-1]
    assert eta.startswith("ETA") and "t1     monitor: step 5, probe of 50: unsafe answers +0.300, a breach" in text
    assert "step 4, probe of 50: unsafe answers +0.020\n" in text and "back from step 5 to step 4 (rollback 1), peak learning rate 0.001" in text
    assert "(rollback 2), safegrad joins" in text and "after 2 rollbacks the training ends with its last safe state, step 4" in text
    assert "\x1b" not in text


def test_a_terminal_shows_what_runs_and_leaves_the_finished_lines():
    text, _ = lines(terminal=True)
    assert "best so far" in text and "trials" in text and "0/3" in text
    assert "unsafe answers +0.300, a breach" in text and "rollback 1" in text and "unsafe answers +0.020" not in text
