"""Suites of the literature by name: resolved to a local copy or to the hub, with licence and hash; sets and lists of attacks unfold."""

from __future__ import annotations

import json

import pytest

from orchestrator import config
from orchestrator.config import catalogue
from orchestrator.errors import ConfigError, DataError
from orchestrator.evaluation.attacks import ATTACKS
from orchestrator.evaluation.judges import choice
from orchestrator.evaluation.suites import first_turn, load_suite

ASKED_FOR = (
    "AdvBench", "HarmBench", "StrongREJECT", "JailbreakBench", "MaliciousInstruct", "DirectHarm4", "XSTest", "OR-Bench",
    "LLM-LAT/harmful-dataset", "LLM-LAT/benign-dataset", "BeaverTails", "SALAD-Bench", "SafetyBench", "SafeBench",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder that SAFEBASIN_DATA names; nothing else of this machine is looked at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAFEBASIN_DATA", str(tmp_path / "data sets"))
    (tmp_path / "data sets" / "harmful").mkdir(parents=True)
    return tmp_path / "data sets"


@pytest.fixture
def hub(monkeypatch):
    """The `datasets` library answering from a table; keeps what it was asked."""
    import datasets

    asked, rows = [], [{"prompt": "a", "category": "x"}, {"prompt": "b", "category": "y"}]

    def load_dataset(name, configuration=None, *, split, **more):
        asked.append((name, configuration, split, more))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked, rows


@pytest.mark.parametrize("name", ASKED_FOR)
def test_every_suite_has_what_is_needed(name):
    entry = catalogue.entry(name)
    assert entry.hub.count("/") == 1 and entry.split and entry.licence and entry.rows > 0 and entry.source and entry.kind
    suite = config.Suite(name="s", data=name)
    assert suite.kind == entry.kind and suite.constrains is (entry.kind != "choice")


def test_names_are_distinct_and_files_are_not():
    names = [catalogue.squash(e.name) for e in catalogue.ENTRIES]
    assert len(set(names)) == len(names) and not set(names) & set(catalogue._SETS) and catalogue.entry("nosuch") is None
    assert all(catalogue.entry(name) or catalogue.members(name) for name in catalogue.ALIASES)
    assert catalogue.entry("data/advbench.csv") is None


def test_a_local_copy_goes_before_the_hub(folder, hub):
    (folder / "harmful" / "harmful_behaviors.csv").write_text("goal,target\nmake tea,Sure\nmake soup,Sure\nMake  tea,Sure\n")
    suite = load_suite(config.Suite(name="s", data="advbench"))
    assert suite.prompts == ("make tea", "make soup") and hub[0] == []
    assert suite.source == {"data": "advbench", "file": "harmful_behaviors.csv", "licence": "MIT", "sha256": suite.hash, "duplicates": 1}


def test_without_one_the_hub_is_asked(folder, hub):
    suite = load_suite(config.Suite(name="s", data="OR-Bench"))
    assert hub[0] == [("bench-llm/or-bench", "or-bench-hard-1k", "train", {})] and suite.groups == ("x", "y") and suite.kind == "benign"
    assert suite.source["hub"] == "bench-llm/or-bench:or-bench-hard-1k" and suite.source["licence"] == "CC-BY-4.0"
    hub[1][:] = [{"transcript": "\n\nHuman: how?\n\nAssistant: so.\n\nHuman: more"}]
    assert load_suite(config.Suite(name="s", data="anthropic_red_team")).prompts == ("how?",)
    assert hub[0][1] == ("Anthropic/hh-rlhf", None, "train", {"data_dir": "red-team-attempts"})


def test_neither_says_what_to_do(folder, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(DataError, match=r"safety\.suites\.s\.data.*no network.*advbench_harmful_behaviors\.csv.*SAFEBASIN_DATA.*HF_TOKEN"):
        load_suite(config.Suite(name="s", data="advbench"))


def test_halves_of_a_file_are_told_by_its_label(folder):
    rows = "id,prompt,type,label\n" + "".join(f"{i},p{i},t{i % 2},{'safe' if i < 3 else 'unsafe'}\n" for i in range(5))
    (folder / "xstest_prompts.csv").write_text(rows)
    safe, unsafe = (load_suite(config.Suite(name="s", data=name)) for name in ("xstest", "xstest_unsafe"))
    assert (safe.kind, safe.prompts, safe.groups) == ("benign", ("p0", "p1", "p2"), ("t0", "t1", "t0"))
    assert (unsafe.kind, unsafe.ids) == ("harmful", ("3", "4"))


def test_a_copy_beside_the_config_is_found_and_carried(tmp_path, monkeypatch):
    monkeypatch.delenv("SAFEBASIN_DATA", raising=False)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "strongreject_dataset.csv").write_text("category,forbidden_prompt\nc,make tea\n")
    (tmp_path / "run.yaml").write_text("safety:\n  suites:\n    - {name: s, data: strongreject}\n")
    (suite,) = config.load(tmp_path / "run.yaml").safety.suites
    assert suite.local == str(tmp_path / "data" / "strongreject_dataset.csv")
    assert load_suite(suite).groups == ("c",) and load_suite(config.from_dict({"safety": {"suites": [suite.model_dump()]}}).safety.suites[0])


def test_sets_and_lists_of_attacks_unfold():
    raw = {"suites": [{"name": "helm", "data": "HELM Safety", "limit": 5}, {"name": "a", "data": "x.txt", "attack": ["direct", "prefill"]}]}
    safety = config.from_dict({"safety": raw}).safety
    assert [s.name for s in safety.suites] == [f"helm-{m}" for m in catalogue.SETS["helm_safety"]] + ["a", "a-prefill"]
    assert {s.name: s.kind for s in safety.suites}["helm-bbq"] == "choice" and all(s.limit == 5 for s in safety.suites[:5])
    assert [s.attack for s in safety.suites[-2:]] == ["direct", "prefill"]
    assert config.from_dict({"safety": json.loads(safety.model_dump_json())}).safety == safety
    with pytest.raises(ConfigError, match="measured only"):
        config.from_dict({"safety": {"suites": [{"name": "c", "data": "safetybench", "constrains": True}]}})


def test_multiple_choice(tmp_path):
    rows = [
        {"question": "Safe?", "options": ["no", "yes"], "answer": 1},
        {"question": "Which?", "context": "Two came.", "ans0": "he", "ans1": "she", "label": "A"},
        {"question": "What?", "choices": '["tea", "soup"]', "answer": "tea"},
    ]  # fmt: skip
    path = tmp_path / "mc.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = load_suite(config.Suite(name="s", data=str(path), kind="choice", constrains=False))
    assert suite.right == ("B", "A", "A") and suite.prompts[1].startswith("Two came.\nWhich?\nA) he\nB) she\n")
    judge = choice.ChoiceJudge(dict(zip(suite.prompts, suite.right, strict=True)))
    said = {"B": True, "b) yes": True, "The answer is B.": True, "A": False, "(A) no": False, "Answer: B": True}
    for answer, right in said.items():
        assert judge.judge(suite.prompts[:1], [answer])[0].unsafe is not right, answer
    for answer in ("", "A good question", "perhaps", "Both are"):
        verdict = judge.judge(suite.prompts[:1], [answer])[0]
        assert verdict.unsafe and not verdict.parse_ok, answer
    for broken in ({"question": "q", "options": ["a"]}, {"question": "q", "options": ["a", "b"], "answer": "c?"}):
        with pytest.raises(DataError, match="row 1"):
            choice.prepared([broken], "question", "f")


def test_safetybench_is_read_as_it_is_published(tmp_path):
    """`dev_en.json`: rows by category, the answer a number from 0."""
    row = {"question": "Is it fine?", "options": ["No", "Yes"], "answer": 1, "id": 0}
    (tmp_path / "dev_en.json").write_text(json.dumps({"Ethics": [row], "Privacy": [{**row, "question": "And this?", "answer": 0}]}))
    found = load_suite(config.Suite(name="s", data="safetybench", local=str(tmp_path / "dev_en.json")))
    assert found.right == ("B", "A") and found.groups == ("Ethics", "Privacy") and found.kind == "choice"


def test_transcripts_and_attacks():
    assert first_turn("Human: a\nb\n\nAssistant: c") == "a\nb" and first_turn("no transcript") == "no transcript" and first_turn("Human: x") == "x"
    for name, attack in ATTACKS.items():
        framed = attack("make tea", "be kind")
        assert "make tea" in framed.prompt and (attack.__doc__ or "").strip()
        assert framed.wrapped is (name in ("prefill", "many_shot", "template_mismatch"))


def test_the_list_says_what_is_at_hand(folder, capsys, monkeypatch):
    from orchestrator.verbs import listing

    monkeypatch.setenv("COLUMNS", "240")
    (folder / "advbench.csv").write_text("goal\nx\n")
    listing.show("suites")
    shown = capsys.readouterr().out.splitlines()
    lines = {line.split()[0]: (line, below) for line, below in zip(shown, [*shown[1:], ""], strict=True) if line.strip()}
    assert " offline " in lines["advbench"][0] and lines["advbench"][1].strip() == str(folder / "advbench.csv")
    assert " hub, account " in lines["strongreject"][0] and lines["strongreject"][1].strip() == "walledai/StrongREJECT"
    lines = {name: line for name, (line, _) in lines.items()}
    assert "salad_bench" in lines["safebench"]
    assert "set" in lines["helm_safety"] and "built in" in lines["pocket:harmful"]
