"""Families built otherwise than most: several lists of layers, sizes by layer, attention to chosen tokens, blocks that share weights, positions of
their own; and files that hold less, or something else, than a causal language model. Each is right, or refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from orchestrator import config
from orchestrator.errors import ConfigError, ModelError
from orchestrator.evaluation import generate
from orchestrator.experiment import checks_model
from orchestrator.models import loading
from strategies import blocks, lora_effect, lora_targets, recipe
from strategies.base import StrategyError
from strategies.lora import Lora

PLAIN = {"num_key_value_heads": 4, "head_dim": 8}
OTHERS = {
    "xlm": {"emb_dim": 32, "n_heads": 4, "n_layers": 3, "vocab_size": 96, "max_position_embeddings": 256, "causal": True, "pad_index": 0},
    "laguna": tiny.EXPERTS | {"head_dim": 8, "shared_expert_intermediate_size": 16},
    "gemma3n_text": {
        "head_dim": 8, "intermediate_size": [48, 48, 48], "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 8, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "laurel_rank": 4,
        "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0, 0.0],
    },
    "zamba": {
        "num_hidden_layers": 5, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"], "mamba_d_state": 8, "mamba_dt_rank": 4,
        "n_mamba_heads": 2, "attention_hidden_size": 64, "attention_head_dim": 16, "use_mamba_kernels": False, "num_key_value_heads": 4,
    },
    "deepseek_v32": tiny.DEEPSEEK | {"index_topk": 64, "index_n_heads": 2, "index_head_dim": 16},
    "xlm-roberta": {"is_decoder": True, "pad_token_id": 1, "vocab_size": 96, "type_vocab_size": 1},
}  # fmt: skip


@pytest.fixture
def other(monkeypatch):
    """Families of `OTHERS` as `tiny` builds its own."""
    for name, settings in OTHERS.items():
        monkeypatch.setitem(tiny.FAMILIES, name, settings)
    return tiny


def folder_of(tmp_path: Path, family: str, **more) -> config.Model:
    return config.Model(model_name_or_path=str(tiny.saved(tmp_path / family, family, **more)))


def test_layers_in_several_lists_are_refused_not_halved(other):
    with pytest.raises(StrategyError, match=r"spread over several lists \(transformer\.(ffns|attentions), transformer\."):
        blocks.of(other.model("xlm"))


def test_an_adapter_that_peft_loads_otherwise_is_refused(other):
    model = other.model("laguna")
    with pytest.raises(StrategyError, match="answers otherwise once peft has saved and loaded it|cannot be loaded by it again"):
        Lora(Lora.Config()).check_model(model)
    assert not list(Lora(Lora.Config(target_modules=("q_proj", "v_proj"))).check_model(model))


def test_every_usual_family_keeps_its_adapter():
    for family in ("llama", "gpt2", "qwen3_moe", "falcon_mamba"):
        model = tiny.model(family)
        targets = lora_targets.of(model, Lora.Config(), None)
        lora_effect.check_reload(model, targets.config(Lora.Config()))


def test_sizes_that_differ_by_layer_are_counted_by_the_largest(other):
    words, model = tiny.tokenizer(), other.model("gemma3n_text")
    model.config.intermediate_size = [48, 48, 48]
    assert len(generate.generate(model, words, ["cake", "red bomb"], max_new_tokens=2)) == 2


def test_lora_on_blocks_that_call_modules_by_keyword(other):
    """peft's wrapper of parameters takes its input by position only."""
    model = other.model("zamba")
    lora = Lora(Lora.Config())
    try:
        lora.check_model(model)
    except StrategyError as error:
        assert "\n" not in str(error)
        return
    made = lora.setup(model)
    ids = torch.arange(4, 12)[None]
    made(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.sum().backward()
    grads = [p.grad for name, p in made.named_parameters() if "lora_B" in name]
    assert grads and all(grad is not None for grad in grads)


def test_attention_to_chosen_tokens_is_tried_with_fewer_of_them_than_the_rows_have(other, tmp_path):
    with pytest.raises(ModelError, match="answers otherwise in a batch than alone|when later tokens follow"):
        checks_model.check(folder_of(tmp_path, "deepseek_v32"))


def test_a_model_whose_generate_counts_positions_otherwise_is_refused(other, tmp_path):
    with pytest.raises(ModelError, match="its own generate|own generate answers otherwise"):
        checks_model.check(folder_of(tmp_path, "xlm-roberta"))


def test_what_generation_config_asks_for_and_is_not_heeded_is_said(tmp_path):
    named = folder_of(tmp_path, "llama")
    path = Path(named.model_name_or_path) / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.05, "no_repeat_ngram_size": 3}))
    (note,) = checks_model.check(named)[1]
    assert "repetition_penalty=1.05, no_repeat_ngram_size=3" in note and "not heeded" in note


def test_a_tower_that_transformers_drops_is_said(tmp_path):
    from transformers import AutoModelForCausalLM, Qwen3_5Config

    vision = tiny.VISION | {"depth": 2, "num_heads": 4, "out_hidden_size": 32}
    made = Qwen3_5Config(text_config=tiny.config("qwen3_5_text").to_dict(), vision_config=vision)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made)
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(made.to_json_string())
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    notes = checks_model.check(config.Model(model_name_or_path=str(tmp_path / "m")))[1]
    assert any("vision_config" in note and "the text part alone" in note for note in notes), notes


def edited(named: config.Model, edit) -> None:
    path = Path(named.model_name_or_path) / "model.safetensors"
    held = load_file(path)
    edit(held)
    save_file(held, path, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_matrices_without_their_scales_are_refused_by_name(tmp_path, dtype):
    named = folder_of(tmp_path, "llama")
    key = "model.layers.0.mlp.down_proj.weight"
    edited(named, lambda held: held.update({key: held[key].to(dtype)}))
    with pytest.raises(ModelError, match=rf"1 tensor of the type \w+ \({key}\), quantised or packed"):
        checks_model.check(named)


def test_a_lost_matrix_of_an_expert_is_named(tmp_path):
    named = folder_of(tmp_path, "mixtral")
    gone = []

    def lose(held):
        gone.append(next(name for name in sorted(held) if ".experts.2." in name))
        del held[gone[0]]

    edited(named, lose)
    with pytest.raises(ModelError) as refused:
        checks_model.check(named)
    assert f"lack 1 tensor of an expert: {gone[0]}" in str(refused.value)


def test_weights_that_are_not_finite_are_named_when_they_are_loaded(tmp_path):
    named = folder_of(tmp_path, "llama")
    key = "model.layers.1.self_attn.o_proj.weight"

    def spoil(held):
        held[key][2] = float("nan")

    edited(named, spoil)
    with pytest.raises(ModelError, match=f"NaN or infinite in {key}: its files are broken"):
        loading.load(named)


def test_a_method_that_a_models_own_code_breaks_is_a_sentence(tmp_path, monkeypatch):
    def broken(self, model):
        raise RuntimeError("shape '[3]' is invalid\nfor input of size 4")

    monkeypatch.setattr(Lora, "check_model", broken)
    named = folder_of(tmp_path, "llama")
    said = r"\[mine\]: lora does not work on this model: .* RuntimeError: shape '\[3\]' is invalid for input of size 4"
    with pytest.raises(ConfigError, match=said):
        checks_model.check_methods(named, {"mine": recipe.build([("lora", {})])})
