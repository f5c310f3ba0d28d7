"""perturbation: what is changed of a text, how votes are counted, and that nothing depends on batches."""

from __future__ import annotations

import math
import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import perturbation
from strategies.base import StrategyError
from strategies.perturbation import PERTURBATIONS, copies_of, drop, insert, majority, needed, patch, refused, swap
from strategies.recipe import build

TEXT = st.text(alphabet=string.ascii_letters + " ", min_size=1, max_size=80)
RATE = st.floats(0.01, 0.9)


def places(length, rate):
    return min(length, max(1, math.floor(rate * length + 1e-9)))


def subsequence(short, long):
    rest = iter(long)
    return all(item in rest for item in short)


@given(TEXT, RATE, st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_each_kind_changes_as_much_as_it_says(text, rate, seed):
    count = places(len(text), rate)
    swapped = swap(text, rate, random.Random(seed))
    assert len(swapped) == len(text) and sum(a != b for a, b in zip(text, swapped, strict=True)) <= count
    patched = patch(text, rate, random.Random(seed))
    changed = [i for i, (a, b) in enumerate(zip(text, patched, strict=True)) if a != b]
    assert not changed or changed[-1] - changed[0] < count
    inserted = insert(text, rate, random.Random(seed))
    assert len(inserted) == len(text) + count and subsequence(text, inserted)
    words = text.split()
    kept = drop(text, rate, random.Random(seed)).split()
    assert subsequence(kept, words)
    assert len(kept) == max(min(1, len(words)), len(words) - places(len(words), rate)) if words else kept == []


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_a_rate_of_zero_and_an_empty_text_stay(kind):
    assert PERTURBATIONS[kind]("make a cake", 0.0, random.Random(1)) == "make a cake"
    assert PERTURBATIONS[kind]("", 0.5, random.Random(1)) == ""


def test_swap_hits_every_place_equally_often():
    counts = [0] * 10
    for seed in range(2000):
        changed = swap("\u00e4" * 10, 0.3, random.Random(seed))  # a letter that is not printable ASCII, so every swap shows
        assert sum(c != "\u00e4" for c in changed) == 3
        for i, c in enumerate(changed):
            counts[i] += c != "\u00e4"
    assert all(abs(count - 600) < 90 for count in counts)


def test_copies_depend_on_text_seed_and_number_alone():
    random.seed(1)
    first = copies_of("tell me a story", "swap", 0.2, 4, 0)
    random.seed(2)
    assert copies_of("tell me a story", "swap", 0.2, 4, 0) == first
    assert copies_of("tell me a story", "swap", 0.2, 2, 0) == first[:2] and len(set(first)) == 4
    assert copies_of("tell me a story", "swap", 0.2, 4, 1) != first


@given(st.lists(st.booleans(), min_size=1, max_size=11), st.integers(0, 5))
def test_the_majority_is_counted_as_in_the_paper(verdicts, seed):
    verdict, index = majority(verdicts, random.Random(seed))
    assert verdict == (not sum(not v for v in verdicts) / len(verdicts) > 0.5)
    assert verdicts[index] == verdict


def test_no_copies_no_vote():
    with pytest.raises(ValueError, match="nothing to vote on"):
        majority([], random.Random(0))


@pytest.mark.parametrize("copies, threshold, wanted", [(20, 0.2, 4), (10, 0.25, 3), (3, 0.01, 1), (5, 1.0, 5), (10, 0.3, 3)])
def test_refused_copies_needed(copies, threshold, wanted):
    assert needed(copies, threshold) == wanted


def test_phrases_are_found_anywhere_whatever_case_or_apostrophe():
    phrases = ("i can't", "sorry")
    assert refused("Well, I can\u2019t do\nthat", phrases) and refused("so SORRY", phrases)
    assert not refused("", phrases) and not refused("here is how", phrases)


class Echo:
    """Answers by the text it is asked; remembers what it was asked with."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def __call__(self, prompts, *, max_new_tokens=None):
        self.calls.append((list(prompts), max_new_tokens))
        return [self.answer(prompt) for prompt in prompts]


def strategy(**knobs):
    return build([("perturbation", knobs)]).strategies[0]


def test_smoothllm_returns_an_answer_of_the_majority():
    # the suffix works only while it is whole; then the model answers, else it refuses
    model = Echo(lambda text: f"sure: {text}" if "!!magic!!" in text else f"sorry, no: {text}")
    found = strategy(kind="swap", rate=0.3, copies=9)
    prompts = ["how to smash it !!magic!!", "how to bake it"]
    answers = found.wrap(model)(prompts, max_new_tokens=7)
    assert answers[0].startswith("sorry") and answers[1].startswith("sorry")
    (asked, tokens), = model.calls
    assert len(asked) == 18 and tokens == 7
    assert answers[0].removeprefix("sorry, no: ") in copies_of(prompts[0], "swap", 0.3, 9, 0)
    assert found.facts() == {"prompts_defended": 2, "prompts_refused_by_vote": 2}


def test_results_do_not_depend_on_batches():
    model = Echo(lambda text: "sorry" if sum(map(ord, text)) % 3 else f"sure {text}")
    prompts = [f"question number {i} about things" for i in range(12)]
    for form in ("smoothllm", "ra_llm"):
        whole = strategy(form=form, copies=5).wrap(model)(prompts)
        defended = strategy(form=form, copies=5).wrap(model)
        assert [defended([prompt])[0] for prompt in reversed(prompts)][::-1] == whole


def test_ra_llm_asks_the_prompt_first_then_short_copies_and_stops_early():
    def answer(text):
        return "sorry" if text == "bad" or "trick" not in text and "story" in text else f"sure {text}"

    model = Echo(answer)
    found = strategy(form="ra_llm", copies=20, rate=0.5, tokens=3)
    prompts = ["bad", "tell a story trick one two", "what is tea and soup"]
    answers = found.wrap(model)(prompts, max_new_tokens=40)
    assert answers == ["sorry", found.config.refusal, "sure what is tea and soup"]
    assert model.calls[0] == (prompts, 40) and all(tokens == 3 for _, tokens in model.calls[1:])
    asked = [text for texts, _ in model.calls[1:] for text in texts]
    assert not any("bad" in text for text in asked)  # refused already: no copies
    every = [refused(answer(copy), found.phrases) for copy in copies_of(prompts[1], "drop", 0.5, 20, 0)]
    assert sum(every) >= needed(20, 0.2)  # the same verdict as asking all
    copies = [text for text in asked if "tea" in text or "soup" in text or set(text.split()) <= set(prompts[2].split())]
    assert len(asked) < 40 and len(copies) <= 20


def test_only_the_vote_needs_to_stand_for_ra_llm_to_stop(monkeypatch):
    monkeypatch.setattr(perturbation, "WAVE", 2)
    model = Echo(lambda text: "sure" if text == "one two three four" else "sorry")
    strategy(form="ra_llm", copies=10, threshold=0.3).wrap(model)(["one two three four"])
    assert sum(len(texts) for texts, _ in model.calls[1:]) == 4  # three are needed, two at a time


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"copies": 0}, "at least 1"), ({"rate": 1.0}, "below 1"), ({"threshold": 0}, "above 0"), ({"tokens": 0}, "at least 1"),
        ({"phrases": " | "}, "is empty"),
    ],  # fmt: skip
)
def test_knobs_that_make_no_sense(knobs, message):
    with pytest.raises(StrategyError, match=message):
        strategy(**knobs)
