"""Decoder blocks are found by structure, and no tensor of a block falls through its parts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "families"))
import tiny

from strategies import blocks, freeze_layers, lora_targets
from strategies.base import StrategyError
from strategies.block_parts import part_of


def on_meta(family: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny.config(family))


def gemma3() -> nn.Module:
    """A shell whose vision tower has as many layers as its text."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    text = tiny.config("gemma3_text").to_dict()
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_has_its_blocks(family):
    model = on_meta(family)
    found = blocks.of(model)
    wanted = {"longcat_flash": 2}.get(family, model.config.num_hidden_layers)  # its blocks count as two layers each
    assert found.count == wanted
    inside = {name for name, _ in model.named_parameters() if found.holds(name)}
    direct = {f"{found.name(i)}.{name}" for i, block in enumerate(found.modules) for name, _ in block.named_parameters()}
    assert inside and inside <= direct
    outside = [name for name, _ in model.named_parameters() if not found.holds(name)]
    assert len(outside) <= 6, outside  # embeddings, last norm, head


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_attention_mlp_and_norms_are_all_of_a_block(family):
    """Each part is there in some block, and what is no norm is frozen by attention_mlp."""
    found = blocks.of(on_meta(family))
    parts = {name: part_of(block, name) for block in found.modules for name, _ in block.named_parameters()}
    kinds = set(parts.values())
    assert "attention" in kinds, parts
    for name, part in parts.items():
        words = name.lower()
        if part == "norm":
            assert "norm" in words or "ln" in words, name
        if any(word in words for word in ("q_proj", "qkv", "k_proj")) and "norm" not in words.split(".")[-2]:
            assert part == "attention", name
        if any(word in words for word in ("gate_proj", "up_proj", "down_proj", "experts", "fc1", "fc2")) and "att" not in words:
            assert part == "mlp", name


def test_the_vision_tower_of_a_shell_is_not_the_text():
    model = gemma3()
    found = blocks.of(model)
    assert found.container == "model.language_model.layers" and found.count == 3
    tower = [name for name, _ in model.named_parameters() if "vision_tower" in name]
    assert tower and not any(found.holds(name) for name in tower)
    from strategies.lora import Lora

    adapted = lora_targets.of(model, Lora.Config(), None).modules
    assert adapted and not any("vision" in name for name in adapted)


@pytest.mark.parametrize("family", ["opt", "lfm2", "falcon_h1", "qwen3_next", "qwen3_moe", "gpt2", "rwkv", "deepseek_v3"])
@pytest.mark.parametrize("modules", ["all", "attention_mlp"])
def test_a_frozen_layer_stays_whole_and_the_rest_moves(family, modules):
    model = tiny.model(family)
    strategy = freeze_layers.FreezeLayers(freeze_layers.FreezeLayers.Config(start=1, end=1, modules=modules))
    inside = blocks.of(model.train())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model = strategy.setup(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        ids = torch.randint(8, 60, (4, 20), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    strategy.finish(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    frozen = {name for name in before if inside.index(name) == 1}
    norms = {name for name in frozen if part_of(inside.modules[1], name.removeprefix(f"{inside.name(1)}.")) == "norm"}
    assert not moved & (frozen if modules == "all" else frozen - norms)
    assert {inside.index(name) for name in moved} >= {0, 2}
    if modules == "all":
        assert strategy.facts()["frozen_tensors_proved"] >= len(frozen)


def test_a_changed_tensor_of_a_frozen_block_is_named_whatever_it_is():
    for name in ("fc1.weight", "self_attn_layer_norm.bias"):
        model = tiny.model("opt")
        strategy = freeze_layers.FreezeLayers(freeze_layers.FreezeLayers.Config(start=1, end=1))
        strategy.setup(model)
        with torch.no_grad():
            model.get_parameter(f"model.decoder.layers.1.{name}").add_(1e-3)
        with pytest.raises(StrategyError, match=f"frozen tensor model.decoder.layers.1.{name} was changed"):
            strategy.finish(model)


def shared(**more) -> nn.Module:
    """Two blocks with one attention between them."""
    return tiny.model("zamba2", num_hidden_layers=4, layers_block_type=["hybrid", "mamba", "hybrid", "mamba"], **more)


def test_layers_that_share_frozen_tensors_are_named():
    model = shared().train()
    strategy = freeze_layers.FreezeLayers(freeze_layers.FreezeLayers.Config(start=2, end=3))
    assert "layers of this kind of model share tensors" in strategy.check_model(model)[0]
    assert strategy.check_model(tiny.model("llama")) == []
    strategy.setup(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.randint(8, 60, (4, 20))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    strategy.finish(model)
    assert strategy.facts()["layers_sharing_frozen_tensors"] == [0]
    alone = freeze_layers.FreezeLayers(freeze_layers.FreezeLayers.Config(start=1, end=1))
    alone.setup(shared())
    assert "layers_sharing_frozen_tensors" not in alone.facts()


def test_a_model_of_one_block_many_times_is_refused():
    import toy

    model = toy.model()
    for i in (1, 2):
        model.model.layers[i].load_state_dict(model.model.layers[0].state_dict())
        for name, parameter in model.model.layers[0].named_parameters():
            owner, _, leaf = name.rpartition(".")
            setattr(model.model.layers[i].get_submodule(owner), leaf, parameter)
    with pytest.raises(StrategyError, match="all layers of this kind of model are the same tensors"):
        freeze_layers.FreezeLayers().check_model(model)


def test_a_model_without_blocks_is_refused():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(2, 2)

    with pytest.raises(StrategyError, match="no decoder blocks found in Flat"):
        blocks.of(Flat())


def test_a_vision_tower_is_left_as_it_is_and_a_text_model_has_none():
    shell = gemma3()
    left = blocks.unread(shell)
    assert left and all("vision_tower" in name or "multi_modal_projector" in name for name in left)
    assert set(left) == {name for name, _ in shell.named_parameters() if "vision_tower" in name or "multi_modal_projector" in name}
    assert not any(blocks.unread(on_meta(family)) for family in tiny.FAMILIES)
