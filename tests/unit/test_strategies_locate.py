"""Safety layers: activations against the model's own hidden states, cosines and ranges against loops written out, weights put back."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "families"))
import tiny

from strategies import blocks, locate
from strategies.base import Example, StrategyError
from strategies.recipe import build, check


def test_activations_are_block_outputs_at_the_last_prompt_token():
    model, data = toy.model(layers=4), toy.data()
    found = locate.last_token_states(model, data.task[:6], data)
    assert found.shape == (6, 4, 32) and found.dtype == torch.float32
    model.eval()
    for i, row in enumerate(data.task[:6]):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([row.prompt]), output_hidden_states=True).hidden_states
        for layer in range(3):  # the last entry of hidden_states is normed, the block's output is not
            assert torch.allclose(found[i, layer], hidden[layer + 1][0, -1], atol=1e-5)
        assert torch.allclose(model.model.norm(found[i, 3]), hidden[4][0, -1], atol=1e-5)


def test_reading_leaves_no_hook_and_keeps_modes_also_after_an_exception():
    model, data = toy.model(), toy.data()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    locate.last_token_states(model, data.task[:3], data)
    bad = Example((10**6, 3, 4), (-100, -100, 4), "bad")
    with pytest.raises(IndexError):
        locate.last_token_states(model, [bad], data)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())


def test_mean_cosines_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(5, 3, 8, generator=generator), torch.randn(4, 3, 8, generator=generator)
    pairs = torch.tensor([[0, 0], [4, 3], [2, 1], [0, 3]])
    found = locate.pair_cosines(a, b, pairs).tolist()
    for layer in range(3):
        values = []
        for i, j in pairs.tolist():
            x, y = a[i, layer].tolist(), b[j, layer].tolist()
            values.append(sum(p * q for p, q in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y))
        assert found[layer] == pytest.approx(statistics.fmean(values), rel=1e-6)


def test_pairs_of_one_class_are_never_a_prompt_with_itself():
    generator = torch.Generator().manual_seed(0)
    first = torch.tensor([0, 0, 1, 2])
    pairs = locate.draw_pairs(first, first, 300, generator, True)
    assert pairs.shape == (300, 2) and (pairs[:, 0] != pairs[:, 1]).all()
    with pytest.raises(StrategyError, match="two prompts of each class"):
        locate.draw_pairs(torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long), 5, generator, True)


def planted(apart=(0.0, 0.0, 1.0, 2.0, 2.0), prompts=40, width=16):
    """States in which the classes part by `apart` along one axis, layer by layer."""
    generator = torch.Generator().manual_seed(5)
    base = torch.zeros(len(apart), width)
    base[:, 0] = 3.0
    noise = 0.3 * torch.randn(2, prompts, len(apart), width, generator=generator)
    normal, malicious = base + noise[0], base + noise[1]
    malicious[:, :, 1] += torch.tensor(apart)
    return normal, malicious


def test_a_planted_gap_is_found_where_it_was_put():
    found = locate.curves(*planted(), pairs=200, seeds=6)
    assert found.gap.shape == (6, 5)
    mean, lower, upper = locate.interval(found.gap)
    assert (lower <= mean).all() and (mean <= upper).all()
    assert abs(mean[:2]).max() < 0.02 and lower[2] > 0.02 and mean[3] > mean[2]
    assert locate.onset_range(mean, 0.03)[0] == 2
    assert locate.curves(*planted(), pairs=200, seeds=6).gap.equal(found.gap)


def test_intervals_over_seeds():
    values = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    mean, lower, upper = locate.interval(values)
    assert mean.tolist() == [2.0, 2.0] and upper[1] == 2.0
    assert float(upper[0]) == pytest.approx(2 + 1.96 * statistics.stdev([1.0, 3.0]))
    assert [part.tolist() for part in locate.interval(values[:1])] == [[1.0, 2.0]] * 3


@pytest.mark.parametrize(
    "gap, wanted",
    [
        ([0.0, 0.1, 0.2, 0.3, 0.3], (1, 3)),
        ([0.0, 0.06, -0.1, 0.06, 0.07], (3, 4)),  # fell below 0 again: not the onset
        ([0.2, 0.1, 0.1], (0, 0)),
        ([0.0, 0.04, 0.05], None),
        ([0.0, 0.01, 0.2], (2, 2)),
    ],
)
def test_the_range_of_the_activations(gap, wanted):
    assert locate.onset_range(torch.tensor(gap, dtype=torch.float64), 0.05) == wanted


@given(st.integers(2, 12), st.data())
@settings(max_examples=100, deadline=None)
def test_refinement_ends_where_no_single_move_of_the_last_phase_helps(layers, data):
    start = data.draw(st.integers(0, layers - 1))
    end = data.draw(st.integers(start, layers - 1 if start else layers - 2))
    table = {(a, b): data.draw(st.integers(0, 5)) for a in range(layers) for b in range(a, layers)}
    (a, b), counts = locate.refine(lambda i, j: table[i, j], start, end, layers)
    assert 0 <= a <= b < layers and b - a + 1 < layers
    assert counts[a, b] == table[a, b] == max(counts.values()) and counts[a, b] >= table[start, end]
    assert all(counts[key] == table[key] for key in counts)


def test_refinement_finds_the_layers_that_refuse():
    safety = {3, 4, 5}

    def count(a, b):
        inside = set(range(a, b + 1))
        return 10 * len(inside & safety) - 4 * len(inside - safety)  # a layer too many lowers it, a layer too few as well

    for start, end in ((3, 5), (4, 4), (2, 6), (3, 3), (5, 6)):
        assert locate.refine(count, start, end, 8)[0] == (3, 5), (start, end)


def test_weights_are_scaled_inside_and_restored_bit_for_bit():
    model = toy.model(layers=4)
    before = toy.weights(model)
    with pytest.raises(RuntimeError, match="now"), locate.scaled(model, 1, 2, 1.1):
        for name, weight in model.named_parameters():
            inside = (".layers.1." in name or ".layers.2." in name) and "_proj" in name
            assert torch.equal(weight, before[name] * 1.1 if inside else before[name]), name
        raise RuntimeError("now")
    assert toy.identical(toy.weights(model), before)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt2", "mamba", "lfm2", "zamba2"])
def test_every_weight_of_a_layer_is_scaled_once(family):
    """Experts in one tensor, weights stored the other way, kernels of convolutions, tensors that layers share; no norm, bias or decay rate."""
    model = tiny.model(family, **({"layers_block_type": ["hybrid", "hybrid", "mamba"]} if family == "zamba2" else {}))
    before = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    inside = blocks.of(model)
    with locate.scaled(model, 0, 1, 2.0):
        for name, weight in model.named_parameters(remove_duplicate=False):
            held = inside.index(name) in (0, 1) and before[name].ndim > 1 and not name.endswith(("bias", "A_log", "norm.weight"))
            assert torch.equal(weight, before[name] * 2 if held else before[name]), name
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters(remove_duplicate=False))


def test_prompts_of_both_classes():
    data = toy.data()
    normal, malicious, harmless = locate.prompts_of(data, 10)
    assert {row.kind for row in malicious} == {"refusal"} and len(malicious) == 10
    assert [row.kind for row in normal] == ["harmless"] * 4 + ["task"] * 6 and len(harmless) == 4
    assert locate.prompts_of(data, 10)[0] == locate.prompts_of(toy.data(seed=99), 10)[0]
    with pytest.raises(StrategyError, match="located with 0 malicious"):
        locate.prompts_of(toy.data(safety=()), 10)


# ------------------------------------------------------------------------------------------------ freeze_layers with range=auto


def located(refuses=toy.refuses, **knobs):
    recipe = build([("freeze_layers", {"range": "auto", "onset": 0.0001, **knobs})])
    data = toy.data(refuses=refuses)
    recipe.prepare_data(data)
    return recipe, data


def separated(layers=5):
    """A toy model whose third and fourth blocks say more than the others, so that prompts part there."""
    model = toy.model(layers=layers)
    with torch.no_grad():
        for layer in (2, 3):
            model.model.layers[layer].mlp.down_proj.weight.mul_(8.0)
    return model


def test_auto_freezes_what_was_located_and_restores_the_model():
    recipe, data = located()
    model = separated()
    before = toy.weights(model)
    model = recipe.setup(model)
    assert toy.identical(toy.weights(model), before)
    facts = recipe.facts()["freeze_layers"]
    start, end = facts["located_start"], facts["located_end"]
    frozen = {int(name.split(".")[2]) for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == set(range(start, end + 1)) and len(frozen) < 5
    again, _ = located()
    again.strategies[0].data = data  # the same lane
    data.refuses = None  # must not be asked again
    again.setup(separated())
    assert again.facts()["freeze_layers"]["located_start"] == start


def test_a_changed_model_is_measured_anew():
    asked = []

    def refuses(model, rows):
        asked.append(len(rows))
        return toy.refuses(model, rows)

    recipe, data = located(refuses)
    recipe.setup(separated())
    first = len(asked)
    assert first >= 2
    other, _ = located(refuses)
    other.strategies[0].data = data
    model = separated()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.01)
    other.setup(model)
    assert len(asked) > first


def test_no_gap_is_said_and_not_guessed():
    recipe, _ = located(onset=1.9)
    with pytest.raises(StrategyError, match=r"by more than onset=1\.9 \(largest gap .*give start and end"):
        recipe.setup(toy.model())


def test_auto_needs_safety_rows_and_no_other_range():
    with pytest.raises(StrategyError, match="freeze_layers needs safety rows"):
        check([("freeze_layers", {"range": "auto"})], 0, 1, 8, set())
    assert check([("freeze_layers", {"range": "auto"}), ("lora", {})], 3, 2, 8, {"safety"}) == []
    with pytest.raises(StrategyError, match="range=auto locates the layers"):
        build([("freeze_layers", {"range": "auto", "start": 1, "end": 2})])
    with pytest.raises(StrategyError, match="at least 2"):
        build([("freeze_layers", {"prompts": 1})])


def test_adapters_spare_located_layers():
    recipe = build([("lora", {"lora_r": 2}), ("freeze_layers", {"range": "auto", "onset": 0.0001})])
    recipe.prepare_data(toy.data())
    model = recipe.setup(separated())
    facts = recipe.facts()["freeze_layers"]
    adapted = {int(name.split("layers.")[1].split(".")[0]) for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == set(range(5)) - set(range(facts["located_start"], facts["located_end"] + 1))
