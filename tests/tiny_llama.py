"""A random Llama of a few thousand weights with a word-level tokenizer, made in milliseconds."""

from __future__ import annotations

from pathlib import Path

WORDS = (
    "how do i make a cake bomb tea soup house kite of with for and the then mix bake fold sorry cannot help you that yes no"
    " one two three four five six seven eight red green blue : , . ? user assistant system be kind"
).split()
SPECIALS = ["<pad>", "<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE, words=tuple(WORDS)):
    """A `PreTrainedTokenizerFast` over WORDS; adds <s> itself when asked to add special tokens, as Llama's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIALS, *dict.fromkeys(words)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=SPECIALS[4:], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    made.chat_template = template
    return made


def model(seed: int = 0, *, layers: int = 3, tie: bool = True, vocabulary: int = 80, positions: int = 256, **more):
    """A Llama with weights large enough that answers differ between prompts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=positions, tie_word_embeddings=tie, bos_token_id=2, eos_token_id=3, pad_token_id=0,
        initializer_range=0.3, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def saved(folder: Path, template: str | None = TEMPLATE, **options) -> Path:
    """The same, written as a model folder."""
    model(**options).save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder
