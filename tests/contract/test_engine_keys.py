"""The keys of `zero_optimization` that we know are those DeepSpeed knows."""

from __future__ import annotations

from orchestrator.config import deepspeed_keys


def test_the_installed_deepspeed_knows_the_same_keys():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = deepspeed_keys.ZERO_FLAGS | deepspeed_keys.ZERO_NUMBERS | deepspeed_keys.ZERO_OTHERS
    assert {*fields, *(f.alias for f in fields.values() if f.alias)} == known
    offload = {*DeepSpeedZeroOffloadOptimizerConfig.model_fields, *DeepSpeedZeroOffloadParamConfig.model_fields}
    assert offload == deepspeed_keys.OFFLOAD_FLAGS | deepspeed_keys.OFFLOAD_NUMBERS | deepspeed_keys.OFFLOAD_OTHERS
