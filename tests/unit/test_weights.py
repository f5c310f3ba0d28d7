"""Weights by the names a loaded model has, whatever the files call them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.config import Model
from orchestrator.errors import ModelError
from orchestrator.models import loading, weights

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "families"))
import tiny


def renamed(folder, change):
    """The files of a model folder with their tensors under other names."""
    path = folder / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_every_parameter_of_a_saved_model_is_found(family, tmp_path):
    """Experts of most mixtures lie in the files one by one; transformers puts them together when it loads."""
    folder = tiny.saved(tmp_path / "model", family)
    model = Model(model_name_or_path=str(folder))
    found = weights.of_name(str(folder), model)
    loaded, _ = loading.load(model)
    assert set(dict(loaded.named_parameters())) <= set(found)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(found[name], parameter), name


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_files_without_the_prefix_are_read_one_tensor_at_a_time(family, tmp_path):
    """The hub's GPT-2 and BLOOM were saved without their head."""
    folder = tiny.saved(tmp_path / "model", family)
    renamed(folder, lambda name: name.removeprefix("transformer."))
    model = Model(model_name_or_path=str(folder))
    found = weights.of_name(str(folder), model)
    assert isinstance(found, weights.FolderWeights)
    for name, parameter in loading.load(model)[0].named_parameters():
        assert torch.equal(found[name], parameter), name


def test_of_experts_in_one_tensor_the_last_is_kept_and_nothing_else(tmp_path):
    folder = tiny.saved(tmp_path / "model", "gpt_oss")
    found = weights.of_name(str(folder), Model(model_name_or_path=str(folder)))
    assert isinstance(found, weights.FolderWeights)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert found[name] is found[name] and found["lm_head.weight"] is not found["lm_head.weight"]


def test_mixtures_with_other_experts_do_not_belong_together(tmp_path):
    folder = tiny.saved(tmp_path / "a", "qwen3_moe")
    other = tiny.saved(tmp_path / "b", "qwen3_moe", num_experts=2, num_local_experts=2)
    with pytest.raises(ModelError, match="has num_local_experts 2, "):
        weights.of_name(str(other), Model(model_name_or_path=str(folder)))
