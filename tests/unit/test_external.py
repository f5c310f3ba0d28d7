"""Evaluators from outside, against stand-ins with the harnesses' interfaces; their metrics as limits."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import made_up
import pytest
import tiny_llama

from orchestrator import config
from orchestrator.decision import limits as constraint
from orchestrator.errors import ConfigError, JudgeError
from orchestrator.evaluation import external
from orchestrator.peers import Peers
from orchestrator.records import TrialResult


def settings(*rows):
    return config.from_dict({"safety": {"external": [{"name": "e", "task": "t", **row} for row in rows]}}).safety.external


@pytest.fixture
def lm_eval(monkeypatch):
    """A module that looks like lm-evaluation-harness and keeps its calls."""
    module, inner, calls = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface"), []
    rows = {"t": {"alias": "t", "acc,none": 0.75, "acc_stderr,none": 0.02, "f1,all": 0.5}}

    def simple_evaluate(**options):
        calls.append(options)
        return {"results": rows, "n-samples": {"t": {"original": 900, "effective": 200}}}

    inner.HFLM = lambda **options: SimpleNamespace(**options)
    module.simple_evaluate = simple_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    monkeypatch.setitem(sys.modules, "lm_eval.models", ModuleType("lm_eval.models"))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", inner)
    return calls


def test_the_extra_is_named_where_a_harness_is_missing(monkeypatch):
    for name, extra in external.EXTRAS.items():
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=rf"pip install 'safebasin\[{extra}\]'"):
            external.check(settings({"harness": name}))


def test_lm_eval_is_asked_of_the_model_in_memory(lm_eval):
    found = external.measure("model", "tokenizer", settings({"harness": "lm_eval", "max_drop": 0.02, "limit": 200, "options": {"num_fewshot": 3}}))
    assert found == {"e": {"value": 0.75, "stderr": 0.02, "max_drop": 0.02, "n": 200, "phase": "always"}}
    (call,) = lm_eval
    assert call["model"].pretrained == "model" and call["tasks"] == ["t"] and call["limit"] == 200 and call["num_fewshot"] == 3
    (lower,) = external.measure("m", "t", settings({"harness": "lm_eval", "higher_is_better": False})).values()
    assert lower["value"] == -0.75, "a rise of a metric that counts harm is a loss"


def test_task_files_of_ones_own(lm_eval, monkeypatch):
    """A folder named `include_path`, as on lm-eval's command line; the harness takes a manager in its place."""
    tasks = ModuleType("lm_eval.tasks")
    tasks.TaskManager = lambda include_path: ("manager of", include_path)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    external.measure("m", "t", settings({"harness": "lm_eval", "options": {"include_path": "/tasks", "num_fewshot": 1}}))
    assert lm_eval[0]["task_manager"] == ("manager of", "/tasks") and lm_eval[0]["num_fewshot"] == 1 and "include_path" not in lm_eval[0]


@pytest.mark.parametrize(("row", "said"), [
    ({"metric": "bleu"}, "no metric 'bleu' among alias, acc,none, f1,all"), ({"metric": "f1", "max_drop": 0.1}, "standard error None"),
])  # fmt: skip
def test_a_metric_that_cannot_be_a_limit_is_refused(lm_eval, row, said):
    with pytest.raises(JudgeError, match=said):
        external.measure("m", "t", settings({"harness": "lm_eval", **row}))


def test_inspect_reads_the_model_from_a_folder(monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM

    module = ModuleType("inspect_ai")

    def evaluated(task, *, model, model_args, limit, log_dir):
        loaded = AutoModelForCausalLM.from_pretrained(model_args["model_path"])
        assert model == "hf/local" and sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in tiny_llama.model().parameters())
        metrics = {"accuracy": SimpleNamespace(value=0.9), "stderr": SimpleNamespace(value=0.01)}
        return [SimpleNamespace(status=task, error="why", results=SimpleNamespace(scores=[SimpleNamespace(metrics=metrics)], completed_samples=50))]

    module.eval = evaluated
    monkeypatch.setitem(sys.modules, "inspect_ai", module)
    row = {"harness": "inspect_ai", "metric": "accuracy", "max_drop": 0.1}
    found = external.measure(tiny_llama.model(), tiny_llama.tokenizer(), settings({**row, "task": "success"}))
    assert found["e"] == {"value": 0.9, "stderr": 0.01, "max_drop": 0.1, "n": 50, "phase": "always"}
    with pytest.raises(JudgeError, match="status error: why"):
        external.measure(tiny_llama.model(), tiny_llama.tokenizer(), settings({**row, "task": "error"}))


def test_every_worker_hears_of_a_failure(monkeypatch):
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda found, src: found.__setitem__(0, JudgeError("it broke")))
    with pytest.raises(JudgeError, match="it broke"):
        external.measure("m", "t", settings({"harness": "lm_eval"}), Peers(1, 2))


@pytest.mark.parametrize(("value", "stderr", "verdict"), [
    (0.80, 0.005, "feasible"), (0.79, 0.03, "undecided"), (0.60, 0.01, "infeasible"), (None, None, "infeasible"),
])  # fmt: skip
def test_a_fall_is_a_limit_like_any_other(value, stderr, verdict, tmp_path):
    limits = config.Limits()
    before = made_up.baseline()
    before.facts["external"] = {
        "e": {"value": 0.80, "stderr": 0.005, "max_drop": 0.05, "n": 500, "phase": "always"},
        "seen": {"value": 1.0, "stderr": None, "max_drop": None, "n": 1, "phase": "always"},
        "late": {"value": 1.0, "stderr": 0.1, "max_drop": 0.05, "n": 9, "phase": "confirm"},
    }
    trial = TrialResult("t", "r", {}, 0, "search", "complete", before.task, before.suites)
    if value is not None:
        trial.facts["external"] = {"e": {"value": value, "stderr": stderr, "max_drop": 0.05, "n": 500}}
    judged = constraint.judge(trial, before, limits)
    (found,) = [c for c in judged.constraints if c.name.startswith("external/")]
    assert found.verdict == verdict
    if value is not None:
        half = 1.959964 * (0.005**2 + stderr**2) ** 0.5
        assert (found.estimate.lower, found.estimate.upper) == pytest.approx((0.8 - value - half, 0.8 - value + half), abs=1e-6)
    setting = made_up.experiment(tmp_path)
    external_rows = [{"name": "e", "harness": "lm_eval", "task": "t", "max_drop": 0.05}, {"name": "seen", "harness": "lm_eval", "task": "u"}]
    setting = config.from_dict({**setting.model_dump(mode="json"), "safety": {**setting.safety.model_dump(mode="json"), "external": external_rows}})
    assert constraint.constraint_names(setting)[-1] == "external/e" and "external/seen" not in constraint.constraint_names(setting)
