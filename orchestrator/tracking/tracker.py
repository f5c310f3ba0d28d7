"""What the driver says of a run to the tracking server, as records in a queue. Knows no MLflow: `mlflow` does.

Shape, always: one parent run per experiment, one child run for the baseline and for each trial, made by the driver alone.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import redaction
from orchestrator.config import Experiment, dump_yaml
from orchestrator.data import counted
from orchestrator.decision.limits import Judgement
from orchestrator.decision.selection import Selection
from orchestrator.records import TrialResult, TrialSpec
from orchestrator.report import alerts, figures, provenance
from orchestrator.storage import ownership
from orchestrator.tracking import page, values
from orchestrator.tracking.records import BASELINE, PARENT
from orchestrator.tracking.spool import Pump, Spool

if TYPE_CHECKING:
    from orchestrator.tracking.mlflow import Sink

log = logging.getLogger(__name__)

STATUS = {"complete": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
CLOSE_SECONDS = 30.0


class Tracker:
    """What the driver says of a run. Every method after `begin` returns at once and never raises for MLflow's sake."""

    def __init__(self, experiment: Experiment, sink: Sink, facts: Mapping[str, Any]):
        self.experiment, self.sink, self.datasets = experiment, sink, provenance.datasets(experiment)
        self.uri = sink.uri
        self.baseline: TrialResult | None = None
        self._facts = {name: values.text_of(value) for name, value in redaction.redact(dict(facts)).items()}
        self._common: dict[str, str] = {}
        self._bad: dict[str, set[str]] = {}
        self._open: set[str] = set()
        self._closed = False
        self._spool = Spool(sink.state_path.with_name("tracking.spool.jsonl"), wrong_record)
        self._pump = Pump(self._spool, sink.send, sink.alive, f"MLflow at {redaction.redact_uri(sink.uri)}")

    def begin(self) -> None:
        """Experiment and parent run, at once; then start the sending thread. Raises what MLflow raises."""
        config, sink = self.experiment, self.sink
        sink.find_experiment(config.tracking.experiment)
        sink.describe({page.VIEW_TAG: page.view(_now()), "mlflow.note.content": page.of_experiment()})
        sink.runs = sink.known_runs()
        if not sink.runs and len(self._spool):
            old = self._spool.path.with_name("tracking.spool.old.jsonl")
            ownership.claim(old)
            self._spool.path.replace(old)
            log.warning("records of an earlier run that never reached its MLflow server were moved to %s", old)
            self._spool = self._pump.spool = Spool(self._spool.path, wrong_record)
        self._common = {
            f"safebasin.{name}": value for name, value in {"config_hash": config.digest(), "experiment": config.name, **self._facts}.items()
        }
        self._common["mlflow.source.name"], self._common["mlflow.source.type"] = "safebasin", "LOCAL"
        with contextlib.suppress(OSError, KeyError, ImportError):  # a container's user may have no name
            import getpass

            self._common["mlflow.user"] = getpass.getuser()
        tags = {
            **self._common,
            "safebasin.role": PARENT,
            **{f"safebasin.version.{name}": version for name, version in provenance.versions().items()},
        }
        sink.send([{"op": "create", "run": PARENT, "name": config.tracking.run_name or config.name, "time": _now(), "tags": tags}])
        self._log(PARENT, params=page.of_run(config), tags=tags | {"mlflow.note.content": figures.plan(config)})
        self._put("text", PARENT, file="config.yaml", text=redaction.redact_text(dump_yaml(config)))
        self._inputs(PARENT)
        self._pump.start()

    def _put(self, op: str, run: str, **record: Any) -> None:
        self._spool.append({"op": op, "run": run, **record})

    def _log(
        self,
        run: str,
        metrics: Sequence[Sequence[Any]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, Any] | None = None,
    ):
        if metrics or params or tags:
            self._put("log", run, metrics=list(metrics), params=dict(params or {}), tags=dict(tags or {}))

    def _numbers(self, run: str, metrics: Mapping[str, float], step: int, moment: int) -> None:
        finite, bad = values.split_finite(metrics)
        new = set(bad) - self._bad.setdefault(run, set())
        self._bad[run] |= new
        tags = {"safebasin.not_finite": values.text_of(", ".join(sorted(self._bad[run])))} if new else None
        self._log(run, [[name, value, moment, step] for name, value in finite.items()], tags=tags)

    def _inputs(self, run: str) -> None:
        if self.datasets:
            self._put("inputs", run, datasets=self.datasets)

    def _create(self, spec: TrialSpec, key: str, role: str) -> None:
        name = "baseline" if key == BASELINE else f"{spec.recipe}-{spec.trial_id}"
        tags = values.trial_tags(spec, self._common) | {"safebasin.role": role}
        self._put("create", key, name=name, time=_now(), tags=tags)
        self._open.add(key)
        again = {"safebasin.state": "running", "safebasin.attempt": str(spec.attempt)}
        self._log(
            key,
            params=values.trial_params(spec),
            tags=again if key == BASELINE else again | {"safebasin.baseline_run_id": {"run": BASELINE}},
        )
        self._inputs(key)

    def start_baseline(self, spec: TrialSpec | None = None) -> None:
        """Make the run of the untouched model; without a spec (a cached baseline) one is written for it."""
        spec = spec or TrialSpec(BASELINE, "", (), {}, {}, self.experiment.search.seeds[0], "baseline", {}, "")
        self._create(spec, BASELINE, BASELINE)

    def finish_baseline(self, result: TrialResult) -> None:
        """Figures of the untouched model, on its run; what was counted of the data, on the parent's too."""
        self.baseline = result
        tags = {f"safebasin.{name}": values.text_of(text) for name, text in counted.tags(result.facts).items()}
        self._finish(BASELINE, result, None, tags | {"mlflow.note.content": values.text_of(page.of_baseline(result, self.experiment))})
        found = {values.metric_name(name): value for name, value in counted.metrics(result.facts).items()}
        self._numbers(PARENT, found, 0, _now())
        self._log(PARENT, tags=tags)

    def know_baseline(self, result: TrialResult) -> None:
        """The untouched model as an earlier driver measured it; written again only where its run is missing or never ended."""
        self.baseline = result
        if not self._told(BASELINE):
            self.start_baseline()
            self.finish_baseline(result)

    def reconcile(self, spec: TrialSpec, result: TrialResult, judgement: Judgement | None) -> None:
        """A trial that an earlier driver finished: written again only where its run is missing or never ended (the driver died
        between the trial's record and MLflow's)."""
        if not self._told(result.trial_id):
            self.start_trial(spec)
            self.finish_trial(result, judgement)

    def _told(self, run: str) -> bool:
        """Whether the end of a run has reached MLflow or waits in the spool."""
        waiting = any(record["op"] == "status" and record["run"] == run for record in self._spool.peek(len(self._spool)))
        return waiting or self.sink.ended(run)

    def start_trial(self, spec: TrialSpec) -> None:
        """Make a trial's run, or continue it where the trial was interrupted (same trial id)."""
        self._create(spec, spec.trial_id, "trial")

    def event(self, trial_id: str, event: Mapping[str, Any]) -> None:
        """A report from a running trial; its numbers become metrics at its step, at the time it was sent."""
        moment = int(event.get("time", time.time()) * 1000)
        self._numbers(trial_id, values.event_metrics(event), int(event.get("step", 0)), moment)

    def finish_trial(self, result: TrialResult, judgement: Judgement | None) -> None:
        """Final figures, verdict and state of a trial; ends its run (complete FINISHED, stopped KILLED, failed FAILED)."""
        tags = {"safebasin.verdict": judgement.verdict if judgement else "infeasible"}
        if judgement is not None:
            tags["safebasin.violated"] = ", ".join(c.name for c in judgement.constraints if c.verdict == "infeasible")
        warnings = [alert.text for alert in alerts.unseen(result.suites, self.baseline, self.experiment)]
        tags["safebasin.warned"] = str(bool(warnings)).lower()
        tags["mlflow.note.content"] = values.text_of(page.of_trial(result, judgement, self.experiment, warnings))
        self._finish(result.trial_id, result, judgement, tags)

    def _finish(self, key: str, result: TrialResult, judgement: Judgement | None, tags: Mapping[str, str]) -> None:
        now = _now()
        self._numbers(key, self._final(result, judgement), 0, now)  # at step 0: MLflow draws a figure of one step 0 as a bar, else as a dot
        extra = {"safebasin.state": result.state, **({"safebasin.error": values.text_of(result.error)} if result.error else {})}
        self._log(key, tags={**tags, **extra})
        self._put("status", key, status=STATUS[result.state], time=now)
        self._open.discard(key)

    def _final(self, result: TrialResult, judgement: Judgement | None) -> dict[str, float]:
        return values.result_metrics(result, judgement, self.baseline, self.experiment.safety.limits.confidence)

    def finish(self, selection: Selection | None, artifacts: Sequence[str | Path] = (), *, stopped: bool = False) -> None:
        """The outcome on the parent run: verdict, figures of the best trial, description, files (report, plots, tables).

        The parent run ends with `close`. Artifacts that do not exist are reported in the log and left out.
        """
        tags: dict[str, Any] = {}
        if selection is not None:
            tags["mlflow.note.content"] = values.text_of(figures.note(selection, self.baseline, self.experiment, stopped=stopped))
            tags["safebasin.verdict"] = "stopped" if stopped and selection.best is None else selection.outcome
        if selection is not None and selection.best is not None:
            result, judgement = selection.best.trials[0]
            tags |= {"safebasin.best_trial_id": result.trial_id, "safebasin.best_run_id": {"run": result.trial_id}}
            self._numbers(PARENT, self._final(result, judgement), 0, _now())
            self._log(result.trial_id, tags={"safebasin.best": "true"})
        self._log(PARENT, tags=tags)
        for path in artifacts:
            self._put("artifact", PARENT, path=str(Path(path).resolve()), to="plots" if Path(path).suffix == ".png" else None)

    def close(self, status: str = "FINISHED", timeout: float = CLOSE_SECONDS) -> int:
        """End the parent run with `status` (FINISHED, FAILED, KILLED) and trials still open as KILLED, then send what is left.

        Waits at most `timeout` seconds; returns how many records still wait. They stay in `<output>/tracking.spool.jsonl` and are
        sent when the experiment's folder is opened again. A second call changes nothing.
        """
        if not self._closed:
            self._closed = True
            for run in sorted(self._open):
                self._put("status", run, status="KILLED", time=_now())
            self._open.clear()
            self._log(PARENT, tags={"safebasin.state": {"FINISHED": "complete", "KILLED": "stopped"}.get(status, "failed")})
            self._put("status", PARENT, status=status, time=_now())
        left = self._pump.close(timeout)
        if left:
            log.warning("%d records for MLflow wait in %s; they are sent when this folder is opened again", left, self._spool.path)
        return left

    def run_id(self, key: str) -> str | None:
        """MLflow's id of a trial's run ("parent", "baseline" or a trial id); None while it is not made yet."""
        return self.sink.runs.get(key)

    def ui_hint(self) -> str:
        """The address of the saved view of the trials; before it the command that starts the page, where no server runs."""
        view = f"#/experiments/{self.sink.experiment_id}/runs?viewStateShareKey={page.VIEW}"
        if self.uri.startswith(("http://", "https://")):
            return f"{redaction.redact_uri(self.uri).rstrip('/')}/{view}"
        return f"mlflow ui --backend-store-uri {redaction.redact_uri(self.uri)}; then http://127.0.0.1:5000/{view}"


_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "create": {"name": str, "time": int, "tags": dict}, "log": {"metrics": list, "params": dict, "tags": dict}, "inputs": {"datasets": list},
    "text": {"file": str, "text": str}, "artifact": {"path": str, "to": (str, type(None))}, "status": {"status": str, "time": int},
}  # fmt: skip
"""What a record of the queue holds beside `op` and `run`."""


def wrong_record(record: Mapping[str, Any]) -> str | None:
    """Why a line of the queue's file is no record of ours, in words; None where it is one."""
    fields = _FIELDS.get(record["op"]) if isinstance(record.get("op"), str) else None
    if fields is None or not isinstance(record.get("run"), str):
        return "it has no `op` and `run` that are known"
    for name, kind in fields.items():
        if name not in record or not isinstance(record[name], kind) or isinstance(record[name], bool):
            return f"its `{name}` is not what {record['op']!r} has"
    for row in record.get("metrics", ()):
        fits = isinstance(row, list) and [type(part) for part in row] in ([str, int, int, int], [str, float, int, int])
        if not fits:
            return "its `metrics` are no [name, value, time, step]"
    if not all(isinstance(value, str) for value in record.get("params", {}).values()):
        return "its `params` are no texts"
    if not all(isinstance(data, dict) and {"name", "digest"} <= set(data) for data in record.get("datasets", ())):
        return "its `datasets` have no name and digest"
    return None


class NullTracker:
    """Takes what a Tracker takes and writes nothing."""

    uri = None

    def start_baseline(self, spec: TrialSpec | None = None) -> None: ...

    def finish_baseline(self, result: TrialResult) -> None: ...

    def know_baseline(self, result: TrialResult) -> None: ...

    def reconcile(self, spec: TrialSpec, result: TrialResult, judgement: Judgement | None) -> None: ...

    def start_trial(self, spec: TrialSpec) -> None: ...

    def event(self, trial_id: str, event: Mapping[str, Any]) -> None: ...

    def finish_trial(self, result: TrialResult, judgement: Judgement | None) -> None: ...

    def finish(self, selection: Selection | None, artifacts: Sequence[str | Path] = (), *, stopped: bool = False) -> None: ...

    def close(self, status: str = "FINISHED", timeout: float = CLOSE_SECONDS) -> int:
        return 0

    def run_id(self, key: str) -> str | None:
        return None

    def ui_hint(self) -> str:
        return "tracking is off (tracking.enabled: false)"


def _now() -> int:
    return int(time.time() * 1000)
