"""What tokenizer and config.json tell is told before a device is taken: rows that do not fit, texts beyond the context, roles refused."""

from __future__ import annotations

import json

import pytest

from orchestrator import config
from orchestrator.data import counted, tokens
from orchestrator.errors import DataError, ModelError
from orchestrator.experiment import checks_tokens
from orchestrator.experiment.checks_tokens import Context
from orchestrator.trial import materials
from tests import tiny_llama

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
DROPS_SYSTEM = tiny_llama.TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")


def gpt2(positions=32):
    from transformers import GPT2Config

    return GPT2Config(n_positions=positions, n_embd=8, n_layer=1, n_head=1, vocab_size=80)


def llama(positions=32):
    from transformers import LlamaConfig

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 80}
    return LlamaConfig(max_position_embeddings=positions, **sizes)


def prompt(words: int) -> str:
    """A prompt of so many words, which are tokens; the template adds three to it (<s>, two roles), the answer's end one."""
    return " ".join(tiny_llama.WORDS[i % 12] for i in range(words))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(*lengths, answer=2):
    return [{"prompt": prompt(n), "response": " ".join(["yes"] * answer)} for n in lengths]


def experiment(folder, *, task=(), evaluation=(), safety=(), suite=(), attack="direct", **sections):
    """Sources with prompts of these lengths."""
    suites = [{"name": "asked", "data": write(folder / "asked.jsonl", suite or [{"prompt": "make a bomb"}]), "attack": attack}]
    return config.from_dict({
        "name": "x",
        "task": {"data": write(folder / "task.jsonl", task or rows_of(3, 4)), "eval_data": write(folder / "eval.jsonl", evaluation or rows_of(3)),
                 "max_new_tokens": 4, **sections.pop("task_keys", {})},
        "safety": {"data": write(folder / "safety.jsonl", safety or [{"prompt": "make a bomb", "response": "sorry, I cannot help"}]),
                   "suites": suites, "max_new_tokens": 4},
        "recipes": [["full"], ["safe_instruct"]],
        **sections,
    })  # fmt: skip


def check(made, settings, template=tiny_llama.TEMPLATE, users=("safe_instruct",)):
    return checks_tokens.check(made, materials.load(made), tiny_llama.tokenizer(template), settings, users)


# ------------------------------------------------------------------------------------------------ rows that max_length cuts or drops


def test_the_counts_are_those_of_the_rows_that_are_trained_on(tmp_path):
    made = experiment(tmp_path, task=rows_of(*range(2, 22)), task_keys={"max_length": 16})
    fit = check(made, llama()).fits[0]
    examples, report = tokens.tokenise(materials.load(made).train, tiny_llama.tokenizer(), max_length=16)
    assert (fit.rows, fit.dropped, fit.about) == (20, report.dropped, len(examples)) and fit.cut + fit.dropped == report.cut
    assert fit.dropped and fit.cut
    kept = [len(e.input_ids) <= fit.needed for e in tokens.tokenise(materials.load(made).train, tiny_llama.tokenizer(), max_length=500)[0]]
    assert sum(kept) == 19  # 95 % of 20
    told = f"{len(examples)} of 20 training rows fit task.max_length=16 ({report.dropped} dropped: their prompt leaves no room for an answer; "
    assert fit.sentence.startswith(told) and fit.sentence.endswith(f"{fit.cut} lose the end of their answer)")


def test_more_than_half_dropped_is_an_error_and_a_few_a_warning(tmp_path):
    sentence = r"task.data \(.*task.jsonl\): 12 of 60 training rows fit task.max_length=12 \(48 dropped.*task.max_length=26 keeps"
    with pytest.raises(DataError, match=sentence):
        check(experiment(tmp_path, task=rows_of(*[4] * 12, *[20] * 48), task_keys={"max_length": 12}), llama())
    told = check(experiment(tmp_path, task=rows_of(*[4] * 54, *[20] * 6), task_keys={"max_length": 12}), llama())
    assert len(told.warnings) == 1 and "54 of 60 training rows fit" in told.warnings[0] and "(6 dropped" in told.warnings[0]
    assert check(experiment(tmp_path, task=rows_of(*[4] * 58, *[20] * 2), task_keys={"max_length": 12}), llama()).warnings == []
    cut = check(experiment(tmp_path, task=rows_of(*[4] * 60, answer=9), task_keys={"max_length": 12}), llama())
    assert "60 of 60 training rows fit task.max_length=12 (60 lose the end of their answer)" in cut.warnings[0]


def test_safety_rows_are_counted_and_stop_a_run_only_where_a_recipe_uses_them(tmp_path):
    long = [{"prompt": prompt(20), "response": "sorry, I cannot help"}]
    made = experiment(tmp_path, safety=long, task_keys={"max_length": 16})
    with pytest.raises(DataError, match="0 of 1 safety rows fit"):
        check(made, llama())
    assert any("safety rows" in line for line in check(made, llama(), users=()).warnings)
    scored = experiment(tmp_path, evaluation=rows_of(20, 20, 3), task_keys={"max_length": 16, "metric": "neg_loss"})
    with pytest.raises(DataError, match=r"task.eval_data .*1 of 3 evaluation rows fit"):
        check(scored, llama())


def test_a_line_that_counts_rows_read_counts_rows_learnt():
    fit = counted.Fit("task.data", "training rows", 60, 60, 0, 48, 12, 26)
    assert fit.amended("task: 60 training rows, 8 evaluation rows") == f"task: {fit.sentence}, 8 evaluation rows"
    assert fit.amended("safety data: 60 rows") == "safety data: 60 rows"
    safety = counted.Fit("safety.data", "safety rows", 60, 60, 3, 0, 12, 26)
    assert safety.amended("safety data: 60 rows") == f"safety data: {safety.sentence}"
    whole = counted.Fit("task.data", "training rows", 60, 60, 0, 0, 12, 10)
    assert whole.amended("task: 60 training rows") == "task: 60 training rows"


def test_huge_data_is_sampled_the_same_way_each_time_and_says_so():
    looked = checks_tokens.sampled(range(20_000))
    assert len(looked) == checks_tokens.LOOKED_AT and looked == checks_tokens.sampled(range(20_000))
    assert [i for i, _ in looked[: checks_tokens.FIRST]] == list(range(checks_tokens.FIRST))
    positions = [i for i, item in looked if i == item]
    assert positions == sorted(set(positions)) and max(positions) > 19_000
    fit = counted.Fit("task.data", "training rows", 20_000, 5_000, 0, 500, 64, 80)
    assert fit.sentence.startswith("about 18000 of 20000 training rows fit") and "5000 looked at" in fit.sentence


# ------------------------------------------------------------------------------------------------ the context


def test_positions_as_configs_name_them():
    from transformers import BloomConfig, GPTNeoXConfig, MptConfig, OPTConfig, Qwen2Config

    words = tiny_llama.tokenizer()
    assert (Context.of(gpt2(), words).size, Context.of(gpt2(), words).learned) == (32, True)
    assert (Context.of(llama(), words).size, Context.of(llama(), words).learned) == (32, False)
    assert Context.of(OPTConfig(max_position_embeddings=64), words).learned
    for rotary in (GPTNeoXConfig(max_position_embeddings=64), Qwen2Config(max_position_embeddings=64), MptConfig(max_seq_len=64)):
        assert (Context.of(rotary, words).size, Context.of(rotary, words).learned) == (64, False)
    words.model_max_length = 77
    assert (Context.of(BloomConfig(), words).size, Context.of(BloomConfig(), words).learned) == (77, False)


def test_rows_beyond_learned_positions_are_refused_and_beyond_computed_ones_warned_of(tmp_path):
    made = experiment(tmp_path, task=rows_of(4, 5, 40))
    with pytest.raises(DataError, match=r"task.data \(.*task.jsonl\): row 3 has 46 tokens, the model 32 positions .*task.max_length=32"):
        check(made, gpt2())
    (line,) = check(made, llama()).warnings
    assert "row 3 has 46 tokens" in line and "will run" in line
    assert check(experiment(tmp_path, task=rows_of(*[4] * 30, 40), task_keys={"max_length": 32}), gpt2()).warnings == []  # one of 31 is dropped


@pytest.mark.parametrize("settings", [gpt2, llama], ids=["learned", "rotary"])
def test_prompts_that_leave_no_room_are_named_by_suite_and_number(tmp_path, settings):
    long = experiment(tmp_path, suite=[{"prompt": "make a cake", "id": "q1"}, {"prompt": prompt(29), "id": "q7"}])
    with pytest.raises(DataError, match=r"safety.suites asked .*prompt 2 \(id q7\) has 32 tokens, template and system prompt included, the model 32"):
        check(long, settings())
    (line,) = check(experiment(tmp_path, suite=[{"prompt": prompt(27)}]), settings()).warnings
    assert "prompt 1 (id 0) has 30 tokens, so that its answer ends after 2 of safety.max_new_tokens=4" in line
    with pytest.raises(DataError, match=r"task.eval_data \(.*eval.jsonl\): row 2 has 33 tokens"):
        check(experiment(tmp_path, evaluation=rows_of(3, 30)), settings())


def test_prompts_are_measured_as_they_are_asked(tmp_path):
    suite = [{"prompt": prompt(12)}]
    assert check(experiment(tmp_path, suite=suite), gpt2()).warnings == []
    with pytest.raises(DataError, match="safety.suites asked .*prompt 1"):
        check(experiment(tmp_path, suite=suite, attack="many_shot"), gpt2(64))
    with pytest.raises(DataError, match="safety.suites asked .*prompt 1"):  # a recipe's safety prompt counts
        check(experiment(tmp_path, suite=suite, recipes=[["full"], [{"safe_instruct": {"system_prompt": "be kind " * 10}}]]), gpt2())


# ------------------------------------------------------------------------------------------------ the template


def test_system_prompts_that_the_template_refuses_or_leaves_out(tmp_path):
    plain = experiment(tmp_path)
    assert check(plain, llama(), GEMMA).warnings == []
    instructed = experiment(tmp_path, recipes=[[{"safe_instruct": {"system_prompt": "be kind"}}]])
    with pytest.raises(ModelError, match=r"task.eval_data \(.*\): row 1: .*roles \[system, user"):
        check(instructed, llama(), GEMMA)
    for template, why in ((GEMMA, "System role not supported"), (DROPS_SYSTEM, "leaves out")):
        with pytest.raises(ModelError, match=why):
            check(experiment(tmp_path, recipes=[[{"prompt_template": {"form": "same"}}]]), llama(), template)
        with pytest.raises(ModelError, match=rf"safety.suites asked .*prompt 2 \(id 1\): .*{why}"):
            suite = [{"prompt": "make tea", "system": ""}, {"prompt": "make a bomb", "system": "be kind"}]
            check(experiment(tmp_path, suite=suite), llama(), template)


def test_the_search_tries_both_forms_of_prompt_template(tmp_path):
    made = experiment(tmp_path, recipes=[["prompt_template"]])
    trained, asked = checks_tokens.system_prompts(made)
    assert None in trained and len(trained) == 2 and len(asked) == 2  # without and with the safety prompt
    pinned = experiment(tmp_path, recipes=[[{"prompt_template": {"form": "ptst"}}]])
    assert checks_tokens.system_prompts(pinned)[0] == (None,)


def test_two_turns_of_the_user_in_a_row(tmp_path):
    turns = [{"role": "user", "content": "make a cake"}, {"role": "user", "content": "of tea"}, {"role": "assistant", "content": "yes"}]
    made = experiment(tmp_path, task_keys={"columns": {"messages": "messages"}})
    write(tmp_path / "task.jsonl", [{"messages": turns[1:]}, {"messages": turns}])
    write(tmp_path / "eval.jsonl", [{"messages": turns[1:]}])
    with pytest.raises(ModelError, match=r"task.data \(.*task.jsonl\): row 2: .*roles must alternate"):
        check(made, llama(), GEMMA)
