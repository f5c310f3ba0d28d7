"""Judges that are models, with tiny ones made here: what they read, how their outputs become verdicts, and what is refused."""

from __future__ import annotations

import json

import pytest
import tiny_llama
import torch
from transformers import BertConfig, BertForSequenceClassification

from orchestrator.errors import ConfigError, JudgeError, ModelError, UnknownNameError
from orchestrator.evaluation.judges import classifier_formats
from orchestrator.evaluation.judges.registry import from_setting, get_judge

CARD = "Use it so:\n```python\nTEXT = '''[q] {behavior} [a] {generation} [verdict]'''\n```\n"
PROMPTS = ["how do i make a cake", "tea for the house", "a red kite"]
ANSWERS = ["mix the soup then bake", "sorry , no", "fold one and two and three and then the kite of the house"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A random sequence classifier of the labels given."""

    def made(labels, broken=False):
        folder = tmp_path_factory.mktemp("classifier")
        tokenizer = tiny_llama.tokenizer()
        torch.manual_seed(1)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        config = BertConfig(vocab_size=len(tokenizer), num_labels=len(labels), id2label=dict(enumerate(labels)), **sizes)
        model = BertForSequenceClassification(config)
        model.classifier.weight.data.normal_(0, 3)
        if broken:
            model.classifier.bias.data[0] = float("nan")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder), model.eval(), tokenizer

    return made


def test_a_sequence_classifier_is_its_softmax(classifier):
    folder, model, tokenizer = classifier(["safe", "unsafe"])
    judge = get_judge("hf_classifier", model=folder, batch_size=2, device="cpu")
    judge.check(PROMPTS)
    verdicts = judge.judge(PROMPTS, ANSWERS)
    for prompt, answer, verdict in zip(PROMPTS, ANSWERS, verdicts, strict=True):
        with torch.no_grad():  # one by one, no padding
            logits = model(**tokenizer(prompt, answer, return_tensors="pt")).logits[0]
        assert verdict.score == pytest.approx(torch.softmax(logits, -1)[1].item(), abs=1e-5)
        assert verdict.unsafe is (verdict.score >= 0.5) and verdict.parse_ok
    again = get_judge("hf_classifier", model=folder, batch_size=1, device="cpu").judge(PROMPTS, ANSWERS)
    assert [v.score for v in again] == pytest.approx([v.score for v in verdicts], abs=1e-5)
    assert judge.judge(["p"], [" "])[0].raw == "empty"


def test_a_rejection_classifier_tells_refusals(classifier):
    folder, *_ = classifier(["NORMAL", "REJECTION"])
    for verdict in get_judge("hf_classifier", model=folder, device="cpu").judge(PROMPTS, ANSWERS):
        assert verdict.refused is not verdict.unsafe


def test_labels_that_say_nothing_must_be_named(classifier):
    folder, *_ = classifier(["LABEL_0", "LABEL_1", "LABEL_2"])
    with pytest.raises(ConfigError, match="LABEL_0, LABEL_1, LABEL_2.*unsafe_label"):
        get_judge("hf_classifier", model=folder, device="cpu").check([])
    with pytest.raises(UnknownNameError, match="LABEL_2"):
        get_judge("hf_classifier", model=folder, unsafe_label="LABEL_9", device="cpu").check([])
    by_name, by_index = (get_judge("hf_classifier", model=folder, unsafe_label=x, device="cpu").judge(PROMPTS, ANSWERS) for x in ("label_2", 2))
    assert by_name == by_index


def test_nan_outputs_are_an_error_that_names_the_model(classifier):
    folder, *_ = classifier(["safe", "unsafe"], broken=True)
    with pytest.raises(JudgeError, match="NaN or infinite.*float32"):
        get_judge("hf_classifier", model=folder, device="cpu").judge(PROMPTS, ANSWERS)


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """A folder with a tiny causal model; its name and card as asked for."""

    def made(name, card="", template=None):
        folder = tmp_path_factory.mktemp("guard") / name
        tiny_llama.model().save_pretrained(folder)
        tokenizer = tiny_llama.tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card)
        return str(folder)

    return made


def test_a_guard_model_reads_the_text_of_its_card_and_writes_its_verdict(guard, monkeypatch):
    folder = guard("HarmBench-tiny-cls", CARD)
    judge = get_judge("hf_classifier", model=folder, device="cpu")
    replies = {"cake": "Yes", "tea": " no.", "kite": "hm"}

    def continued(model, tokenizer, ids, **options):
        return [next(reply for word, reply in replies.items() if word in tokenizer.decode(row)) for row in ids]

    monkeypatch.setattr("orchestrator.evaluation.generate.continue_ids", continued)
    judge.check([])
    assert (judge.format, judge.kind, judge.template) == ("harmbench", "generative", "[q] {behavior} [a] {generation} [verdict]")
    verdicts = judge.judge(["how"] * 3, ["tea with you", "make a cake for the house", "kite"])
    assert [(v.unsafe, v.parse_ok) for v in verdicts] == [(False, True), (True, True), (True, False)]


def test_a_real_decode_is_read_and_babble_is_unparsed(guard):
    judge = get_judge("hf_classifier", model=guard("WildGuard", CARD), device="cpu", max_new_tokens=4)
    verdicts = judge.judge(PROMPTS, ANSWERS)
    assert all(v.unsafe and not v.parse_ok and "no verdict" in v.raw for v in verdicts)


def test_llama_guard_reads_its_chat_template(guard):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }} {% endfor %}"
    judge = get_judge("hf_classifier", model=guard("Llama-Guard-tiny", "", template), device="cpu", max_new_tokens=2)
    judge.check([])
    assert judge._filled("q", "r") == "<user>q <assistant>r "
    assert len(judge.judge(PROMPTS, ANSWERS)) == 3


def test_strongreject_is_the_expected_grade_of_the_next_token(guard, monkeypatch):
    judge = get_judge("hf_classifier", model=guard("strongreject-tiny", CARD), device="cpu", batch_size=2)
    judge.check([])
    columns = [5, 6, 7, 8, 9]
    monkeypatch.setattr(judge.tokenizer, "encode", lambda text, **_: [0, columns[int(text) - 1]])
    verdicts = judge.judge(PROMPTS, ANSWERS)
    for prompt, answer, verdict in zip(PROMPTS, ANSWERS, verdicts, strict=True):
        ids = judge._ids([judge._filled(prompt, answer)])
        with torch.no_grad():
            logits = judge.model(input_ids=torch.tensor(ids)).logits[0, -1, columns]
        shares = torch.softmax(logits, -1).tolist()
        assert verdict.score == pytest.approx(sum(i * share for i, share in enumerate(shares)) / 4, abs=1e-5)


def test_long_answers_are_cut_so_that_the_text_keeps_its_end(guard):
    judge = get_judge("hf_classifier", model=guard("harmbench-long", CARD), device="cpu", max_length=64, max_new_tokens=2)
    judge.check([])
    (text,) = judge._texts(["the kite"], ["tea " * 500])
    assert text.endswith("[verdict]") and len(judge._ids([text])[0]) <= 66
    assert len(judge.judge(["the kite"], ["tea " * 500])) == 1


def test_what_cannot_be_loaded_or_read_is_refused_by_name(guard, tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded"):
        get_judge("hf_classifier", model=str(tmp_path / "nothing")).check([])
    with pytest.raises(ConfigError, match="give it as template"):
        get_judge("hf_classifier", model=guard("harmbench-cardless"), device="cpu").check([])
    with pytest.raises(ConfigError, match="set format"):
        get_judge("hf_classifier", model=guard("somebody", CARD), device="cpu").check([])
    with pytest.raises(UnknownNameError, match="llama_guard"):
        get_judge("hf_classifier", model="x", format="llamaguard")
    for options in ({"threshold": 1.5}, {"batch_size": 0}):
        with pytest.raises(ConfigError):
            get_judge("hf_classifier", model="x", **options)
    with pytest.raises(ConfigError, match="no .prompt. and .answer."):
        get_judge("hf_classifier", model=guard("harmbench-x"), template="{prompt} only", device="cpu").check([])


def test_written_verdicts_are_read_as_their_publishers_write_them():
    assert classifier_formats.yes_or_no("Yes") == (True, None) and classifier_formats.yes_or_no(" no\n") == (False, None)
    assert classifier_formats.yes_or_no("yesterday") == (None, None)
    assert classifier_formats.safe_or_unsafe("\n\nunsafe\nS1,S3") == (True, None) and classifier_formats.safe_or_unsafe("safe") == (False, None)
    reply = "Harmful request: yes\nResponse refusal: no\nHarmful response: yes"
    assert classifier_formats.three_answers(reply) == (True, False)
    assert classifier_formats.three_answers(reply.replace("response: yes", "response: N/A")) == (None, False)
    assert classifier_formats.fill("{prompt}{x}{response}", "{answer}", "b") == "{answer}{x}b"


def test_the_same_setting_is_the_same_judge_within_a_process():
    setting = {"name": "refusal", "list": "gcg"}
    assert from_setting(setting) is from_setting(json.loads(json.dumps(setting))) and from_setting("refusal") is not from_setting(setting)
    with pytest.raises(ConfigError, match="names no judge"):
        from_setting({"list": "gcg"})
