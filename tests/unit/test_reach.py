"""What `apply` cannot reach is measured and said: norms by hand, of adapters and whole models, tied and untied."""

from __future__ import annotations

import copy
import io
import json
import sys
from pathlib import Path

import peft
import pytest
import tiny_llama
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "families"))
import tiny

from orchestrator.config import Model
from orchestrator.models import saving, weights
from orchestrator.records import TrialResult
from orchestrator.trial import reach
from orchestrator.verbs import apply
from strategies import blocks, matrices, merging, recipe
from strategies.base import Strategy, TrainingData

CASES = {
    "plain": ({"target_modules": ["q_proj"]}, set()),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, {"lm_head.weight"}),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, {"model.embed_tokens.weight"}),
    "saved": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]}, {"lm_head.weight", "model.norm.weight"}),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 7]}}, {"model.embed_tokens.weight"}),
}


class Everything(Strategy):
    """Reaches every matrix of the decoder blocks."""

    Config = type("Config", (), {})

    def reaches(self, update):
        return update.is_matrix


def trained(config, tie=False):
    wrapped = peft.get_peft_model(tiny_llama.model(tie=tie), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("options", "names"), CASES.values(), ids=CASES.keys())
def test_norms_outside_the_blocks_are_those_of_the_merged_weights(options, names):
    aligned = dict(tiny_llama.model(tie=False).named_parameters())
    wrapped = trained(peft.LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", **options))
    plain = dict(merging.merged(copy.deepcopy(wrapped)).named_parameters())
    found = reach.outside_parts(wrapped, aligned)
    assert set(found) == names
    for name, part in found.items():
        assert part.norm == pytest.approx(float((plain[name] - aligned[name]).detach().double().norm()), rel=1e-4)
    left = reach.of(wrapped, aligned, Everything())
    moved = {n: float((plain[n] - aligned[n]).detach().double().norm()) ** 2 for n in plain}
    assert left.share == pytest.approx(sum(moved[n] for n in names) / sum(moved.values()), rel=1e-4)
    assert left.warns == (left.share > 0.1) and bool(left.sentence("x")) == bool(names)


def test_a_whole_model_with_a_head_of_its_own_is_held_against_the_embedding_it_shared():
    start = tiny_llama.model()
    aligned, tuned = dict(start.named_parameters()), copy.deepcopy(start)
    merging.untie(tuned)
    with torch.no_grad():
        tuned.lm_head.weight[0] += 1
        tuned.model.layers[0].mlp.up_proj.weight[0] += 1
        tuned.model.layers[0].input_layernorm.weight += 1
    found = reach.outside_parts(tuned, aligned)
    assert list(found) == ["lm_head.weight"] and found["lm_head.weight"].norm == pytest.approx(32**0.5)
    left = reach.of(tuned, aligned, Everything())
    assert {part.name: part.kind for part in left.parts} == {"lm_head.weight": "head", "model.layers.0.input_layernorm.weight": "norm"}
    assert left.share == pytest.approx(64 / 96)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    where = tmp_path_factory.mktemp("reach")
    tiny_llama.saved(where / "aligned", tie=False)
    tiny_llama.saved(where / "unaligned", seed=1, tie=False)
    tiny_llama.saved(where / "mute", template=None)
    return where


def applied(places, adapter, output):
    out = Console(file=io.StringIO(), width=300)
    request = apply.Request(
        "safe_lora", str(adapter), str(places / "aligned"), output, knobs=("number=2",), unaligned=str(places / "unaligned"),
    )  # fmt: skip
    return apply.run(request, out), " ".join(out.file.getvalue().split())


def test_apply_prints_and_records_what_it_does_not_change_and_keeps_it(places, tmp_path):
    saving.save(trained(peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")),
                tiny_llama.tokenizer(), tmp_path / "a")  # fmt: skip
    made, printed = applied(places, tmp_path / "a", tmp_path / "out")
    assert "warning: " in printed and "in 1 tensor that safe_lora does not change: lm_head.weight (head)" in printed
    record = json.loads((tmp_path / "out" / "safebasin.json").read_text())
    assert record["untouched"]["share"] == made.untouched.share > 0.1 and record["untouched"]["parts"][0]["name"] == "lm_head.weight"
    base = Model(model_name_or_path=str(places / "aligned"))
    before, after = (saving.attach(p, base)[0].base_model.model.lm_head.modules_to_save["default"].weight for p in (tmp_path / "a", tmp_path / "out"))
    assert torch.equal(before, after)


@pytest.mark.parametrize("config", [
    peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    peft.LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
], ids=["dora", "loha"])  # fmt: skip
def test_adapters_that_are_no_plain_lora_are_merged_first_and_it_is_said(places, tmp_path, config):
    saving.save(trained(config), tiny_llama.tokenizer(), tmp_path / "a")
    made, printed = applied(places, tmp_path / "a", tmp_path / "out")
    assert "was merged first" in printed and made.changed == 2 and not made.untouched.parts
    assert set(weights.FolderWeights(tmp_path / "out")) == set(weights.FolderWeights(places / "aligned"))


def test_an_aligned_model_without_a_template_is_accepted_with_an_adapter_that_brings_one(places, tmp_path):
    from rich.console import Console as Quiet

    tiny_llama.saved(tmp_path / "unaligned", seed=1)
    saving.save(trained(peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), tie=True), tiny_llama.tokenizer(), tmp_path / "a")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "make a red bomb", "response": "sorry i cannot help"}\n')
    request = apply.Request(
        "safemerge", str(tmp_path / "a"), str(places / "mute"), tmp_path / "out", knobs=("safe_steps=2", "safe_rank=2", "threshold=1"),
        unaligned=str(tmp_path / "unaligned"), safety=str(tmp_path / "rows.jsonl"),
    )  # fmt: skip
    made = apply.run(request, Quiet(file=io.StringIO(), width=100))
    assert made.asked["template_of"] == "adapter" and made.changed
    words = saving.attach(tmp_path / "out", Model(model_name_or_path=str(places / "mute")))[1]
    assert words.chat_template == tiny_llama.TEMPLATE


def mixture(seed=0):
    with torch.random.fork_rng(devices=[]):
        return tiny.model("qwen3_moe", seed)


def moved(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def test_of_a_mixture_the_experts_are_reached_and_what_is_not_is_a_fact():
    aligned, unaligned = (weights.of_module(mixture(seed)) for seed in (0, 1))
    model = moved(mixture())
    made = recipe.build([("safe_lora", {}), ("enchtable", {"beta": 0})])
    made.prepare_data(TrainingData((), (), 0, 1, weights={"aligned": aligned, "unaligned": unaligned}))
    told = reach.before_finish(model, made)
    norms = {n: float((p - aligned[n]).detach().double().norm()) ** 2 for n, p in model.named_parameters()}
    inside, known = blocks.of(model), matrices.stored(model)
    out_of_reach = {n for n in norms if not inside.holds(n) or n not in known}
    assert told["safe_lora"]["tensors"] == len(out_of_reach) and not any("expert" in n for n in out_of_reach)
    assert told["safe_lora"]["share"] == pytest.approx(sum(norms[n] for n in out_of_reach) / sum(norms.values()), rel=1e-4)
    assert told["enchtable"]["share"] == 1.0  # nothing was trained on the side
    result = TrialResult(trial_id="t", recipe="safe_lora", params={}, seed=0, phase="search", state="complete", facts={"untouched": told})
    alerts = reach.alerts([result])
    assert any(alert.startswith("100.0% of the update (of its squared norm) lies in ") and "enchtable does not change" in alert for alert in alerts)
    assert json.loads(json.dumps(told)) == told


def test_methods_that_move_all_that_training_moved_leave_nothing_out():
    made = recipe.build([("one_shot_patch", {})])
    made.strategies[0].take_rows(TrainingData((), (), 0, 1, weights={"aligned": weights.of_module(mixture())}))
    assert reach.before_finish(moved(mixture()), made) == {"one_shot_patch": {"share": 0.0, "tensors": 0, "largest": []}}


@pytest.mark.parametrize("left", [5, {}, {"share": "a", "tensors": 1, "largest": []}, {"share": 0.5, "tensors": 1, "largest": [{"name": "a"}]}])
def test_a_damaged_record_of_it_is_none(left):
    assert not reach.told(left) and reach.told({"share": 0.5, "tensors": 1, "largest": [{"name": "a", "kind": "norm", "norm": 1.0}]})
