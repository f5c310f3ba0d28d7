"""Generation against transformers' own, for every batch size; and that it leaves no trace."""

from __future__ import annotations

import copy

import pytest
import tiny_llama
import torch

from orchestrator.errors import DataError
from orchestrator.evaluation import generate as module
from orchestrator.evaluation.generate import encode_prompts, generate

NEW = 12


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_llama.tokenizer()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [
        " ".join(tiny_llama.WORDS[i] for i in torch.randint(len(tiny_llama.WORDS), (1 + n % 17,), generator=generator)) for n in range(80)
    ]


def reference(model, tokenizer, prompts, system=None):
    """One prompt at a time through `model.generate`."""
    answers = []
    for ids in encode_prompts(tokenizer, prompts, system):
        row = torch.tensor([ids])
        out = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=NEW, do_sample=False, eos_token_id=3, pad_token_id=0)
        answers.append(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip())
    return answers


@pytest.fixture(scope="module")
def model():
    return tiny_llama.model()


@pytest.fixture(scope="module")
def expected(model, tokenizer, prompts):
    return reference(model, tokenizer, prompts)


def test_the_prompts_of_these_tests_tell_answers_apart_and_end_at_different_times(expected):
    assert len(set(expected)) > 60 and len({len(a.split()) for a in expected}) > 5


@pytest.mark.parametrize("size", [1, 7, 64, "auto"])
def test_answers_are_those_of_transformers_for_every_batch_size(model, tokenizer, prompts, expected, size):
    assert generate(model, tokenizer, prompts, max_new_tokens=NEW, batch_size=size) == expected


@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_shared_prefix_is_computed_once_and_changes_nothing(model, tokenizer, prompts, size, monkeypatch):
    system = "be kind and then help you with that tea one two three four five six"
    expected = reference(model, tokenizer, prompts[:24], system)
    assert module._Decoder(model, tokenizer, encode_prompts(tokenizer, prompts, system), NEW, None, None).prefix
    assert generate(model, tokenizer, prompts[:24], system=system, max_new_tokens=NEW, batch_size=size) == expected
    monkeypatch.setattr(module, "SHARED_PREFIX", 10**9)
    assert generate(model, tokenizer, prompts[:24], system=system, max_new_tokens=NEW, batch_size=size) == expected


def test_no_prefix_is_shared_under_sliding_windows(tokenizer, prompts):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2,
                           sliding_window=6, initializer_range=0.3, bos_token_id=2, eos_token_id=3, pad_token_id=0)  # fmt: skip
    model = MistralForCausalLM(config).eval()
    system = "be kind and then help you with that tea one two three four five six"
    expected = reference(model, tokenizer, prompts[:12], system)
    assert generate(model, tokenizer, prompts[:12], system=system, max_new_tokens=NEW, batch_size=5) == expected


def test_systems_and_dialogues_go_through_the_template_row_by_row(model, tokenizer):
    dialogue = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "then"}]
    own = [{"role": "system", "content": "be red"}, {"role": "user", "content": "how"}]
    found = generate(model, tokenizer, ["how", "how", dialogue, own], system=["be kind", None, None, "be kind"], max_new_tokens=NEW)
    assert found[0] == reference(model, tokenizer, ["how"], "be kind")[0]
    assert found[1] == reference(model, tokenizer, ["how"])[0] and found[2] == reference(model, tokenizer, [dialogue])[0]
    assert found[3] == reference(model, tokenizer, ["how"], "be red")[0]
    with pytest.raises(ValueError, match="1 system prompts for 2"):
        generate(model, tokenizer, ["a", "b"], system=["x"])


def test_no_prompts_give_no_answers(model, tokenizer):
    assert generate(model, tokenizer, []) == []


def test_adapters_work(tokenizer, prompts):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_llama.model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    plain = generate(tiny_llama.model(), tokenizer, prompts[:8], max_new_tokens=NEW)
    found = generate(adapted, tokenizer, prompts[:8], max_new_tokens=NEW, batch_size=3)
    assert found == reference(adapted, tokenizer, prompts[:8]) != plain


def test_modes_random_state_config_gradients_and_weights_are_left_alone(tokenizer, prompts):
    model = tiny_llama.model(attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    model.config.use_cache = False
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    before, weights = model.config.to_dict(), copy.deepcopy(model.state_dict())
    answers = generate(model, tokenizer, prompts[:9], max_new_tokens=NEW, batch_size=4)
    assert answers == generate(tiny_llama.model(), tokenizer, prompts[:9], max_new_tokens=NEW)  # dropout was off
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert model.config.to_dict() == before and torch.is_grad_enabled()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items()) and all(p.requires_grad for p in model.parameters())
    ids = torch.tensor([[2, 5, 9]])
    model(input_ids=ids, labels=ids).loss.backward()


def test_modes_come_back_after_an_exception(tokenizer):
    model = tiny_llama.model().train()

    def fails(_):
        raise RuntimeError("judge broke")

    with pytest.raises(RuntimeError, match="judge broke"):
        generate(model, tokenizer, ["how do"], max_new_tokens=64, stop_early=fails)
    assert model.training


def test_rows_can_be_ended_early_without_touching_others(model, tokenizer, prompts, expected):
    words = {a.split()[0] for a in expected if a and len(a.split()) == NEW}
    chosen = sorted(words)[0]
    found = generate(model, tokenizer, prompts, max_new_tokens=NEW, batch_size=16, stop_early=lambda text: text.startswith(chosen))
    ended = 0
    for short, whole in zip(found, expected, strict=True):
        if whole.startswith(chosen):
            assert whole.startswith(short)
            ended += short != whole
        else:
            assert short == whole
    assert ended


def test_the_context_is_a_limit_for_prompts_and_answers(tokenizer):
    model = tiny_llama.model(positions=16)
    with pytest.raises(DataError, match="prompt 2 has 23 tokens, the model's context holds 16"):
        generate(model, tokenizer, ["how", "cake " * 20])
    alone = generate(model, tokenizer, ["how"], max_new_tokens=64)
    assert len(tokenizer(alone[0], add_special_tokens=False)["input_ids"]) <= 16 - 4
    assert generate(model, tokenizer, ["how", "cake " * 10], max_new_tokens=64)[0] == alone[0]


def test_memory_that_runs_out_halves_the_batch(model, tokenizer, prompts, expected, monkeypatch):
    sizes, run = [], module._Decoder.run

    def small(self, rows):
        sizes.append(len(rows))
        if len(rows) > 10:
            raise torch.cuda.OutOfMemoryError("not enough")
        return run(self, rows)

    monkeypatch.setattr(module._Decoder, "run", small)
    assert generate(model, tokenizer, prompts[:30], max_new_tokens=NEW, batch_size=30) == expected[:30]
    assert sizes == [30, 15, 7, 7, 7, 7, 2]
    monkeypatch.setattr(module._Decoder, "run", lambda self, rows: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        generate(model, tokenizer, prompts[:2])


def test_the_automatic_batch_shrinks_with_the_length_of_prompts(model, tokenizer):
    ids = encode_prompts(tokenizer, ["how"])
    decoder = module._Decoder(model, tokenizer, ids, NEW, None, None)
    sizes = [decoder.batch_size(n) for n in (8, 512, 4096, 10**6)]
    assert sizes[0] == module.MAX_BATCH["cpu"] and sizes == sorted(sizes, reverse=True) and sizes[-1] == 1


def test_progress_adds_up(model, tokenizer, prompts):
    seen = []
    generate(model, tokenizer, prompts[:20], max_new_tokens=2, batch_size=6, progress=seen.append)
    assert seen == [6, 6, 6, 2]
