"""Greedy answers in batches: sorted by length, in the fastest way that is right for the model, stopping when every row has ended.

A decode loop of its own, because `model.generate` spends most of a small model's time on bookkeeping. It changes nothing outside:
training mode comes back module by module, the random state is not touched, `model.config` is not written to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.data import template, template_limits, template_rows
from orchestrator.data.tokens import encode, render, turn_end, with_system
from orchestrator.errors import DataError, ModelError, NonFiniteLogitsError
from orchestrator.evaluation import capability, decoding, thinking
from orchestrator.evaluation.decoding import inference
from orchestrator.evaluation.sampling import Sampling

if TYPE_CHECKING:
    import random

    import torch
    from torch import nn

Prompt = str | Sequence[dict[str, str]]
"""The user's text, or the messages before the answer; a last message of the assistant is the beginning of the answer."""


class Plain(str):
    """A text that is given to the model as it is, without its chat template (a system prompt goes before it, a blank line between)."""

SHARED_PREFIX = 12
"""Tokens common to all prompts from which computing them once pays."""
CPU_BYTES = 512 << 20
GPU_SHARE = 0.4
MAX_BATCH = {"cpu": 128, "cuda": 512}
LOOK_EVERY = 8
"""Decoded tokens between two looks at what has ended."""


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    system: str | None | Sequence[str | None] = None,
    max_new_tokens: int = 64,
    batch_size: int | str = "auto",
    stop_early: Callable[[str], bool] | None = None,
    progress: Callable[[int], None] | None = None,
    sampling: Sampling | None = None,
) -> list[str]:
    """One answer per prompt, greedy or drawn (`sampling`), in the prompts' order, without special tokens; the same for every batch size up to
    rounding.

    prompts: user texts, or lists of messages; the chat template is applied here. system: one system prompt for all, or one per
    prompt; a prompt with a system message of its own keeps it. batch_size: rows at a time, or `auto` for what memory allows.
    stop_early: told an unfinished answer every few tokens; True ends that row there (for judges that have seen enough).
    progress: told how many more prompts are done. No prompts give []. Raises DataError for a prompt longer than the model's context.
    """
    if not prompts:
        return []
    ids = encode_prompts(tokenizer, prompts, system, context_length(model))
    return continue_ids(
        model, tokenizer, ids, max_new_tokens=max_new_tokens, batch_size=batch_size, stop_early=stop_early, progress=progress, sampling=sampling
    )


def continue_ids(
    model: nn.Module,
    tokenizer: Any,
    ids: list[list[int]],
    *,
    max_new_tokens: int = 64,
    batch_size: int | str = "auto",
    stop_early: Callable[[str], bool] | None = None,
    progress: Callable[[int], None] | None = None,
    sampling: Sampling | None = None,
) -> list[str]:
    """`generate` for prompts that are token ids already, template included."""
    if not ids:
        return []
    limit = context_length(model)
    for i, row in enumerate(ids):
        if limit is not None and len(row) >= limit:
            least = "at least " if len(row) == limit + 1 else ""  # of a very long one no more was looked at
            raise DataError(f"prompt {i + 1} has {least}{len(row)} tokens, the model's context holds {limit}; shorten it or leave the row out")
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
    answers = [""] * len(ids)
    with inference(model):
        decoder = _Decoder(model, tokenizer, ids, max_new_tokens, limit, stop_early, sampling)
        start = 0
        size = decoder.batch_size(len(ids[order[0]])) if batch_size == "auto" else int(batch_size)
        while start < len(order):
            chunk = order[start : start + size]
            try:
                found = decoder.run([ids[i] for i in chunk])
            except RuntimeError as error:
                if not _out_of_memory(error) or size == 1:
                    raise
                size = max(1, size // 2)
                _release(model)
                continue
            for i, text in zip(chunk, found, strict=True):
                answers[i] = text
            start += len(chunk)
            if progress is not None:
                progress(len(chunk))
    return answers


def encode_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], system: str | None | Sequence[str | None] = None, at_most: int | None = None, where: str = ""
) -> list[list[int]]:
    """Token ids of each prompt up to where the answer begins, or up to the end of the beginning it is given; of very long ones the first
    `at_most` and one more. where: whose prompts they are, for what is refused. Raises ModelError for one the template refuses, or computes too
    long for."""
    systems = [system] * len(prompts) if system is None or isinstance(system, str) else list(system)
    if len(systems) != len(prompts):
        raise ValueError(f"{len(systems)} system prompts for {len(prompts)} prompts; give one, or one each")
    plain = [i for i, prompt in enumerate(prompts) if isinstance(prompt, Plain)]
    if plain:  # no template, so the tokenizer puts its own beginning
        texts = [f"{systems[i]}\n\n{prompts[i]}" if systems[i] else str(prompts[i]) for i in plain]
        found = dict(zip(plain, tokenizer(texts, verbose=False)["input_ids"], strict=True))
    else:
        found = {}
    framed = [i for i in range(len(prompts)) if i not in found]
    template_rows.tried(
        tokenizer, [(_framed(prompts[i], systems[i])[0], True) for i in framed], lambda k: f"{where + ': ' if where else ''}prompt {framed[k] + 1}"
    )
    texts = [_rendered(tokenizer, prompts[i], systems[i]) for i in framed]
    found |= dict(zip(framed, encode(tokenizer, texts, at_most), strict=True))
    return [found[i] for i in range(len(prompts))]


def _framed(prompt: Prompt, system: str | None) -> tuple[list[dict[str, str]], str]:
    """(the messages before the answer, the beginning that the answer is given)."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    begun = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
    return with_system(messages, system), begun


def _rendered(tokenizer: Any, prompt: Prompt, system: str | None) -> str:
    messages, begun = _framed(prompt, system)
    text = render(tokenizer, messages, generation=True)
    lost = template_limits.lost([message for message in messages if message["role"] == "user"], text)
    if lost is not None:
        raise ModelError(
            "the chat template cuts or changes the text of a prompt, so that something else would be asked than it says; correct model.chat_template"
        )
    return text + template.style(tokenizer).lead + begun if begun else text


def context_length(model: nn.Module) -> int | None:
    """Positions the model was made for, None where its config names none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def stop_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, the template's end of turn (where it has a template) and the generation config's."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = {own} if isinstance(own, int) else set(own or ())
    ends = turn_end(tokenizer)[1] if tokenizer.chat_template else frozenset({tokenizer.eos_token_id} - {None})
    return ends | more


def _most(config: Any, key: str) -> int | None:
    """A size in a text config; the largest where each layer has its own."""
    value = getattr(config, key, None)
    return max(value, default=None) if isinstance(value, list | tuple) else value


class _Decoder:
    """The decode loop over one model; holds what does not change from batch to batch."""

    def __init__(self, model: nn.Module, tokenizer: Any, ids: list[list[int]], max_new_tokens: int, limit: int | None, stop_early, sampling=None):
        import torch

        self.sampling: Sampling | None = sampling
        self.model, self.tokenizer, self.stop_early = model, tokenizer, stop_early
        self.new, self.limit = max_new_tokens, limit
        self.device = next(model.parameters()).device
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.stops = sorted(stop_tokens(model, tokenizer))
        self.stop_tensor = torch.tensor(self.stops, device=self.device)
        self.calls = decoding.Calls(model)
        self.mode = capability.of(model).mode
        self.text_config = model.config.get_text_config()
        self.prefix = self._shared(ids)

    def batch_size(self, longest: int) -> int:
        """Rows whose cache, activations and logits fit the memory set aside; depends on the model and the longest prompt only."""
        import torch

        c, length = self.text_config, longest + self.new
        heads = _most(c, "num_attention_heads") or 1
        kv_heads = _most(c, "num_key_value_heads") or heads
        head_dim = _most(c, "head_dim") or c.hidden_size // heads
        inner = _most(c, "intermediate_size") or 4 * c.hidden_size
        width = next(self.model.parameters()).element_size()
        cache = 2 * c.num_hidden_layers * kv_heads * head_dim * width * length * 2  # twice: old and grown cache live together for a moment
        worked = longest if self.mode.cache else length
        work = worked * (6 * c.hidden_size + 3 * inner + heads * worked) * max(width, 4)
        logits = c.vocab_size * 4 * (2 if self.calls.last_only else 2 * worked)
        kind = self.device.type
        room = int(torch.cuda.mem_get_info(self.device)[0] * GPU_SHARE) if kind == "cuda" else CPU_BYTES
        return max(1, min(MAX_BATCH.get(kind, MAX_BATCH["cpu"]), room // (cache + work + logits)))

    def _shared(self, ids: list[list[int]]) -> list[int]:
        """Tokens all prompts begin with, empty where sharing them does not pay or the model cannot. One token at least stays outside."""
        first, last = min(ids), max(ids)
        common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
        common = min(common, min(map(len, ids)) - 1)
        pays = len(ids) > 1 and common >= SHARED_PREFIX
        return first[:common] if pays and self.mode.prefix and not decoding.windowed(self.text_config) else []

    def run(self, rows: list[list[int]]) -> list[str]:
        """Answers to one batch of prompts."""
        draws = None if self.sampling is None else [self.sampling.draws(row) for row in rows]
        rows = [row[len(self.prefix) :] for row in rows]
        steps = self.new if self.limit is None else min(self.new, self.limit - min(map(len, rows)) - len(self.prefix))
        return self._loop(decoding.Rows(self.calls, self.mode, rows, self.pad, self.prefix), steps, draws)

    def _loop(self, rows: decoding.Rows, steps: int, draws: list[random.Random] | None = None) -> list[str]:
        """Token after token, the likeliest or the one each row's `draws` pick; every few tokens rows that have ended leave the batch once they are
        half of it."""
        import torch

        count = len(rows)
        out = torch.full((count, steps), self.pad, device=self.device)
        alive = torch.arange(count, device=self.device)  # batch row -> answer
        done = torch.zeros(count, dtype=torch.bool, device=self.device)
        broken = torch.zeros(count, dtype=torch.bool, device=self.device)
        for step in range(steps):
            logits = rows.logits()
            largest, token = logits.max(-1)  # the largest of logits with a NaN among them is NaN
            broken = broken | ~torch.isfinite(largest)
            if draws is not None:
                token = self.sampling.pick(logits, torch.tensor([draws[i].random() for i in alive.tolist()], device=self.device))
            token = token.masked_fill(done, self.pad)
            out[alive, step] = token
            done = done | torch.isin(token, self.stop_tensor)
            if self.limit is not None:
                done = done | (rows.last_positions + 1 >= self.limit)
            if (step + 1) % LOOK_EVERY == 0 or self.device.type == "cpu":
                if self.stop_early is not None and (step + 1) % LOOK_EVERY == 0:
                    done = done | self._settled(out, alive, step + 1, done)
                ended = int(done.sum())
                if ended == len(alive):
                    break
                if self.mode.leaving and ended * 2 >= len(alive) and len(alive) > 8:
                    keep = (~done).nonzero()[:, 0]
                    rows.keep(keep)
                    check_finite(broken)
                    alive, token, done, broken = (x[keep] for x in (alive, token, done, broken))
            rows.append(token)
        check_finite(broken)
        return self._texts(out)

    def _settled(self, out: torch.Tensor, alive: torch.Tensor, length: int, done: torch.Tensor) -> torch.Tensor:
        import torch

        texts = self._texts(out[alive, :length])
        return torch.tensor([bool(d) or self.stop_early(t) for d, t in zip(done.tolist(), texts, strict=True)], device=self.device)

    def _texts(self, out: torch.Tensor) -> list[str]:
        rows = []
        for row in out.tolist():
            end = next((i for i, token in enumerate(row) if token in self.stops), len(row))
            rows.append(row[:end])
        return thinking.decoded(self.tokenizer, rows)


def check_finite(broken: torch.Tensor) -> None:
    """Refuse to go on where a row's outputs were not finite. Raises NonFiniteLogitsError."""
    rows = int(broken.sum())
    if rows:
        raise NonFiniteLogitsError(
            f"the model's logits are NaN or infinite for {rows} of {len(broken)} prompts of a batch; its weights are broken or its dtype "
            "overflows (training diverged: lower training.learning_rate; float16: use model.dtype=bfloat16 or float32)"
        )


def _out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.cuda.OutOfMemoryError) or "not enough memory" in str(error)


def _release(model: nn.Module) -> None:
    import torch

    if next(model.parameters()).device.type == "cuda":
        torch.cuda.empty_cache()
