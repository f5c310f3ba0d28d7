"""How a model is asked is found out from a small copy, once, and deep models are cut with every kind of layer kept."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny_llama

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "families"))
import tiny

from orchestrator.errors import ModelError
from orchestrator.evaluation import capability, decoding, small_copy


def test_a_usual_model_has_cache_and_shared_beginning():
    found = capability.of(tiny_llama.model())
    assert found.mode == decoding.MODES[0] and found.sentence == "" and found.probed == "small copy"


@pytest.mark.parametrize(
    ("family", "mode", "why"),
    [("mamba", "no cache", "differs from plain"), ("openai-gpt", "no cache", "takes none"), ("rwkv", "no cache, no padding", "takes none")],
)
def test_others_are_asked_more_slowly_and_users_are_told(family, mode, why):
    found = capability.of_config(tiny.config(family))
    assert found.mode.name == mode and why in found.why and found.sentence.startswith("answers are generated without a key-value cache")


def test_a_deep_model_is_cut_and_nothing_of_the_config_is_changed():
    deep = tiny.config(
        "qwen3_next", hidden_size=4096, num_hidden_layers=48, vocab_size=150_000,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 12,
    )  # fmt: skip
    before = deep.to_json_string()
    made = small_copy.of(deep)
    assert made.config.num_hidden_layers == 4 and made.config.layer_types[-1] == "full_attention" and made.config.vocab_size == small_copy.VOCABULARY
    assert deep.to_json_string() == before


def test_windows_are_narrow_in_the_copy():
    made = small_copy.of(tiny.config("mistral", sliding_window=4096))
    assert made.config.sliding_window == small_copy.WINDOW
    assert decoding.windowed(made.config) and not decoding.windowed(tiny.config("llama"))


def test_a_model_too_large_to_copy_is_left_for_later():
    assert capability.of_config(tiny.config("llama", hidden_size=65_536, num_hidden_layers=80)) is None


def test_what_looks_ahead_is_no_language_model():
    from transformers import BertConfig

    config = BertConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(ModelError, match="what it says of the first 13 tokens changes"):
        capability.of_config(config)


def test_broken_weights_are_no_matter_of_the_way_it_is_asked():
    import torch

    model = tiny_llama.model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN or infinite"):
        capability.probed(model, "model")
