"""Tiny random multimodal shells: a text model inside, beside a vision tower with layers of its own."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from torch import nn

VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
}  # fmt: skip
TOWER = ("vision", "visual", "projector", "connector")
"""Parts of names that are no text."""


def gemma3() -> nn.Module:
    """The kind that AutoModelForCausalLM gives for Gemma 3; the vision tower has as many layers as the text."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    text = tiny.config("gemma3_text").to_dict()
    config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=90)
    return _made(AutoModelForCausalLM.from_config, config)


def llava() -> nn.Module:
    from transformers import CONFIG_MAPPING, LlavaForConditionalGeneration

    vision = CONFIG_MAPPING["clip_vision_model"](**VISION, projection_dim=32)
    return _made(LlavaForConditionalGeneration, CONFIG_MAPPING["llava"](text_config=tiny.config("llama"), vision_config=vision, image_token_index=90))


def qwen2_vl() -> nn.Module:
    from transformers import CONFIG_MAPPING, Qwen2VLForConditionalGeneration

    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
    ids = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    text = tiny.config("qwen2").to_dict() | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    return _made(Qwen2VLForConditionalGeneration, CONFIG_MAPPING["qwen2_vl"](text_config=text, vision_config=vision, **ids))


SHELLS = {"gemma3": gemma3, "llava": llava, "qwen2_vl": qwen2_vl}


def _made(build: Any, config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(config).float().eval()


def of_text(name: str) -> bool:
    """Whether a parameter belongs to the text model, by its name alone: independent of how the code finds it."""
    return not any(part in name for part in TOWER)
