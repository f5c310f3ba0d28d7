"""What a person sees while a search runs: trials done, lanes at work, ETA, the best feasible so far.

On a terminal a live table; elsewhere (a job's log) one line per finished trial.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.text import Text

from orchestrator.decision.limits import Judgement
from orchestrator.records import TrialResult
from orchestrator.terminal import screen

VERDICT_STYLE = {"feasible": "green", "undecided": "yellow", "infeasible": "red"}


def duration(seconds: float) -> str:
    """`75` -> `1m15s`."""
    seconds = max(0, round(seconds))
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def outcome_line(result: TrialResult, judgement: Judgement, best: bool = False) -> Text:
    """One finished trial as a line."""
    score = "-" if judgement.task_score is None else f"{judgement.task_score:.3f}"
    asr = "-" if judgement.asr is None else f"{judgement.asr:.3f}"
    d = judgement.degradation
    change = "-" if d is None else f"{d.value:+.3f} [{d.lower:+.3f}, {d.upper:+.3f}]"
    text = Text(f"{result.trial_id:<6} {result.recipe:<20} score {score}  ASR {asr}  degradation {change}  ")
    rise = judgement.over_refusal_rise
    if rise is not None and any(c.verdict != "feasible" and c.estimate == rise for c in judgement.constraints):
        text.append(f"over-refusal {rise.value:+.3f} [{rise.lower:+.3f}, {rise.upper:+.3f}]  ")
    if result.facts.get("cancelled"):  # by the user: no fault of the trial's, and no verdict
        text.append("stopped on request, `safebasin resume` goes on with it", style="yellow")
        return text
    text.append(result.state if result.state != "complete" else judgement.verdict, style=VERDICT_STYLE[judgement.verdict])
    if result.error:
        text.append(f"  {result.error}", style="red")
    if best:
        text.append("  best so far", style="bold green")
    return text


def _breach(event: dict[str, Any]) -> str:
    """What a breach rests on, where that is more than the probe before it."""
    if not event["breach"]:
        return ""
    over = event.get("pooled_probes", 1)
    return f", a breach by the last {over} probes together ({event['pooled_rise']:+.3f})" if over > 1 else ", a breach"


def monitor_line(event: dict[str, Any]) -> str | None:
    """A probe, a rollback or the end at the last safe state in words; None for other events."""
    kind = event.get("kind")
    if kind == "probe":
        seen = f"step {event['step']}, {'quick probe' if event.get('quick') else 'probe'} of {event['n']}"
        return f"{seen}: unsafe answers {event['degradation']:+.3f}{_breach(event)}"
    if kind == "last_safe":
        return f"after {event['rollbacks']} rollbacks the training ends with its last safe state, step {event['to_step']}"
    if kind != "rollback":
        return None
    change = f"{event['added']} joins" if event.get("added") else f"peak learning rate {event['peak_rate']:.3g}"
    return f"back from step {event['step']} to step {event['to_step']} (rollback {event['rollbacks']}), {change}"


class Dashboard:
    """Takes events and finished trials of a search; prints them. Use as a context manager."""

    def __init__(self, console: Console, total: int, lanes: int):
        self.console, self.total, self.lanes = console, total, max(1, lanes)
        self.running: dict[str, dict[str, Any]] = {}
        self.durations: list[float] = []
        self.done = 0
        self.best: tuple[float, Text] | None = None
        self._bar = screen.bar(console, "trials", "bar", "count", "elapsed", "field:eta")
        self._task = self._bar.add_task("trials", total=total, eta="")
        self._live = screen.live(console, self._render())

    def __enter__(self) -> Dashboard:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def grow(self, extra: int) -> None:
        """More trials than planned at first (confirmations)."""
        self.total += extra
        self._bar.update(self._task, total=self.total)

    def say(self, text: str | Text) -> None:
        """A line that stays."""
        screen.say(self.console, text, whole=not self.console.is_terminal)

    def event(self, trial_id: str, event: dict[str, Any]) -> None:
        """An event of a running trial."""
        state = self.running.setdefault(trial_id, {"since": time.monotonic()})
        state.update({k: event[k] for k in ("recipe", "phase", "step", "steps", "loss", "degradation") if k in event})
        line = monitor_line(event)
        first = bool(event.get("breach")) and not state.get("breached")
        if line is not None and (first or event.get("kind") != "probe" or not self.console.is_terminal):
            state["breached"] = state.get("breached") or first
            self.say(Text(f"{trial_id:<6} monitor: {line}", style="yellow" if event.get("kind") != "probe" or event["breach"] else ""))
        self._refresh()

    def known(self, result: TrialResult, judgement: Judgement) -> None:
        """A trial that an earlier driver finished."""
        self.done += 1
        if result.seconds.get("total"):
            self.durations.append(result.seconds["total"])
        if judgement.verdict == "feasible" and (self.best is None or (judgement.task_score or 0.0) > self.best[0]):
            self.best = (judgement.task_score or 0.0, outcome_line(result, judgement, True))
        self._refresh()

    def finished(self, result: TrialResult, judgement: Judgement) -> None:
        """A trial ended."""
        self.running.pop(result.trial_id, None)
        self.done += 1
        if result.seconds.get("total"):
            self.durations.append(result.seconds["total"])
        score = judgement.task_score or 0.0
        leads = judgement.verdict == "feasible" and (self.best is None or score > self.best[0])
        line = outcome_line(result, judgement, leads)
        if leads:
            self.best = (score, line)
        prefix = Text("" if self.console.is_terminal else f"[{self.done}/{self.total}] ")
        suffix = Text("" if self.console.is_terminal else f"  {self.eta()}")
        self.say(prefix + line + suffix)
        self._refresh()

    def eta(self) -> str:
        """Time left as a sentence; empty before the first trial ended."""
        if not self.durations:
            return ""
        left = max(self.total - self.done, 0) * (sum(self.durations) / len(self.durations)) / self.lanes
        return f"ETA {duration(left)}" if left else ""

    def _refresh(self) -> None:
        self._bar.update(self._task, completed=self.done, eta=self.eta())
        if self._live:
            self._live.update(self._render())

    def _render(self) -> Group:
        table = screen.Grid(box=None, padding=(0, 1), show_header=False)
        for trial_id, state in self.running.items():
            steps = f"{state.get('step', 0)}/{state['steps']}" if state.get("steps") else ""
            loss = f"loss {state['loss']:.3f}" if "loss" in state else ""
            probe = f"probe {state['degradation']:+.3f}" if "degradation" in state else ""
            table.add_row(trial_id, str(state.get("recipe", "")), str(state.get("phase", "")), steps, loss, probe)
        best = self.best[1] if self.best else Text("nothing feasible yet", style="yellow")
        return Group(table, self._bar, screen.styled(Text("best: ") + best))
