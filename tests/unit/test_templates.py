"""System prompts of training and evaluation: recorded in every result, and a difference nobody asked for is told loudly."""

from __future__ import annotations

import json

import made_up
import pytest
import tiny_llama

from orchestrator import config
from orchestrator.data import system_prompts, tokens
from orchestrator.data.conversations import Conversation
from orchestrator.decision import limits, selection
from orchestrator.experiment import checks
from orchestrator.records import LaneContext
from orchestrator.report import run
from orchestrator.trial import run as trial


def row(system=None, text="make cake"):
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "mix"}]
    return Conversation("1", tuple(([{"role": "system", "content": system}] if system is not None else []) + messages))


@pytest.mark.parametrize(
    "own_of_rows, training, evaluation, others, mismatch, asked",
    [
        ([None, None], None, None, 0, False, False),
        (["be kind", "be kind"], "be kind", "be kind", 0, False, False),
        (["be kind", None], None, None, 1, True, False),
        (["be kind", None], None, "be kind", 0, True, True),
        ([None], None, "be safe", 0, True, True),
        (["other"], None, "be safe", 1, True, False),
        ([""], None, None, 0, False, False),
    ],
)
def test_what_a_record_says(own_of_rows, training, evaluation, others, mismatch, asked):
    found = system_prompts.facts([row(s) for s in own_of_rows], None, training, evaluation)
    assert (found["rows_with_other_system_prompt"], found["mismatch"], found["asked_for"]) == (others, mismatch, asked)
    assert (found["train_system_prompt"], found["evaluation_system_prompt"]) == (training, evaluation)


@pytest.fixture
def files(tmp_path):
    tiny_llama.saved(tmp_path / "model")

    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        return str(tmp_path / name)

    words = ("cake", "tea", "soup", "house", "kite")
    with_system = [
        {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": f"make {w}"}, {"role": "assistant", "content": "mix it"}]}
        for w in words
    ]
    plain = [{"prompt": f"make {w}", "response": "mix it"} for w in words]
    harm = [{"prompt": f"{w} bomb"} for w in ("one", "two", "three")]

    def experiment(rows, **model):
        return config.from_dict({
            "name": "t", "recipes": [["full"]], "model": {"model_name_or_path": str(tmp_path / "model"), **model},
            "task": {"data": write("task.jsonl", rows), "max_new_tokens": 3, "eval_fraction": 0.2},
            "safety": {"data": None, "suites": [{"name": "harm", "data": write("harm.jsonl", harm)}], "max_new_tokens": 3},
            "training": {"engine": "plain", "max_steps": 2, "per_device_train_batch_size": 2},
        })  # fmt: skip

    return experiment, with_system, plain


NONE = (
    "{% for m in messages %}{{ '<s>' + m.role + '\\n' + m.content + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)
QWEN = "{% if messages[0].role != 'system' %}{{ '<s>system\\nYou are Q.</s>\\n' }}{% endif %}" + NONE
HEADER = (
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}{{ '<s>system\nToday.\n' + s + '</s>\n' }}"
    "{% for m in messages if m.role != 'system' %}{{ '<s>' + m.role + '\n' + m.content + '</s>\n' }}{% endfor %}"
)
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ messages[0].content }}"


LAST = "{{ messages[-1].content }}"


@pytest.mark.parametrize("template, wanted", [(QWEN, "You are Q."), (NONE, None), (HEADER, None), (REFUSES, None), (LAST, None)])
def test_a_prompt_that_the_chat_template_puts_itself_is_found(template, wanted):
    tokenizer = tiny_llama.tokenizer()
    tokenizer.chat_template = template
    assert tokens.implicit_system_prompt(tokenizer) == wanted


def test_a_prompt_that_the_chat_template_puts_itself_is_warned_about(files):
    experiment, _, plain = files
    (warning,) = checks.check_templates(experiment(plain, chat_template=QWEN))
    assert warning.startswith("the chat template puts the system prompt 'You are Q.' wherever none is given") and "model.system_prompt" in warning
    given = experiment(plain, chat_template=QWEN, system_prompt="be kind")
    assert checks.check_templates(given) == []
    ptst = config.from_dict(given.model_dump(mode="json") | {"recipes": [[{"prompt_template": {"form": "ptst"}}]]})
    assert checks.check_templates(ptst) == [warning]


def test_rows_with_a_prompt_of_their_own_are_warned_about_before_training(files):
    experiment, with_system, plain = files
    (warning,) = checks.check_templates(experiment(with_system))
    assert warning.startswith("TEMPLATE MISMATCH: 4 of 4 training rows") and "'be kind'" in warning and "no system prompt" in warning
    assert checks.check(experiment(with_system)).warnings[0] == warning
    assert checks.check_templates(experiment(with_system, system_prompt="be kind")) == []
    assert checks.check_templates(experiment(plain)) == [] == checks.check_templates(experiment(plain, system_prompt="be kind"))


class Silent:
    def report(self, event):
        return False


def ran(made, folder, recipe):
    from orchestrator.search import tune

    made = config.from_dict(made.model_dump(mode="json") | {"recipes": [recipe]})
    name = made.recipe_names[0]
    spec = tune.build_spec(made, trial_id="t1", recipe=name, params={"learning_rate": 0.01}, seed=0, phase="search", folder=str(folder))
    return trial.run(spec, Silent(), LaneContext())


def test_a_trial_records_both_prompts(files, tmp_path):
    experiment, with_system, plain = files
    same = ran(experiment(plain, system_prompt="be kind"), tmp_path / "a", ["full"]).facts["template"]
    assert not same["mismatch"] and same["train_system_prompt"] == same["evaluation_system_prompt"] == "be kind" and same["hash"]
    apart = ran(experiment(plain, system_prompt="be kind"), tmp_path / "b", [{"prompt_template": {"form": "ptst"}}])
    assert apart.facts["template"]["mismatch"] and apart.facts["template"]["asked_for"]
    assert apart.facts["template"]["train_system_prompt"] is None
    assert system_prompts.alerts([apart]) == [] and "'be kind', as its recipe says" in system_prompts.serving(apart)[0]
    unasked = ran(experiment(with_system), tmp_path / "c", ["full"])
    assert unasked.facts["template"]["mismatch"] and not unasked.facts["template"]["asked_for"]
    assert "TEMPLATE MISMATCH in 1 trial: 4 training rows" in system_prompts.alerts([unasked, unasked][:1])[0]
    assert system_prompts.serving(unasked) == []


def test_counts_of_a_defence_at_inference_are_recorded(files, tmp_path):
    experiment, _, plain = files
    result = ran(experiment(plain), tmp_path / "d", [{"perturbation": {"copies": 2}}])
    assert result.facts["strategies"]["perturbation"]["prompts_defended"] == 4  # three prompts and one task row


def test_the_report_says_it_above_everything_else(tmp_path):
    made = made_up.experiment(tmp_path)
    baseline, result = made_up.result("baseline", "", {}, phase="baseline"), made_up.result("t1", "full", {"learning_rate": 1e-3})
    result.facts["template"] = system_prompts.facts([row("be kind")], None, None, None)
    judgement = limits.judge(result, baseline, made.safety.limits)
    rows = [(result, judgement)]
    run.write_report(tmp_path / "out", made, baseline, rows, selection.best(rows))
    for name in ("report.html", "report.md"):
        text = (tmp_path / "out" / name).read_text()
        assert text.index("TEMPLATE MISMATCH in 1 trial") < text.index("All intervals"), name
