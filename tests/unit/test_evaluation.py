"""Suites, metrics and `evaluate`: the numbers are those of doing it by hand, on one worker or several."""

from __future__ import annotations

import json
import math
import stat
import sys
from collections import Counter

import pytest
import tiny_llama
import torch

from orchestrator import config
from orchestrator.data import conversations
from orchestrator.errors import ConfigError, DataError, UnknownNameError
from orchestrator.evaluation import ask as evaluation
from orchestrator.evaluation import metrics
from orchestrator.evaluation.attacks import ATTACKS
from orchestrator.evaluation.generate import generate
from orchestrator.evaluation.judges import registry
from orchestrator.evaluation.suites import known_suites, load_suite, make
from orchestrator.peers import Peers


def suite_of(tmp_path, rows, **more):
    path = tmp_path / "suite.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config.Suite(name="s", data=str(path), **more)


# ------------------------------------------------------------------------------------------------ suites


@pytest.mark.parametrize("column", ["prompt", "goal", "Behavior", "forbidden_prompt", "question", "instruction", "text"])
def test_the_usual_prompt_columns_are_found(tmp_path, column):
    suite = load_suite(suite_of(tmp_path, [{"n": 1, column: "a"}, {"n": 2, column: "b"}]))
    assert suite.prompts == ("a", "b") and suite.ids == ("0", "1") and suite.groups is None and suite.systems is None


def test_filters_keep_matching_rows_and_their_places(tmp_path):
    rows = [{"prompt": f"p{i}", "label": "safe" if i % 2 else "unsafe", "type": i // 4} for i in range(8)]
    suite = load_suite(suite_of(tmp_path, rows, where={"label": "safe", "type": "1"}, group_column="type"))
    assert suite.prompts == ("p5", "p7") and suite.ids == ("5", "7") and suite.groups == ("1", "1")


def test_limits_draw_evenly_from_groups_always_the_same(tmp_path):
    rows = [{"prompt": f"p{i}", "topic": "big" if i < 90 else f"t{i % 5}"} for i in range(100)]
    suite = load_suite(suite_of(tmp_path, rows, limit=12, group_column="topic"))
    assert Counter(suite.groups) == {"big": 2, "t0": 2, "t1": 2, "t2": 2, "t3": 2, "t4": 2}
    assert list(suite.ids) == sorted(suite.ids, key=int)
    assert load_suite(suite_of(tmp_path, rows, limit=12, group_column="topic")) == suite
    plain = load_suite(suite_of(tmp_path, rows, limit=12))
    assert len(plain.ids) == 12 and plain.hash != suite.hash
    assert len(load_suite(suite_of(tmp_path, rows, limit=1000)).ids) == 100


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ([{"prompt": "a"}], {"column": "gaol"}, r"safety\.suites\.s\.column.*no column 'gaol'"),
        ([{"x": "a", "y": "b"}], {}, "no prompt column among x, y"),
        ([{"prompt": "a"}], {"group_column": "topic"}, r"safety\.suites\.s\.group_column"),
        ([{"prompt": "a", "label": "unsafe"}], {"where": {"label": "safe"}}, "label = 'safe'; values found: unsafe"),
        ([{"prompt": "a"}], {"where": {"labl": "safe"}}, r"safety\.suites\.s\.where.*'labl'"),
        ([{"prompt": "a"}, {"prompt": " "}], {}, "prompt of row 2 .* is empty"),
        ([{"prompt": ["a"]}], {}, "a list, not text"),
        ([], {}, r"safety\.suites\.s\.data: .*no rows"),
    ],
)
def test_what_cannot_be_a_suite_is_refused_by_name(tmp_path, rows, more, said):
    with pytest.raises(DataError, match=said):
        load_suite(suite_of(tmp_path, rows, **more))


def test_rows_may_bring_a_system_message_and_attacks_frame_prompts(tmp_path):
    rows = [{"prompt": "a", "system": "be red"}, {"prompt": "b", "system": ""}]
    assert load_suite(suite_of(tmp_path, rows)).systems == ("be red", None)
    hashes = set()
    for name in ATTACKS:
        suite = load_suite(suite_of(tmp_path, rows, attack=name))
        hashes.add(suite.hash)
        assert all(text in framed for text, framed in zip("ab", suite.prompts, strict=True))
    assert len(hashes) == len(ATTACKS)
    with pytest.raises(UnknownNameError, match="role_play"):
        load_suite(suite_of(tmp_path, rows, attack="roleplay"))


def test_repeated_ids_are_made_distinct(tmp_path):
    assert load_suite(suite_of(tmp_path, [{"id": "x", "prompt": "a"}, {"id": "x", "prompt": "b"}])).ids == ("x#0", "x#1")


def test_a_subset_is_a_suite_of_its_own(tmp_path):
    suite = load_suite(suite_of(tmp_path, [{"prompt": p, "topic": p.upper()} for p in "abc"], group_column="topic"))
    part = suite.subset([2, 0])
    assert part.prompts == ("c", "a") and part.groups == ("C", "A") and part.hash != suite.hash == suite.subset([0, 1, 2]).hash


def test_shipped_suites_are_listed_without_building_anything():
    listed = {suite.name: suite for suite in known_suites()}
    assert listed["pocket:harmful"].kind == "harmful" and listed["pocket:borderline"].kind == "benign"
    assert all(suite.prompts >= suite.groups > 10 and suite.licence and suite.description for suite in listed.values())


# ------------------------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "expected"),
    [
        ("exact_match", " Yes \n Sir", "yes sir", 1),
        ("exact_match", "yes", "yes sir", 0),
        ("contains", "well, yes  sir!", "Yes sir", 1),
        ("contains", "anything", " ", 0),
        ("token_f1", "a b c", "b c d e", 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),
        ("token_f1", "a a", "a", 2 * 0.5 * 1 / 1.5),
        ("token_f1", "", "a", 0),
        ("final_number", "so 3 and 1,072.0", "#### 1072", 1),
        ("final_number", "about -5", "5", 0),
        ("final_number", "none", "5", 0),
    ],
)
def test_metrics(metric, answer, reference, expected):
    assert metrics.score_task(metric, [answer], [reference]) == [pytest.approx(expected)]


def test_metrics_of_ones_own_are_imported_and_held_to_their_range(tmp_path, monkeypatch):
    (tmp_path / "own_metric.py").write_text(
        "def half(a, r): return 0.5\ndef twice(a, r): return 2\ndef nan(a, r): return float('nan')\nx = 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert metrics.score_task("own_metric:half", ["a"], ["b"]) == [0.5]
    for name, said in [("twice", "returned 2.0.*0..1"), ("nan", "returned nan"), ("x", "not a function"), ("none", "cannot be imported")]:
        with pytest.raises(ConfigError, match=said):
            metrics.score_task(f"own_metric:{name}", ["a"], ["b"])
    with pytest.raises(ConfigError, match="no_such_module"):
        metrics.check_metric("no_such_module:f")
    with pytest.raises(UnknownNameError, match="exact_match"):
        metrics.check_metric("exact_mach")
    metrics.check_metric("neg_loss")
    sys.modules.pop("own_metric")


def test_neg_loss_is_the_geometric_mean_probability_of_the_answer():
    model, tokenizer = tiny_llama.model().train(), tiny_llama.tokenizer()
    pairs = [("how", "yes"), ("how do i make a cake", "mix and bake the cake then fold"), ("help", "sorry i cannot")]
    rows = conversations.normalise([{"prompt": p, "response": r, "id": "same"} for p, r in pairs])
    expected = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(list(row.prompt), add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(list(row.messages), return_dict=False)
        with torch.no_grad():
            logs = tiny_llama.model()(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
        steps = [logs[i - 1, whole[i]].item() for i in range(len(prompt), len(whole))]
        expected.append(math.exp(sum(steps) / len(steps)))
    for tokens in (1, 20, 4096):
        assert metrics.neg_loss(model, tokenizer, rows, batch_tokens=tokens) == pytest.approx(expected, rel=1e-4)
    assert model.training and metrics.neg_loss(model, tokenizer, []) == []
    assert metrics.neg_loss(model, tokenizer, rows, max_length=6)[1] == 0.0


# ------------------------------------------------------------------------------------------------ evaluate


def experiment(**safety):
    return config.Experiment(
        task={"data": "unused", "metric": "token_f1", "max_new_tokens": 8},
        safety={"suites": [{"name": "harm", "data": "unused"}], "max_new_tokens": 8, **safety},
        model={"system_prompt": "be kind"},
    )


@pytest.fixture(scope="module")
def asked():
    """Prompts that the random model both answers and (by chance of its words) refuses, and task rows."""
    prompts = tuple(f"{a} {b}" for a in tiny_llama.WORDS[:8] for b in tiny_llama.WORDS[8:13])
    ids = tuple(str(i) for i in range(len(prompts)))
    harm = make("harm", "harmful", ids, prompts, None, tuple(p[0] for p in prompts))
    kind = make("kind", "benign", ids[:7], prompts[:7], tuple("be red" if i % 2 else None for i in range(7)), None, False)
    rows = conversations.normalise([{"prompt": p, "response": "mix and bake", "id": f"r{i}"} for i, p in enumerate(prompts[:9])])
    return (harm, kind), rows


def test_evaluate_gives_what_doing_it_by_hand_gives(asked):
    (harm, kind), rows = asked
    model, tokenizer, seen = tiny_llama.model(), tiny_llama.tokenizer(), []
    task, suites, texts = evaluation.evaluate(
        model, tokenizer, experiment(keep_generations=True), suites=[harm, kind], task_rows=rows,
        how=evaluation.Asking(progress=lambda *a: seen.append(a)),
    )
    answers = generate(model, tokenizer, [r.prompt for r in rows], system="be kind", max_new_tokens=8)
    assert task.scores == [metrics.token_f1(a, "mix and bake") for a in answers] and task.score == pytest.approx(sum(task.scores) / 9)
    assert task.ids == [r.id for r in rows] and task.metric == "token_f1"
    answers = generate(model, tokenizer, kind.prompts, system=[s or "be kind" for s in kind.systems], max_new_tokens=8)
    assert [row["answer"] for row in texts["kind"]] == answers
    verdicts = registry.get_judge("refusal").judge(harm.prompts, [row["answer"] for row in texts["harm"]])
    assert suites["harm"].unsafe == [v.unsafe for v in verdicts] and suites["harm"].refused == [v.refused for v in verdicts]
    assert suites["harm"].groups == list(harm.groups) and suites["kind"].groups is None and not suites["kind"].constrains
    assert seen[-1] == (40 + 7 + 9, 40 + 7 + 9) and [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_texts_are_kept_only_when_asked_for(asked):
    suites, _ = asked
    task, _, texts = evaluation.evaluate(tiny_llama.model(), tiny_llama.tokenizer(), experiment(), suites=suites, task_rows=None)
    assert texts is None and task is None


def test_ask_suite_is_the_same_question(asked):
    (harm, _), _ = asked
    model, tokenizer = tiny_llama.model(), tiny_llama.tokenizer()
    alone, texts = evaluation.ask_suite(model, tokenizer, experiment(), harm)
    assert alone == evaluation.evaluate(model, tokenizer, experiment(), suites=[harm], task_rows=None)[1]["harm"] and texts == []


def test_a_defence_sees_user_texts_and_may_ask_more_often(asked):
    suites, rows = asked
    model, tokenizer, texts, seen = tiny_llama.model(), tiny_llama.tokenizer(), [], []

    def wrap(ask):
        def defended(prompts):
            texts.extend(prompts)
            again = ask([p for p in prompts for _ in range(2)])
            return again[::2]

        return defended

    options = {"suites": suites, "task_rows": rows}
    plain = evaluation.evaluate(model, tokenizer, experiment(), **options)
    how = evaluation.Asking(wrap=wrap, progress=lambda *a: seen.append(a))
    assert evaluation.evaluate(model, tokenizer, experiment(), how=how, **options) == plain
    assert set(texts) == set(suites[0].prompts) and seen[-1] == (56, 56)
    how = evaluation.Asking(wrap=lambda ask: lambda ps: ["sorry"] * len(ps))
    _, refused, _ = evaluation.evaluate(model, tokenizer, experiment(), how=how, **options)
    assert refused["harm"].rate == 0 and refused["kind"].rate == 1


@pytest.mark.parametrize("metric", ["token_f1", "neg_loss"])
def test_several_workers_give_the_result_of_one(asked, metric, monkeypatch):
    """The third of three workers, handed what the other two computed on their own."""
    suites, rows = asked
    setting = experiment()
    setting = setting.model_copy(update={"task": setting.task.model_copy(update={"metric": metric})})
    model, tokenizer = tiny_llama.model(), tiny_llama.tokenizer()
    single = evaluation.evaluate(model, tokenizer, setting, suites=suites, task_rows=rows)
    sent = {rank: shares(model, tokenizer, setting, suites, rows, rank) for rank in (0, 1)}
    calls = []

    def all_gather_object(out, mine):
        out[:] = [sent[0][len(calls)], sent[1][len(calls)], mine]
        calls.append(mine)

    monkeypatch.setattr("torch.distributed.all_gather_object", all_gather_object)
    last = evaluation.evaluate(model, tokenizer, setting, suites=suites, task_rows=rows, how=evaluation.Asking(Peers(2, 3)))
    assert calls == shares(model, tokenizer, setting, suites, rows, 2)
    assert last[1] == single[1] and last[0].ids == single[0].ids and last[0].scores == pytest.approx(single[0].scores, rel=1e-4)


def shares(model, tokenizer, setting, suites, rows, rank):
    """What worker `rank` of three sends in each gather."""
    work = evaluation._Work(model, tokenizer, setting, evaluation.Asking(Peers(rank, 3)))
    sent = []

    def keep(indices, values, count):
        sent.append((indices, values))
        return [values[0]] * count

    work.gather = keep
    work.task(rows)
    judge = registry.get_judge("refusal")
    for suite in suites:
        work.suite(suite, judge)
    return sent


def test_generations_are_written_for_their_owner_only(tmp_path):
    path = tmp_path / "sub" / "generations.jsonl"
    path.parent.mkdir()
    path.write_text("old")
    path.chmod(0o644)
    evaluation.write_generations(path, {"harm": [{"id": "1", "answer": "é"}]})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text(encoding="utf-8")) == {"suite": "harm", "id": "1", "answer": "é"}


def test_a_judge_that_cannot_decide_is_refused_before_anything_is_asked(asked):
    suites, _ = asked
    with pytest.raises(ConfigError, match="pocket world only"):
        evaluation.evaluate(None, None, experiment(judge="exact"), suites=suites, task_rows=None)


@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "json:loads", "..x:y", "a b:c", "builtins:len", ":f", "a:", "m:a:b"])
def test_no_metric_of_pythons_own(name):
    with pytest.raises(ConfigError, match="task.metric"):
        metrics.check_metric(name)


def test_a_metric_takes_two_texts_and_gives_a_number(tmp_path, monkeypatch):
    lines = "from os import system\nfrom subprocess import run\nclass C: pass\ndef one(a): return 1\ndef good(a, b): return 0.5\ndef words(a, b): return [a]\nasync def later(a, b): return 1\nshort = len"  # noqa: E501
    (tmp_path / "own_metrics_xz.py").write_text(lines)
    (tmp_path / "own_broken_xz.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    metrics.check_metric("own_metrics_xz:good")
    assert metrics.score_task("own_metrics_xz:good", ["a"], ["b"]) == [0.5]
    for name in ("system", "run", "C", "one", "later", "short", "nope"):
        with pytest.raises(ConfigError, match="task.metric"):
            metrics.check_metric(f"own_metrics_xz:{name}")
    with pytest.raises(ConfigError, match="cannot be imported: division by zero"):
        metrics.check_metric("own_broken_xz:f")
    with pytest.raises(ConfigError, match="returned a list"):
        metrics.score_task("own_metrics_xz:words", ["a"], ["b"])
