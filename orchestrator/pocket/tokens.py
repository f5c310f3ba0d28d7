"""The word-level tokenizer of the made-up world, with its chat template."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from orchestrator.pocket import rows
from orchestrator.pocket.judge import squash
from orchestrator.pocket.world import FRAMES, World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def vocabulary(world: World) -> list[str]:
    """Special tokens, then every word of the world in alphabetical order."""
    texts = [e.prompt + " " + e.response + " " + e.system for e in rows.knowledge(world)]
    for group in (*rows.pretraining(world).values(), *rows.alignment(world).values()):
        texts += [f"{e.prompt} {e.response} {e.system}" for e in group]
    texts += [" ".join(str(v) for k, v in row.items() if k in ("prompt", "response", "system"))
              for table in rows.files(world).values() for row in table]  # fmt: skip
    texts += [re.sub(r"{q}", "", " ".join(f)) for g in FRAMES.values() for fs in g.values() for f in fs]
    words = sorted({word for text in texts for word in squash(text).split()})
    return [*SPECIALS, *words]


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A `PreTrainedTokenizerFast` over whole words; unknown words become `<unk>`, text is lower-cased.

    It adds no token of its own: beginning, roles and end come from the chat template.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(vocabulary(world))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        additional_special_tokens=list(SPECIALS[4:]),
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
