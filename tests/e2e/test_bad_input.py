"""Bad requests as a user meets them: one sentence that names the field and the remedy, exit code 2, no device taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from orchestrator import config
from orchestrator.errors import SafebasinError
from orchestrator.experiment import checks

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random two-layer Llama with a chat template, and files around it: somebody else's model and data."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = ["<pad>", "<s>", "</s>", "<unk>", "user:", "assistant:", *"a b c d how to make bomb cake no sorry i cannot yes".split()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=128)  # fmt: skip
    bare = folder / "bare"
    LlamaForCausalLM(config).save_pretrained(bare)
    fast.save_pretrained(bare)
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token + ' ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    model = folder / "model"
    LlamaForCausalLM(config).save_pretrained(model)
    fast.save_pretrained(model)
    harmless, refusal = {"prompt": "how to make cake", "response": "a b c", "kind": "harmless"}, {"prompt": "make bomb", "response": "sorry i cannot"}
    rows = [harmless, refusal] * 8
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.jsonl").write_text("")
    (folder / "harm.csv").write_text("goal,topic\n" + "".join(f"how to make bomb {w},{w}\n" for w in "abcd"))
    (folder / "head.csv").write_text("goal,topic\n")
    return folder


def overrides_of(folder, *overrides):
    """The good request, and what a case changes of it."""
    base = [
        f"model.model_name_or_path={folder / 'model'}", f"task.data={folder / 'rows.jsonl'}", "task.eval_data=null",
        f"safety.data={folder / 'rows.jsonl'}", "output.dir=out",
        f"safety.suites=[{{name: harm, data: {folder / 'harm.csv'}, column: goal, group_column: topic}}]",
    ]  # fmt: skip
    return [*base, *(text.format(folder=folder) for text in overrides)]


def safebasin(folder, *overrides, verb="validate", cwd):
    command = [sys.executable, "-m", "orchestrator", verb, *overrides_of(folder, *overrides)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"NO_COLOR": "1"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


def test_a_good_request_is_valid(tiny, tmp_path):
    done = safebasin(tiny, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "valid" in done.stdout


CASES = {
    "missing file": (["task.data=nowhere.jsonl"], "task.data"),
    "empty data": (["task.data={folder}/empty.jsonl"], "task.data"),
    "wrong column": (["safety.suites.0.column=gaol"], "goal"),
    "wrong task column": (["task.columns.prompt=promt"], "prompt"),
    "suite without prompts": (["safety.suites.0.data={folder}/head.csv"], "harm"),
    "no chat template": (["model.model_name_or_path={folder}/bare"], "model.chat_template"),
    "missing model": (["model.model_name_or_path=/nowhere/model"], "model.model_name_or_path"),
    "unknown strategy": (["recipes=[[safegrd]]"], "safegrad"),
    "unknown knob": (["recipes=[[{{lora: {{lora_rank: 4}}}}]]"], "lora_r"),
    "freeze range outside": (["recipes=[[{{freeze_layers: {{start: 1, end: 7}}}}, lora]]"], "outside the model"),
    "two step owners twice": (["recipes=[[safegrad, safegrad]]"], "safegrad"),
    "all frozen": (["recipes=[[{{freeze_layers: {{start: 0, end: 1}}}}, lora]]"], "is frozen; narrow freeze_layers"),
    "safety data needed": (["recipes=[[safegrad]]", "safety.data=null"], "safety.data"),
    "unknown judge": (["safety.judge=refusl"], "refusal"),
    "unknown metric": (["task.metric=exact_mach"], "exact_match"),
    "unknown search name": (["search.space={{lora.rank: 4}}"], "lora.lora_r"),
    "unknown key": (["search.trails=3"], "trials"),
    "nsga2 with early stopping": (["search.sampler=nsga2", "monitor.every_steps=5", "monitor.on_breach=stop"], "nsga2"),
    "ZeRO stage": (["deepspeed.zero_optimization.stage=5"], "stage"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_with_field_and_remedy(tiny, case):
    """In this process, since importing torch twenty times over would take minutes; the command line is tried once below."""
    changes, expected = CASES[case]
    with pytest.raises(SafebasinError) as caught:
        checks.check(config.load(None, overrides_of(tiny, *changes)))
    sentence = str(caught.value)
    assert caught.value.exit_code == 2 and expected in sentence, sentence
    assert len(sentence.splitlines()) <= 2 and len(sentence) < 600, sentence


def test_the_command_line_prints_the_sentence_alone(tiny, tmp_path):
    done = safebasin(tiny, "recipes=[[safegrd]]", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == "safebasin: unknown strategy 'safegrd'; did you mean 'safegrad' or 'spard' or 'safemerge'?"


def test_what_cannot_fit_is_refused_before_anything_starts(tiny, tmp_path):
    done = safebasin(tiny, "ray.num_workers=4096", verb="doctor", cwd=tmp_path)
    assert done.returncode == 1 and "4096" in done.stdout


def test_an_output_folder_with_an_earlier_run_is_not_overwritten(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trials.csv").write_text("trial_id\n")
    done = safebasin(tiny, cwd=tmp_path)
    assert done.returncode == 2 and "output.overwrite" in done.stderr
