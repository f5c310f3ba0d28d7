"""Settings that are words or numbers of the right kind and still mean nothing to this model, this transformers or this experiment."""

from __future__ import annotations

import os
from typing import Any

from orchestrator.config import Escalation, Experiment, recipe_items
from orchestrator.errors import ConfigError, ModelError, UnknownNameError, brief

POCKET_LAYERS = 6
"""Decoder layers of the embedded model, known before it is built (and without importing what builds it)."""


def check_attention(experiment: Experiment) -> None:
    """`model.attn_implementation` is one that transformers has, or the `owner/name` of a kernel on the hub. Raises UnknownNameError."""
    wanted = experiment.model.attn_implementation
    if wanted is None or "/" in wanted:
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
    if wanted not in known:
        raise UnknownNameError("model.attn_implementation", wanted, known)


def check_escalation(experiment: Experiment) -> None:
    """What `monitor.on_breach` would add is a strategy with knobs it knows, also where nothing is watched yet. Raises ConfigError."""
    found = experiment.monitor.on_breach
    if not isinstance(found, Escalation):
        return
    import strategies
    import strategies.recipe
    from strategies.base import StrategyError

    for name, knobs in recipe_items((found.add,)):
        if name not in strategies.STRATEGIES:
            raise UnknownNameError("strategy in monitor.on_breach.add", name, strategies.STRATEGIES)
        try:
            strategies.recipe.build([], [(name, knobs)])
        except StrategyError as error:
            raise ConfigError(f"monitor.on_breach.add: {error}") from None


def check_before_building(experiment: Experiment) -> None:
    """What does not wait for the embedded world to be built: another model, a chat template of the config's own, and the search's ranges.

    Raises ConfigError (or a subclass).
    """
    from orchestrator.search import spaces

    name = experiment.model.model_name_or_path
    if name == "pocket" or name.startswith("pocket:"):
        if experiment.model.chat_template:
            from orchestrator.data import template_limits
            from orchestrator.models import loading

            tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}  # whatever they are, a template that works takes these
            template_limits.check(loading.template(experiment.model.chat_template), tokens, "model.chat_template")
        spaces.resolve_space(experiment, POCKET_LAYERS)
        return
    from orchestrator.experiment import checks_model

    spaces.resolve_space(experiment, checks_model.check(experiment.model)[0])
    check_adapters(experiment)
    check_methods(experiment)


def check_methods(experiment: Experiment) -> list[str]:
    """Every recipe's methods, with those that a breach adds, can work on the model's architecture; returns warnings. Raises ConfigError."""
    import strategies.recipe
    from orchestrator.experiment import checks_model
    from strategies.base import StrategyError

    recipes = {}
    for name, recipe in zip(experiment.recipe_names, experiment.recipes, strict=True):
        try:
            recipes[name] = strategies.recipe.build(recipe_items(recipe), experiment.monitor.added)
        except StrategyError as error:
            raise ConfigError(f"recipes: [{name}]: {error}") from error
    return checks_model.check_methods(experiment.model, recipes)


def check_database(experiment: Experiment) -> None:
    """MLflow's sqlite file lies where MLflow finds it: it reads `%20`, `#` and `?` in a path as parts of an address, waits two minutes for a
    folder of another name, or writes into one. Raises ConfigError."""
    from orchestrator.tracking import connect

    if not experiment.tracking.enabled:
        return
    uri = connect.resolve_uri(experiment, experiment.output_dir)
    named = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    where = uri.removeprefix("sqlite:///").partition("?" if named else "\0")[0]
    if uri.startswith("sqlite:///") and (odd := next((sign for sign in "%#?" if sign in where), None)) is not None:
        remedy = "correct tracking.uri" if named else "name output.dir below a folder without it, or set tracking.uri"
        raise ConfigError(f"MLflow's database would be {brief(where)}, and MLflow reads {odd} in a path as a sign of an address; {remedy}")


def idle_monitor(experiment: Experiment) -> list[str]:
    """A warning where something is to be done at a breach and nothing is watched."""
    monitor = experiment.monitor
    if monitor.every_steps or monitor.on_breach == "log":
        return []
    return ["monitor.on_breach never acts, as monitor.every_steps=0 asks nothing during training; set monitor.every_steps, e.g. 50"]


def check_adapters(experiment: Experiment) -> None:
    """Every module that lora is to adapt is one of the model's, and no rank is above its width. Raises ConfigError."""
    wanted = [(name, dict(knobs)) for recipe in experiment.recipes for name, knobs in recipe_items(recipe) if name == "lora"]
    if not wanted:
        return
    from orchestrator.models import identity

    width = identity.architecture(experiment.model).get("hidden_size")
    for _, knobs in wanted:
        for rank in _ranks(experiment, knobs):
            if isinstance(width, int) and isinstance(rank, int | float) and rank > width:
                raise ConfigError(f"lora.lora_r={rank}: the model is {width} wide, and a higher rank holds more than its weights; lower it")
        targets = knobs.get("target_modules")
        names = [part.strip() for part in targets.split(",")] if isinstance(targets, str) else list(targets or ())
        if names and names != ["all-linear"]:
            _check_targets(identity.shape(experiment.model), names)


def _ranks(experiment: Experiment, knobs: dict[str, Any]) -> list[Any]:
    space = experiment.search.space.get("lora.lora_r")
    if "lora_r" in knobs:
        return [knobs["lora_r"]]
    if isinstance(space, dict):
        return [*(space.get("choices") or ()), space.get("high")]
    return [space]


def _check_targets(network: Any, names: list[str]) -> None:
    from strategies import lora_targets

    every = lora_targets.ends(network)
    if not every:
        raise ModelError("lora: this model has no linear layer inside its decoder blocks that could be adapted; leave lora out of the recipes")
    for name in names:
        if name not in every:
            raise UnknownNameError("module in lora.target_modules", name, {*every, "all-linear"})
