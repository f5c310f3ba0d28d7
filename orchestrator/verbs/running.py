"""A run as the command line and the Python API make it: it can be stopped, says how it goes, and ends with where everything is."""

from __future__ import annotations

import shlex
import sys
import threading
from typing import TYPE_CHECKING

from orchestrator.config import Experiment
from orchestrator.data import made_up
from orchestrator.experiment import driver, endings
from orchestrator.experiment.driver import Outcome
from orchestrator.experiment.stop import StopFlag
from orchestrator.terminal import crash, screen, streams

if TYPE_CHECKING:
    from rich.console import Console


def run(experiment: Experiment, console: Console, retry_failed: bool = False) -> Outcome:
    """Run an experiment, or go on with one (`output.resume`), and say its outcome.

    The first Ctrl-C (in a notebook: the first interrupt) ends it cleanly, with a report of what finished; outside the main thread there is
    nothing to interrupt. Raises SafebasinError for what the user can mend, KeyboardInterrupt at the second.
    """
    crash.keep_in(experiment.output_dir.absolute())
    stop = StopFlag()
    listens = threading.current_thread() is threading.main_thread()
    again = f"go on with: safebasin resume {shlex.quote(experiment.output_place)}"
    try:
        outcome = driver.run(experiment, console, stop, on_checked=stop.listen if listens else lambda: None, retry_failed=retry_failed)
    except KeyboardInterrupt:
        if stop.is_set():  # there is something by then
            streams.tell(again, sys.stderr)
        raise
    finally:
        stop.forget()
    style = {0: "bold green", 3: "bold yellow"}.get(outcome.exit_code, "bold red")
    screen.say(console, outcome.sentence, style)
    if world := made_up.sentence(experiment):
        screen.say(console, world)
    for line in endings.lines(experiment, outcome):
        screen.say(console, line, whole=True)
    if stop.is_set():
        screen.say(console, again, "bold", whole=True)
    return outcome
