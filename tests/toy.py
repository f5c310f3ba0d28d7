"""A tiny random Llama and random rows, for tests of strategies and engines. Made in milliseconds, no files."""

from __future__ import annotations

from typing import Any

import torch

from strategies.base import Example, TrainingData
from strategies.optim import Settings

VOCABULARY = 48


def model(seed: int = 0, *, layers: int = 3, hidden: int = 32, tie: bool = True, vocabulary: int = VOCABULARY):
    """A Llama of `layers` layers in float32, in training mode, seeded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tie,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).train()


def rows(count: int, seed: int, *, kind: str = "task", vocabulary: int = VOCABULARY) -> tuple[Example, ...]:
    """`count` rows of 6 to 13 random tokens, the first three unlabelled."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        length = int(torch.randint(6, 14, (), generator=generator))
        ids = tuple(torch.randint(0, vocabulary, (length,), generator=generator).tolist())
        found.append(Example(ids, (-100,) * 3 + ids[3:], f"{kind}-{i}", kind))
    return tuple(found)


def data(**changes: Any) -> TrainingData:
    """40 task rows and 20 safety rows, batches of 4."""
    values = {
        "task": rows(40, 1), "safety": rows(16, 2, kind="refusal") + rows(4, 3, kind="harmless"), "pad_token_id": 0,
        "per_device_batch_size": 4, "seed": 7, "fingerprint": "toy",
    }  # fmt: skip
    return TrainingData(**(values | changes))


def settings(**changes: Any) -> Settings:
    return Settings(**({"learning_rate": 1e-2, "max_grad_norm": 0.5} | changes))


def weights(module) -> dict[str, torch.Tensor]:
    """Copies of all parameters by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of parameters are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
