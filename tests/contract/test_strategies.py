"""What every registered strategy must keep. A strategy missing from the registry, the spaces or the cards fails here."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from pathlib import Path

import pytest
import torch
import toy

import search_spaces
import strategies
from strategies import cards
from strategies.base import Strategy
from strategies.plain import PlainEngine
from strategies.recipe import build

NAMES = tuple(strategies.STRATEGIES)
FOLDER = Path(strategies.__file__).parent
NEUTRAL = {
    "full": {},
    "low_rate": {},  # acts through the searched learning rate alone
    "safe_instruct": {"share": 0.0},
    "recovery": {"share": 0.0},
    "safegrad": {"rho": 0.0, "projection": False},
    "sap": {"beta": 0.0},
    "spard": {"radius": 0.0},
    "sbr": {"weight": 0.0},
    "constrained_sft": {"beta": 0.0},
    "lisa": {"align_steps": 0},
    "ema": {"decay": 0.0},
    "prompt_template": {"form": "given", "train_system_prompt": None},
    "perturbation": {},  # acts on generation alone
    "one_shot_patch": {"steps": 0},
    "curvature_restore": {"radius": 0.0},
    "refusal_training": None,  # other rows are trained on
    "safe_lora": {"number": 0},
    "safemerge": {"weight": 1.0},
    "resta": {"gamma": 0.0},
    "enchtable": {"beta": 0.0},
    "lox": {"coef": 0.0},
    "lssf": {"alpha": 0.0},
    "random_subspace": {"strength": 0.0},
    "freeze_layers": None,  # frozen layers have no strength
    "lora": None,  # adapters replace the weights; there is no LoRA that is full fine-tuning
}
"""Knobs at which a strategy is plain fine-tuning; None where there are none. A new strategy must be added, or its test fails."""
VERBS = {
    "gradient", "gradients", "combine", "shifted", "zero", "weights", "linear", "move", "sensitivity", "rank", "world_size", "max_steps",
}  # fmt: skip
SMALL = {
    "prompt_template": {"form": "given", "train_system_prompt": "be safe"},
    "refusal_training": {"loss": "dpo"},
    "curvature_restore": {"steps": 2, "num_rows": 8},
    "safegrad": {"num_safety": 6, "safety_batch_size": 2},
    "sap": {"num_pairs": 6, "pairs_per_step": 3},
    "spard": {"share": 0.1},
    "sbr": {"num_anchors": 3},
    "safemerge": {"safe_steps": 3, "safe_rank": 2, "num_safety": 6},
    "resta": {"harmful_steps": 3, "harmful_rank": 2, "num_harmful": 6},
    "enchtable": {"harmful_steps": 3, "harmful_rank": 2, "num_harmful": 6},
    "lox": {"rank": 2},
    "lora": {"lora_r": 2},
}


class Watched:
    """An engine that knows the protocol's names and nothing else."""

    def __init__(self, engine):
        self._engine, self.used = engine, []

    def __getattr__(self, name):
        assert name in VERBS, f"a strategy may not use engine.{name}"
        self.used.append(name)
        return getattr(self._engine, name)


def trained(name: str, knobs=None, *, steps=3, watch=False, module=None):
    """(weights, recipe, engine's model) after `steps` steps under PlainEngine."""
    recipe = build([(name, SMALL.get(name, {}) | (knobs or {}))])
    data = recipe.prepare_data(toy.data())
    module = recipe.setup(module if module is not None else toy.model())
    engine = PlainEngine(module, training=toy.settings(), max_steps=steps)
    door = Watched(engine) if watch else engine
    for step in range(steps):
        metrics = recipe.step(door, data.batches(data.task, step), step)
        assert metrics["loss"] > 0 and all(isinstance(v, float) for v in metrics.values())
        engine.step()
        recipe.after_step(door, step)
    recipe.end(door)
    finished = recipe.finish(engine.export())
    return toy.weights(finished), recipe, finished


@pytest.fixture(scope="module")
def plain_weights():
    return trained("full")[0]


def test_the_registry_is_complete():
    files = {p.stem for p in FOLDER.glob("*.py")}
    defined = {
        stem for stem in files for line in (FOLDER / f"{stem}.py").read_text().splitlines() if line.startswith("class ") and "(Strategy):" in line
    }
    assert defined == set(NAMES)
    assert set(NEUTRAL) == set(NAMES)
    for name in NAMES:
        assert issubclass(strategies.get(name), Strategy) and strategies.get(name).name == name


@pytest.mark.parametrize("name", NAMES)
def test_the_card_has_every_heading(name):
    card = cards.card(name)
    assert tuple(card) == ("Title", *cards.HEADINGS)
    for field in dataclasses.fields(strategies.get(name).Config):
        assert field.name in card["Knobs"], f"the card says nothing of the knob {field.name}"
    for need in strategies.get(name).needs:
        assert need in card["Needs"]


@pytest.mark.parametrize("name", NAMES)
def test_config_is_frozen_constructible_and_explained(name):
    cls = strategies.get(name).Config
    config = cls()
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    for field in dataclasses.fields(cls):
        assert field.metadata.get("help", "").endswith("."), f"{name}.{field.name} has no help"
        assert field.name in typing.get_type_hints(cls)
    assert strategies.get(name)(config).config == strategies.get(name)().config


@pytest.mark.parametrize("name", NAMES)
def test_the_search_space_holds_knobs_and_its_defaults(name):
    knobs = {f.name for f in dataclasses.fields(strategies.get(name).Config)}
    for layers in (1, 2, 3, 8, 32, 80):
        space = search_spaces.space([name], num_layers=layers, learning_rate=1e-3)
        defaults = search_spaces.defaults([name], num_layers=layers, learning_rate=1e-3)
        assert set(space) == set(defaults)
        assert {key.partition(".")[2] for key in space if "." in key} <= knobs
        for key, value in defaults.items():
            assert space[key]._contains(space[key].to_internal_repr(value)), f"{key}={value} is outside {space[key]}"
        build([(name, search_spaces.to_spec([name], defaults)[0][name])])


@pytest.mark.parametrize("name", NAMES)
def test_strength_zero_is_plain_fine_tuning_bit_for_bit(name, plain_weights):
    if NEUTRAL[name] is None:
        assert "strength" not in {f.name for f in dataclasses.fields(strategies.get(name).Config)}
        return
    assert toy.identical(trained(name, NEUTRAL[name])[0], plain_weights)


@pytest.mark.parametrize("name", NAMES)
def test_trains_within_the_protocol_and_leaves_nothing_behind(name, plain_weights):
    weights, recipe, module = trained(name, watch=True)
    if name not in ("full", "low_rate") and strategies.get(name).wrap is Strategy.wrap:  # a defence at inference leaves the weights alone
        assert not toy.identical(weights, plain_weights), f"{name} did nothing at its defaults"
    for part in module.modules():
        assert not (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks)
    assert all(p.grad is None for p in module.parameters())
    assert not {key for p in module.parameters() for key in vars(p)}
    json.dumps(recipe.facts())


@pytest.mark.parametrize("name", NAMES)
def test_setup_changes_no_weight_unless_it_says_so_and_keeps_the_mode(name):
    from strategies.blocks import original_name

    module = toy.model()
    before = toy.weights(module)
    recipe = build([(name, SMALL.get(name, {}))])
    recipe.prepare_data(toy.data())
    module = recipe.setup(module)
    after = {original_name(n): p for n, p in module.named_parameters() if "lora_" not in n}
    assert toy.identical(before, after) != strategies.get(name).changes_start
    assert module.training and all(p.training for p in module.modules())


@pytest.mark.parametrize("name", NAMES)
def test_setup_is_the_same_twice(name):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        recipe = build([(name, SMALL.get(name, {}))])
        recipe.prepare_data(toy.data())
        results.append(toy.weights(recipe.setup(toy.model())))
    assert toy.identical(*results)


@pytest.mark.parametrize("name", NAMES)
def test_resume_equals_uninterrupted_bit_for_bit(name, tmp_path):
    whole, recipe, _ = trained(name)
    facts = recipe.facts()

    def start():
        recipe = build([(name, SMALL.get(name, {}))])
        data = recipe.prepare_data(toy.data())
        return recipe, data, PlainEngine(recipe.setup(toy.model()), training=toy.settings(), max_steps=3)

    recipe, data, engine = start()
    recipe.step(engine, data.batches(data.task, 0), 0)
    engine.step()
    recipe.after_step(engine, 0)
    engine.save(tmp_path, {"strategies": recipe.state_dict()})
    recipe, data, engine = start()
    recipe.load_state_dict(engine.load(tmp_path)["strategies"])
    for step in (1, 2):
        recipe.step(engine, data.batches(data.task, step), step)
        engine.step()
        recipe.after_step(engine, step)
    recipe.end(engine)
    assert toy.identical(toy.weights(recipe.finish(engine.export())), whole)
    assert recipe.facts() == facts


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_round(name):
    recipe = trained(name)[1]
    state = recipe.state_dict()
    other = build([(name, SMALL.get(name, {}))])
    other.load_state_dict(state)
    assert other.state_dict() == state


@pytest.mark.parametrize("name", NAMES)
def test_phases_take_what_the_base_class_says(name):
    cls = strategies.get(name)
    for phase in ("check", "prepare_data", "setup", "step", "after_step", "end", "finish", "system_prompt", "wrap", "state_dict", "load_state_dict"):
        assert list(inspect.signature(getattr(cls, phase)).parameters) == list(inspect.signature(getattr(Strategy, phase)).parameters)
    assert 0 <= cls.max_zero_stage <= 3 and (cls.max_zero_stage == 3 or cls.zero_reason)
