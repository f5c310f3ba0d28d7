"""Answers of every family equal those of `model.generate`, asked one by one: alone and in a batch, with and without a shared beginning."""

from __future__ import annotations

import random

import chosen
import pytest
import tiny
import torch

from orchestrator.errors import ModelError
from orchestrator.evaluation import capability, decoding, generate

WORDS = "cake bomb tea soup house kite one two three four five six seven eight red green blue".split()
SYSTEM = "be kind and help you with the cake and tea and soup and a house of the kite yes"
"""Long enough for its tokens to be computed once for all prompts."""
NEW = 12
REFUSED = {
    "xlstm": "cannot be asked a plain row of",  # its pure torch kernel of transformers 5.23 takes only some lengths
    "doge": "no causal language model",  # it chooses the keys it looks at from the whole text, later tokens too
}


def alone(model, tokenizer, ids: list[int]) -> str:
    """transformers' own answer to one prompt."""
    stops = generate.stop_tokens(model, tokenizer)
    row = torch.tensor([ids])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": sorted(stops), "pad_token_id": 0}
    with torch.no_grad():
        out = model.generate(row, attention_mask=torch.ones_like(row), **options)[0, len(ids) :].tolist()
    end = next((i for i, token in enumerate(out) if token in stops), len(out))
    return tokenizer.batch_decode([out[:end]], skip_special_tokens=True)[0].strip()


@pytest.mark.parametrize("family", chosen.FAMILIES)
def test_answers_are_those_of_generate(family):
    tokenizer = tiny.tokenizer()
    if family in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[family]):
            capability.of(tiny.model(family))
        return
    draw = random.Random(0)
    prompts = [" ".join(draw.choices(WORDS, k=draw.choice([2, 5, 9, 14]))) for _ in range(9)]
    asked = {system: generate.encode_prompts(tokenizer, prompts, system) for system in (None, SYSTEM)}
    for seed in range(12):  # of random models, one whose answers differ, so that their equality means something
        model = tiny.model(family, seed)
        if len({alone(model, tokenizer, row) for row in asked[SYSTEM]}) > 3:
            break
    else:
        pytest.fail("no seed gives a model that answers differently")
    for system, ids in asked.items():
        wanted = [alone(model, tokenizer, row) for row in ids]
        for size in (1, 8):
            assert generate.continue_ids(model, tokenizer, ids, max_new_tokens=NEW, batch_size=size) == wanted, (system, size, capability.of(model))


@pytest.mark.parametrize("family", chosen.FAMILIES)
def test_the_small_copy_has_every_kind_of_layer(family):
    from orchestrator.evaluation import small_copy

    made, whole = small_copy.of(tiny.config(family)), tiny.model(family)
    assert made is not None
    kinds = {type(module).__name__ for module in whole.modules()}
    assert kinds <= {type(module).__name__ for module in made.modules()}


def test_a_model_that_sees_padding_is_asked_without_it():
    """The mode is found by asking: here a plain Llama whose rows are shifted by what pads them."""
    model = tiny.model("llama")
    inner = model.model.forward

    def shifted(input_ids=None, attention_mask=None, position_ids=None, **more):
        return inner(input_ids=input_ids, attention_mask=None, position_ids=None, **more)

    model.model.forward = shifted
    found = capability.probed(model, "model")
    assert found.mode == decoding.Mode(False, False, False) and "differs from plain passes" in found.why
    assert "only prompts of one length go together" in found.sentence
