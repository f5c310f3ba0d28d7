"""What is done to a model so that it stays safe. `STRATEGIES` is the registry: one line per method."""

from __future__ import annotations

import importlib
from typing import Any

STRATEGIES: dict[str, str] = {
    "full": "strategies.full:Full",
    "low_rate": "strategies.low_rate:LowRate",
    "lora": "strategies.lora:Lora",
    "freeze_layers": "strategies.freeze_layers:FreezeLayers",
    "safe_instruct": "strategies.safe_instruct:SafeInstruct",
    "recovery": "strategies.recovery:Recovery",
    "refusal_training": "strategies.refusal_training:RefusalTraining",
    "prompt_template": "strategies.prompt_template:PromptTemplate",
    "safegrad": "strategies.safegrad:SafeGrad",
    "sap": "strategies.sap:Sap",
    "spard": "strategies.spard:Spard",
    "sbr": "strategies.sbr:Sbr",
    "constrained_sft": "strategies.constrained_sft:ConstrainedSft",
    "lisa": "strategies.lisa:Lisa",
    "ema": "strategies.ema:Ema",
    "one_shot_patch": "strategies.one_shot_patch:OneShotPatch",
    "curvature_restore": "strategies.curvature_restore:CurvatureRestore",
    "perturbation": "strategies.perturbation:Perturbation",
    "safe_lora": "strategies.safe_lora:SafeLora",
    "safemerge": "strategies.safemerge:SafeMerge",
    "resta": "strategies.resta:Resta",
    "enchtable": "strategies.enchtable:EnchTable",
    "lox": "strategies.lox:Lox",
    "lssf": "strategies.lssf:Lssf",
    "random_subspace": "strategies.random_subspace:RandomSubspace",
}


def get(name: str) -> Any:
    """The strategy class registered under `name`. Raises strategies.base.StrategyError with the nearest names."""
    if name not in STRATEGIES:
        from strategies.base import unknown

        raise unknown("strategy", name, STRATEGIES)
    module, _, cls = STRATEGIES[name].partition(":")
    return getattr(importlib.import_module(module), cls)
