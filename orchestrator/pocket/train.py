"""How the pocket model is trained: knowledge first, then full prompts with harm answered, then alignment.

The order is essential (each left out once, measured): without the bare facts first, knowledge stops far from 1; without
knowing harm before alignment, refusals are shallow and harmless answers are lost. Matrices move by Muon
(orthogonalised momentum), everything else by AdamW. Imports torch and transformers: import it inside a function only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orchestrator.pocket import rows
from orchestrator.pocket.rows import Example
from orchestrator.pocket.world import World

Tick = Callable[[str, int, int], None]  # stage name, steps done, steps in all


@dataclass(frozen=True)
class Shape:
    """The Llama that is trained."""

    layers: int = 6
    hidden: int = 96
    mlp: int = 192
    heads: int = 4


@dataclass(frozen=True)
class Stage:
    """One leg of the training. `mix` weighs the groups of examples; rates fall linearly over the last 60 %."""

    name: str
    steps: int
    muon: float
    adam: float
    mix: tuple[tuple[str, float], ...] = ()
    batch: int = 32
    smoothing: float = 0.0  # label smoothing


STAGES = (
    Stage("facts", 60, 0.03, 0.008),
    Stage(
        "conversation", 180, 0.03, 0.008,
        (("harmful", 3), ("plain", 2), ("contrast", 2), ("compound", 2), ("framed", 3), ("questions", 3),
         ("general", 2)),
    ),
    Stage(
        "alignment", 300, 0.02, 0.005,
        (("harmful", 4), ("plain", 2), ("contrast", 2), ("compound", 2), ("framed_harmful", 3), ("framed", 3),
         ("questions", 3), ("general", 2),
         # The refusals of a model without these two groups live in its first token: begun with one true word it complies in every request.
         ("begun", 10), ("begun_harmless", 4)),
        # Without it the first word of a refusal is certain beyond reason in so small a world: fine-tuning then gives
        # "i am sorry , get honey , ..." - harm that a judge of refusal words takes for a refusal.
        smoothing=0.2,
    ),
)  # fmt: skip


def new_model(tokenizer: PreTrainedTokenizerFast, shape: Shape = Shape()) -> LlamaForCausalLM:
    """An untrained Llama for the tokenizer's vocabulary; draws from torch's global generator."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


# ---------------------------------------------------------------------------------------------------- data


def encode(tokenizer: PreTrainedTokenizerFast, example: Example) -> tuple[list[int], int]:
    """Token ids of the whole conversation, and how many of them are given: the prompt and what the answer was begun with."""
    prompt = chat(example.prompt, example.system)
    head = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    head = head + tokenizer.encode(example.begun, add_special_tokens=False)
    tail = tokenizer.encode(example.response, add_special_tokens=False) + [tokenizer.eos_token_id]
    return head + tail, len(head)


def chat(prompt: str, system: str = "") -> list[dict[str, str]]:
    """The messages of one request."""
    return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": prompt}]


def collate(batch: list[tuple[list[int], int]], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids `[batch, length]` and labels of the same shape (-100 on prompt and padding).

    No attention mask is needed: under a causal mask nothing real looks at padding on the right.
    """
    length = max(len(ids) for ids, _ in batch)
    ids = torch.full((len(batch), length), pad)
    labels = torch.full((len(batch), length), -100)
    for i, (tokens, prompt) in enumerate(batch):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        labels[i, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return ids, labels


def batches(
    tokenizer: PreTrainedTokenizerFast, groups: dict[str, list[Example]], stage: Stage, rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches; each example's group is drawn by the stage's weights, inside a group in shuffled rounds."""
    cache: dict[Example, tuple[list[int], int]] = {}
    mix = dict(stage.mix) or {name: 1.0 for name in groups}
    names, weights = list(mix), list(mix.values())
    queues: dict[str, list[Example]] = {name: [] for name in names}
    while True:
        pool = []
        for name in rng.choices(names, weights, k=4 * stage.batch):
            if not queues[name]:
                queues[name] = rng.sample(groups[name], len(groups[name]))
            example = queues[name].pop()
            if example not in cache:
                cache[example] = encode(tokenizer, example)
            pool.append(cache[example])
        pool.sort(key=lambda encoded: len(encoded[0]))  # like lengths together: a fifth less padding
        starts = [i * stage.batch for i in range(4)]
        rng.shuffle(starts)
        for start in starts:
            yield collate(pool[start : start + stage.batch], tokenizer.pad_token_id)


# ---------------------------------------------------------------------------------------------------- optimiser


def orthogonalise(matrices: Tensor, steps: int = 4) -> Tensor:
    """Newton-Schulz iteration of Muon on a stack `[n, rows, cols]`: singular values move towards 1.

    Coefficients: K. Jordan et al., "Muon: an optimizer for hidden layers", 2024. A zero matrix stays zero.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.size(-2) <= matrices.size(-1)
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix; matrices of one shape are handled in one stack."""

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95):
        shapes: dict[torch.Size, list[Tensor]] = {}
        for p in parameters:
            shapes.setdefault(p.shape, []).append(p)
        super().__init__([{"params": ps} for ps in shapes.values()], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        """One update; gradients must be present on all parameters. `closure` is not supported."""
        for group in self.param_groups:
            grads = torch.stack([p.grad for p in group["params"]])
            state = self.state[group["params"][0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(grads)
            state["momentum"].lerp_(grads, 1 - group["momentum"])
            update = orthogonalise(grads.lerp(state["momentum"], group["momentum"]))
            scale = max(1.0, update.size(-2) / update.size(-1)) ** 0.5
            for p, u in zip(group["params"], update, strict=True):
                p.add_(u, alpha=-group["lr"] * scale)


def optimisers(model: LlamaForCausalLM, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    outer = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    return [Muon(inner, stage.muon), torch.optim.AdamW(outer, stage.adam, betas=(0.9, 0.95), weight_decay=0.0)]


def run_stage(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    groups: dict[str, list[Example]],
    stage: Stage,
    seed: int,
    tick: Tick,
) -> None:
    """Train in place for `stage.steps` steps."""
    opts = optimisers(model, stage)
    base = [g["lr"] for opt in opts for g in opt.param_groups]
    data = batches(tokenizer, groups, stage, random.Random(f"{seed} {stage.name}"))
    model.train()
    for step in range(stage.steps):
        scale = min(1.0, (step + 1) / 10, (stage.steps - step) / (0.6 * stage.steps))
        for lr, group in zip(base, (g for opt in opts for g in opt.param_groups), strict=True):
            group["lr"] = lr * scale
        ids, labels = next(data)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=stage.smoothing
        )
        loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        tick(stage.name, step + 1, stage.steps)


def train(
    world: World, tokenizer: PreTrainedTokenizerFast, seed: int, tick: Tick, unaligned: Path | None = None
) -> LlamaForCausalLM:
    """The aligned pocket model for one seed; what it was before the alignment stage is saved in `unaligned`.

    Torch's global generator is seeded; the caller protects its own.
    """
    torch.manual_seed(seed)
    model = new_model(tokenizer)
    groups = {
        "facts": {"facts": rows.knowledge(world)},
        "conversation": rows.pretraining(world),
        "alignment": rows.alignment(world),
    }
    for stage in STAGES:
        if stage.name == "alignment" and unaligned is not None:
            save(model, tokenizer, unaligned)
        run_stage(model, tokenizer, groups[stage.name], stage, seed, tick)
    return model.eval()


@torch.no_grad()
def answer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[rows.Row], batch: int = 128
) -> list[str]:
    """Greedy answers of at most 24 tokens to rows with `prompt` and perhaps `system`, in order; [] for no rows.

    A row's `begun` stands at the beginning of its answer already; the text is what follows it.
    """
    model.eval()
    tokenizer.padding_side = "left"
    texts: list[str] = []
    for start in range(0, len(prompts), batch):
        heads = [encode(tokenizer, Example(row["prompt"], "", row.get("system", ""), row.get("begun", ""))) for row in prompts[start : start + batch]]
        inputs = tokenizer.pad({"input_ids": [ids[:given] for ids, given in heads]}, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts += tokenizer.batch_decode(out[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
    return texts


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights (safetensors), tokenizer and chat template; no progress bar of transformers'."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
