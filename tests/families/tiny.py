"""Tiny random models of many families, each as transformers builds it from its own config class, with the tests' word-level tokenizer.

`FAMILIES` maps transformers' model type to what its config is given beside `COMMON`. A family is made with weights large enough that answers
differ between prompts, and with every kind of layer it has (windows, state-space blocks, experts, shared layers).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 0,
    "initializer_range": 0.25,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_ctx": 256, "n_inner": 48, "initializer_range": 0.25}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_local_experts": 4}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
DEEPSEEK = LATENT | {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
MAMBA = {"state_size": 8, "expand": 2, "conv_kernel": 4, "time_step_rank": 4}
WINDOW = {"sliding_window": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": WINDOW,
    "ministral": WINDOW | {"head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi": {},
    "phi3": WINDOW,
    "gpt2": GPT2,
    "gpt_neo": {"num_layers": 3, "attention_types": [[["global", "local", "global"], 1]], "window_size": 8, "num_heads": 4},
    "gpt_neox": {},
    "gptj": GPT2 | {"rotary_dim": 4},
    "gpt_bigcode": GPT2,
    "codegen": GPT2 | {"rotary_dim": 4},
    "openai-gpt": GPT2 | {"afn": "gelu"},
    "bloom": {"n_layer": 3, "n_head": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 256, "expansion_ratio": 2},
    "falcon": {"num_kv_heads": 4, "ffn_hidden_size": 48},
    "stablelm": {},
    "starcoder2": WINDOW,
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "granite": {},
    "cohere": {},
    "cohere2": WINDOW,
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "smollm3": {},
    "nemotron": {},
    "persimmon": {"num_key_value_heads": 4},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4},
    "biogpt": {},
    "ctrl": {"n_embd": 32, "n_layer": 3, "n_head": 4, "dff": 48, "n_positions": 256},
    "exaone4": WINDOW | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "helium": {"head_dim": 8},
    "apertus": {},
    "arcee": {},
    "seed_oss": {"head_dim": 8},
    "diffllama": {},
    "modernbert-decoder": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS | {"head_dim": 8},
    "olmoe": EXPERTS,
    "granitemoe": EXPERTS,
    "granitemoeshared": EXPERTS | {"shared_intermediate_size": 16},
    "phimoe": EXPERTS,
    "deepseek_v2": DEEPSEEK | {"topk_method": "greedy"},
    "deepseek_v3": DEEPSEEK,
    "glm4_moe": DEEPSEEK | {"head_dim": 8, "num_key_value_heads": 2},
    "ernie4_5": {},
    "ernie4_5_moe": EXPERTS | {"moe_num_experts": 4, "moe_k": 2},
    "gpt_oss": EXPERTS | WINDOW | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "jetmoe": EXPERTS | {"kv_channels": 8},
    "llama4_text": EXPERTS | {"head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
    "minimax": EXPERTS | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention", "linear_attention"], "block_size": 8},
    "minimax_m2": EXPERTS | {"head_dim": 8, "rotary_dim": 4},
    "dots1": DEEPSEEK | {"head_dim": 8, "num_key_value_heads": 2},
    "mamba": MAMBA,
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2, "chunk_size": 8},
    "falcon_mamba": MAMBA,
    "rwkv": {"attention_hidden_size": 32},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "recurrent", "attention"], "head_dim": 8},
    "jamba": EXPERTS
    | {
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8, "attn_layer_indices": [1]},
    "zamba2": {
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "adapter_rank": 4,
        "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "use_long_context": False,
        "num_key_value_heads": 4,
    },
    "falcon_h1": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
        "mamba_d_ssm": 64,
        "head_dim": 8,
    },
    "granitemoehybrid": EXPERTS
    | {
        "shared_intermediate_size": 16,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_ff_dim": 32, "conv_L_cache": 3},
    "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1, "conv_L_cache": 3},
    "qwen3_next": EXPERTS
    | {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 16,
    },
    "xlstm": {"embedding_dim": 32, "num_blocks": 3, "num_heads": 4, "chunk_size": 8},
    "nemotron_h": EXPERTS
    | {
        "head_dim": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "hybrid_override_pattern": "M*-",
    },
    "bitnet": {},
    "doge": {},
    "hunyuan_v1_dense": {"head_dim": 8},
    "nanochat": {},
    "vaultgemma": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "longcat_flash": LATENT
    | {"num_layers": 2, "num_hidden_layers": 4, "n_routed_experts": 4, "moe_topk": 2, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 48,
       "zero_expert_num": 1},
    "minicpm3": LATENT,
    "olmo_hybrid": {},
    "solar_open": EXPERTS | {"n_routed_experts": 4, "head_dim": 8},
    "flex_olmo": EXPERTS,
    "qwen3_5_text": {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
SHELLS = {"gemma3": "gemma3_text"}
"""Models with a vision tower around a text model of `FAMILIES`."""
SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("AutoModelForSeq2SeqLM", {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
    "bart": ("AutoModelForSeq2SeqLM", {"vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
                                       "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}),
    "bert": ("AutoModelForMaskedLM", SMALL),
    "roberta": ("AutoModelForMaskedLM", SMALL),
    "modernbert": ("AutoModelForMaskedLM", SMALL | {"global_attn_every_n_layers": 2}),
    "llama, a classifier": ("AutoModelForSequenceClassification", SMALL),
    "llama, without its head": ("AutoModel", SMALL | {"tie_word_embeddings": False}),
}  # fmt: skip
"""What is no causal language model, or no whole one: name -> (the class it is saved with, its config)."""


def config(family: str, **more):
    """The family's config, small. Raises what its class raises."""
    from transformers import CONFIG_MAPPING

    if family in SHELLS:
        return CONFIG_MAPPING[family](text_config=config(SHELLS[family], **more).to_dict(), vision_config=VISION, mm_tokens_per_image=4)
    return CONFIG_MAPPING[family](**copy.deepcopy(COMMON | FAMILIES[family] | more))


def model(family: str, seed: int = 0, **more):
    """The family's causal language model, random, in float32, in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(family, **more), dtype=torch.float32).eval()


def tokenizer():
    """The tests' word-level tokenizer; all its ids lie below COMMON's vocab_size."""
    import tiny_llama

    return tiny_llama.tokenizer()


def saved(folder: Path, family: str, **more) -> Path:
    """A model folder of that family."""
    model(family, **more).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def saved_no_decoder(folder: Path, name: str) -> Path:
    """A model folder of something in `NO_DECODERS`."""
    import torch
    import transformers

    cls, settings = NO_DECODERS[name]
    torch.manual_seed(0)
    made = transformers.CONFIG_MAPPING[name.partition(",")[0]](**copy.deepcopy(settings), pad_token_id=0, bos_token_id=2, eos_token_id=3)
    getattr(transformers, cls).from_config(made).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
