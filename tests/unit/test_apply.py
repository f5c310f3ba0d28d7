"""`safebasin apply` on tiny checkpoints on disk: whole models and adapters, what is written, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny_llama
import torch
from rich.console import Console
from typer.testing import CliRunner

from orchestrator import cli
from orchestrator.config import Model
from orchestrator.errors import ConfigError, DataError, ModelError, UnknownNameError
from orchestrator.models import loading, saving
from orchestrator.verbs import apply
from strategies import lora, lssf, safe_lora

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "families"))
import tiny


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """aligned, unaligned, tuned (whole), adapter, shorter (another form) and data files."""
    from peft import LoraConfig, get_peft_model

    where = tmp_path_factory.mktemp("apply")
    tiny_llama.saved(where / "aligned", seed=0)
    tiny_llama.saved(where / "unaligned", seed=1)
    tiny_llama.saved(where / "shorter", seed=0, layers=2)
    generator = torch.Generator().manual_seed(2)
    tuned = tiny_llama.model(0)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "layers.1" not in name:  # layer 1 was frozen
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
    tuned.save_pretrained(where / "tuned")
    tiny_llama.tokenizer().save_pretrained(where / "tuned")
    wrapped = get_peft_model(tiny_llama.model(0), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    wrapped.save_pretrained(where / "adapter")
    safety = [{"prompt": f"make a {w} bomb", "response": "sorry i cannot help", "rejected": f"mix the {w}"} for w in ("red", "green", "blue")]
    (where / "safety.jsonl").write_text("".join(json.dumps(row) + "\n" for row in safety))
    (where / "plain.jsonl").write_text("".join(json.dumps({k: r[k] for k in ("prompt", "response")}) + "\n" for r in safety))
    return where


def request(places, output, strategy="safe_lora", model="tuned", knobs=("number=5",), **more):
    options = {"aligned": str(places / "aligned"), "unaligned": str(places / "unaligned")} | more
    return apply.Request(strategy, str(places / model), output=output, knobs=knobs, **options)


def weights(path):
    return dict(loading.load(Model(model_name_or_path=str(path)))[0].named_parameters())


def quiet():
    return Console(file=open("/dev/null", "w"), width=120)  # noqa: SIM115


def test_a_whole_model_is_projected_saved_and_recorded(places, tmp_path):
    applied = apply.run(request(places, tmp_path / "out"), quiet())
    start, unaligned, tuned, made = (weights(p) for p in (places / "aligned", places / "unaligned", places / "tuned", tmp_path / "out"))
    changed = {name for name, module in applied.modules.items() if module["changed"]}
    assert len(changed) == applied.facts["projected"] == 5
    for name, weight in made.items():
        if name in changed:
            expected = start[name] + safe_lora.project(tuned[name] - start[name], start[name], unaligned[name])
            torch.testing.assert_close(weight, expected, atol=1e-5, rtol=1e-4)
        else:
            assert torch.equal(weight, tuned[name])
    record = json.loads((tmp_path / "out" / "safebasin.json").read_text())
    assert record["strategy"] == "safe_lora" and record["changed"] == 5 and record["knobs"] == ["number=5"]
    one = next(iter(changed))
    assert record["modules"][one]["norm_before"] == pytest.approx(float((tuned[one] - start[one]).detach().norm()), rel=1e-4)
    assert record["modules"][one]["norm_after"] == pytest.approx(float((made[one] - start[one]).detach().norm()), rel=1e-4)


def test_an_adapter_stays_one_and_gives_what_the_whole_model_gives(places, tmp_path):
    knobs = ("alpha=0.5", "top=1")
    applied = apply.run(request(places, tmp_path / "out", "lssf", "adapter", knobs), quiet())
    assert (tmp_path / "out" / "adapter_config.json").is_file() and applied.changed == 6
    base = Model(model_name_or_path=str(places / "aligned"))
    before, after = (dict(saving.attach(p, base)[0].merge_and_unload().named_parameters()) for p in (places / "adapter", tmp_path / "out"))
    start, unaligned = weights(places / "aligned"), weights(places / "unaligned")
    for name, weight in after.items():
        adapted = "q_proj" in name or "up_proj" in name
        expected = lssf.restore(before[name], start[name], unaligned[name], alpha=0.5, top=1.0) if adapted else start[name]
        torch.testing.assert_close(weight, expected, atol=1e-5, rtol=1e-4)


def test_a_side_training_runs_on_the_aligned_model(places, tmp_path):
    knobs = ("gamma=1", "drop=0", "harmful_steps=2", "harmful_rank=2")
    options = {"unaligned": None, "safety": str(places / "safety.jsonl")}
    applied = apply.run(request(places, tmp_path / "out", "resta", "tuned", knobs, **options), quiet())
    assert applied.facts["merged"] == 14 and applied.facts["added_norm"] > 0  # seven matrices of the two layers that were tuned
    tuned, made = weights(places / "tuned"), weights(tmp_path / "out")
    assert all(torch.equal(made[n], tuned[n]) for n in made if "layers.1" in n or "norm" in n)


@pytest.mark.parametrize(("changes", "error", "said"), [
    ({"strategy": "safelora"}, UnknownNameError, "did you mean 'safe_lora'"),
    ({"strategy": "safegrad"}, ConfigError, "acts in training.*safe_lora"),
    ({"strategy": "perturbation"}, ConfigError, "acts at inference"),
    ({"knobs": ("numbr=3",)}, ConfigError, "knob of safe_lora 'numbr'.*number"),
    ({"knobs": ("number",)}, ConfigError, "write knob=value"),
    ({"knobs": ("number=many",)}, ConfigError, "number='many'"),
    ({"unaligned": None}, ConfigError, "--unaligned BASE0"),
    ({"strategy": "safemerge", "knobs": ()}, ConfigError, "--safety FILE"),
    ({"strategy": "resta", "knobs": ()}, ConfigError, "--harmful FILE"),
    ({"model": "shorter"}, ModelError, "num_hidden_layers 2.*has 3.*one architecture"),
    ({"model": "aligned"}, ConfigError, "nothing to change"),
    ({"model": "nowhere"}, ModelError, "does not exist"),
])  # fmt: skip
def test_nonsense_is_refused_in_a_sentence_before_anything_is_written(places, tmp_path, changes, error, said):
    with pytest.raises(error, match=said):
        apply.run(request(places, tmp_path / "out", **changes), quiet())
    assert not (tmp_path / "out").exists()


def test_a_safety_file_without_harmful_answers_is_refused(places, tmp_path):
    with pytest.raises((ConfigError, DataError), match="harmful"):
        apply.run(request(places, tmp_path / "out", "resta", knobs=(), safety=str(places / "plain.jsonl")), quiet())


def test_an_output_that_exists_is_left_alone(places, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        apply.run(request(places, tmp_path), quiet())
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command_prints_layers_norms_and_where_it_wrote(places, tmp_path):
    arguments = ["apply", "safe_lora", "number=4", "--model", str(places / "tuned"), "--aligned", str(places / "aligned")]
    arguments += ["--unaligned", str(places / "unaligned"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "norm before" in result.output and "projected 4" in result.output and (tmp_path / "out" / "model.safetensors").is_file()
    last = [line.split() for line in result.output.splitlines() if line.strip().startswith("all")][0]
    assert last[2] == "4"


def test_a_setting_that_changes_nothing_says_so(places, tmp_path):
    arguments = ["apply", "safe_lora", "number=0", "--model", str(places / "tuned"), "--aligned", str(places / "aligned")]
    arguments += ["--unaligned", str(places / "unaligned"), "--output", str(tmp_path / "out")]
    assert "no weight was changed" in CliRunner().invoke(cli.app, arguments).output
    assert Path(tmp_path / "out").is_dir()


@pytest.mark.parametrize("form", ["whole", "adapter"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt2"])
def test_files_with_other_names_than_the_loaded_model(family, form, tmp_path):
    """Experts lie in most files one by one; the hub's GPT-2 was saved without its head."""
    from safetensors.torch import load_file, save_file

    for name, seed in (("aligned", 0), ("unaligned", 1)):
        path = tiny.saved(tmp_path / name, family, seed=seed) / "model.safetensors"
        tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    tuned = loading.network(Model(model_name_or_path=str(tmp_path / "aligned")))
    generator = torch.Generator().manual_seed(2)
    if form == "adapter":
        tuned = lora.Lora(lora.Lora.Config(lora_r=2)).setup(tuned)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if form == "whole" or "lora_B" in name:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    saving.save(tuned, tiny.tokenizer(), tmp_path / "tuned")
    where = {key: str(tmp_path / key) for key in ("aligned", "unaligned")}
    knobs = ("select=threshold", "threshold=1")
    made = apply.run(apply.Request("safe_lora", str(tmp_path / "tuned"), output=tmp_path / "out", knobs=knobs, **where), quiet())
    changed = {name for name, module in made.modules.items() if module["changed"]}
    assert changed and (family != "qwen3_moe" or any("experts.down_proj[3]" in name for name in changed))
    assert made.untouched.share < 0.5 and (tmp_path / "out" / "safebasin.json").is_file()
    saving.attach(tmp_path / "out", Model(model_name_or_path=where["aligned"]))
