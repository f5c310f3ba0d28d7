"""Which families a test run goes through: unlike ones in `make test`, all of them in `make families`."""

from __future__ import annotations

import os

import tiny

UNLIKE = (
    "llama", "gpt2", "openai-gpt", "gpt_neo", "mpt", "bloom", "opt", "gemma3_text", "mamba", "rwkv", "recurrent_gemma", "jamba", "qwen3_next", "lfm2",
    "falcon_h1", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "minimax",
)  # fmt: skip
ALL = os.environ.get("SAFEBASIN_FAMILIES") == "all"
FAMILIES = tuple(tiny.FAMILIES) if ALL else UNLIKE
CELLS = FAMILIES if ALL else ("llama", "gpt2", "bloom", "mamba", "rwkv", "recurrent_gemma", "jamba", "qwen3_moe", "gpt_oss", "deepseek_v3")
"""What goes through whole trials of every recipe."""
