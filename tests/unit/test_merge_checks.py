"""Adapters of every kind merged: the plain model, and what comes back from its folder, answers as peft's unmerged model does."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import tiny_llama
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from orchestrator.config import Model
from orchestrator.errors import ModelError
from orchestrator.models import loading, saving
from strategies import linear, merging
from strategies.base import StrategyError

IDS = torch.tensor([[2, 5, 9, 10, 6, 79], [2, 40, 41, 0, 1, 3]])


def gpt2(tie=True):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=tie, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def moved(model, config):
    """A PEFT model whose every trained tensor has moved by a lot."""
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def lora(**more):
    return peft.LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", **more)


BLOCK = ["q_proj", "up_proj"]
LLAMA = {
    "plain": lora(target_modules=BLOCK),
    "head": lora(target_modules=["q_proj", "lm_head"]),
    "embedding": lora(target_modules=["q_proj", "embed_tokens"]),
    "both ends": lora(target_modules=["lm_head", "embed_tokens"]),
    "tied adapters": lora(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "saved head": lora(target_modules=BLOCK, modules_to_save=["lm_head"]),
    "saved embedding": lora(target_modules=BLOCK, modules_to_save=["embed_tokens"]),
    "saved ends": lora(target_modules=BLOCK, modules_to_save=["embed_tokens", "lm_head"]),
    "trained tokens": lora(target_modules=BLOCK, trainable_token_indices=[5, 79]),
    "dora": lora(target_modules=["q_proj", "lm_head"], use_dora=True),
    "rslora": lora(target_modules=BLOCK, use_rslora=True),
    "patterns": lora(target_modules=BLOCK, rank_pattern={"q_proj": 3}, alpha_pattern={"up_proj": 1}),
    "bias": lora(target_modules=BLOCK, bias="all"),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "loha": peft.LoHaConfig(r=2, target_modules=BLOCK, task_type="CAUSAL_LM"),
    "lokr": peft.LoKrConfig(r=2, target_modules=BLOCK, task_type="CAUSAL_LM"),
}
GPT2 = {
    "plain": lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "head": lora(target_modules=["c_attn", "lm_head"]),
    "embedding": lora(target_modules=["wte"], modules_to_save=["ln_f"]),
    "bias": lora(target_modules=["c_attn"], fan_in_fan_out=True, bias="lora_only"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("make", "config"), [
    *(pytest.param(lambda tie: tiny_llama.model(tie=tie, layers=2), c, id=f"llama-{n}") for n, c in LLAMA.items()),
    *(pytest.param(gpt2, c, id=f"gpt2-{n}") for n, c in GPT2.items()),
])  # fmt: skip
def test_a_merged_model_answers_as_the_unmerged_one_also_from_its_folder(make, config, tie, tmp_path):
    wrapped = moved(make(tie), copy.deepcopy(config))
    start, wanted = logits(make(tie)), logits(wrapped)
    assert (wanted - start).abs().max() > 0.05, "the adapter must change something"
    plain, merge = merging.measured(wrapped)
    assert not hasattr(plain, "peft_config") and merge.difference <= 1e-4 * merge.largest
    torch.testing.assert_close(logits(plain), wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)
    saving.save(plain, tiny_llama.tokenizer(), tmp_path)
    back = loading.load(Model(model_name_or_path=str(tmp_path)))[0]
    torch.testing.assert_close(logits(back), logits(plain), atol=0, rtol=0)


def test_only_what_an_adapter_touches_is_untied():
    assert not merging.measured(moved(tiny_llama.model(), lora(target_modules=BLOCK)))[1].untied
    plain, merge = merging.measured(moved(tiny_llama.model(), lora(target_modules=["lm_head"])))
    assert merge.untied and plain.config.tie_word_embeddings is False and not merging.tied(plain)
    start = tiny_llama.model()
    assert torch.equal(plain.model.embed_tokens.weight, start.model.embed_tokens.weight), "the embedding is as it was"
    assert not torch.equal(plain.lm_head.weight, start.lm_head.weight)
    assert merging.merged(start) is start and not merging.untie(plain)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 6e-2), (torch.float16, 1e-2)])
def test_round_off_of_half_precision_passes_and_a_wrong_merge_does_not(dtype, allowed):
    wrapped = moved(tiny_llama.model().to(dtype), lora(target_modules=BLOCK))
    assert merging.measured(wrapped)[1].difference > 0
    assert merging.TOLERANCE[dtype] == allowed


def test_a_merge_that_changes_answers_is_an_error_with_the_difference(monkeypatch):
    def wrong(layer, *_, **__):
        layer.base_layer.weight.data += 2 * layer.get_delta_weight("default")

    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", wrong)
    with pytest.raises(StrategyError, match=r"logits differ by up to [\d.]+ \(largest logit [\d.]+, round-off allows 0.0001 of it in float32"):
        merging.merged(moved(tiny_llama.model(), lora(target_modules=BLOCK)), "x")
    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", lambda layer, *_, **__: layer.base_layer.weight.data.fill_(float("nan")))
    with pytest.raises(StrategyError, match="logits differ by up to nan"):
        merging.merged(moved(tiny_llama.model(), lora(target_modules=BLOCK)))


def test_the_edit_that_makes_a_whole_model_is_checked_too(monkeypatch):
    wrapped, start = moved(tiny_llama.model(), lora(target_modules=BLOCK)), dict(tiny_llama.model().named_parameters())
    plain = linear.edit(wrapped, start, lambda update: update.replaced(full=0.5 * update.dense()))
    assert not hasattr(plain, "peft_config")
    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", lambda layer, *_, **__: layer.base_layer.weight.data.mul_(2))
    with pytest.raises(StrategyError, match="logits differ"):
        linear.edit(moved(tiny_llama.model(), lora(target_modules=BLOCK)), start, lambda update: update.replaced(full=update.dense()))


def test_what_cannot_be_merged_is_named():
    prompts = peft.get_peft_model(tiny_llama.model(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(StrategyError, match="PROMPT_TUNING"):
        merging.refuse(prompts)
    quantised = moved(tiny_llama.model(), lora(target_modules=BLOCK))
    quantised.get_base_model().is_quantized = True
    with pytest.raises(StrategyError, match="quantised weights"):
        merging.merged(quantised)


def test_a_folder_that_would_come_back_as_another_model_is_refused(tmp_path):
    network = tiny_llama.model()
    saving.save(network, tiny_llama.tokenizer(), tmp_path / "a")
    with torch.no_grad():
        network.model.norm.weight[0] += 1
    with pytest.raises(ModelError, match="other values in model.norm.weight"):
        saving.check_saved(tmp_path / "a", network)
    apart = tiny_llama.model()
    merging.untie(apart)
    saving.save(apart, tiny_llama.tokenizer(), tmp_path / "b")
    said = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(said | {"tie_word_embeddings": True}))
    with pytest.raises(ModelError, match="tied to the embedding"):
        saving.check_saved(tmp_path / "b", apart)
