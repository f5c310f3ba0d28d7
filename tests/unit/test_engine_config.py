"""What a user may write under `deepspeed:`; nothing of DeepSpeed is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from orchestrator.config import Training
from orchestrator.config import deepspeed as engine_config
from orchestrator.errors import ConfigError

TRAINING = Training(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=0.7)


@pytest.mark.parametrize(
    "deepspeed",
    [
        {},
        {"zero_optimization": {"stage": 3, "overlap_comm": True, "offload_optimizer": {"device": "none"}}, "steps_per_print": 5},
        {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}},
        {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 0.7, "bf16": {"enabled": False}},
        {"fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16}, "bf16": {"enabled": "auto"}},
        {"fp16": {"loss_scale": 0}, "tensorboard": {"output_path": "x"}, "amp": {"enabled": "auto"}},
        {"fp16": {"enabled": False}, "zero_allow_untested_optimizer": True},
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu", "pin_memory": False}, "cpu_offload": False}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}},
    ],
)
def test_configs_that_agree_are_taken(deepspeed):
    engine_config.validate(deepspeed, TRAINING)


@pytest.mark.parametrize(
    "deepspeed, message",
    [
        ({"optimizer": {"type": "AdamW"}}, "deepspeed.optimizer cannot be used: AdamW comes from training.learning_rate"),
        ({"optimizer": {"type": "Adam", "params": {"lr": "auto", "weight_decay": "auto"}}}, "remove deepspeed.optimizer"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "remove deepspeed.optimizer"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-5, "weight_decay": "auto"}}}, "lr=3e-05 contradicts training.learning_rate=0.002"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "eps": 1e-6}}}, "eps=1e-06 contradicts AdamW=1e-08"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "x": 1}}}, "params.x cannot be used"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}, "scheduler.params.warmup_num_steps=auto is filled by nothing"),
        ({"fp16": {"enabled": "yes"}}, "fp16.enabled='yes' is not true, false or auto"),
        ({"bf16": True}, "deepspeed.bf16=True is not a mapping"),
        ({"zero_optimization": [1]}, "is not a mapping"),
        ({"zero_optimization": {"stage": "auto"}}, "stage='auto' is not 0, 1, 2 or 3; nothing here says which"),
        ({"zero_optimization": {"stage": True}}, "stage=True is not 0"),
        ({"zero_optimization": {"stage": "2"}}, "stage='2' is not 0"),
        ({"zero_optimization": {"stag": 2}}, "did you mean stage"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}}, "sub_group_size=auto is filled by nothing"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "yes"}}, "overlap_comm='yes' is not true or false"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8"}}, "reduce_bucket_size='5e8' is not a number"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "auto"}}}, "offload_param.device=auto is filled by nothing"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"devcie": "cpu"}}}, "did you mean device"),
        ({"steps_per_print": "auto"}, "steps_per_print=auto is filled by nothing"),
        ({"tensorboard": {"enabled": "auto"}}, "tensorboard.enabled=auto is filled by nothing"),
        ({"gradient_clipping": True}, "contradicts training.max_grad_norm"),
        ({"flops_profiler": 3}, "is not a mapping"),
        ({"scheduler": {"type": "WarmupLR"}}, "training.lr_scheduler_type"),
        ({"fp16": {"enabled": True}}, "use training.bf16=true"),
        ({"bf16": {"enabled": True}}, "deepspeed.bf16.enabled=True contradicts training.bf16=False"),
        ({"gradient_clipping": 1.0}, "deepspeed.gradient_clipping=1.0 contradicts training.max_grad_norm=0.7"),
        ({"train_micro_batch_size_per_gpu": 8}, "contradicts training.per_device_train_batch_size=4"),
        ({"gradient_accumulation_steps": 1}, "contradicts training.gradient_accumulation_steps=2"),
        ({"train_batch_size": 8}, "contradicts training's batch size x accumulation x ray.num_workers=16"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean zero_optimization"),
        ({"zero_optimization": {"stage": 4}}, "stage=4 is not 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "needs zero_optimization.stage 1, 2 or 3, not 0"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "stage 3, or leave weights on the device and offload"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "use device: cpu, or more workers"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "no strategy can reach it"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "disk"}}}, "device='disk' is not cpu or none"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": True}}, "write {device: cpu}"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.4}}}, "use ratio 1, or no offload"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}}, "super_offload steps outside"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}, "ignore_unused_parameters": False}}, "remove it"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "write offload_optimizer: {device: cpu}"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "quantised weights"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}, "second copies"),
        ({"gradient_allreduce_op": "sum"}, "must be mean"),
        ({"tensor_parallel": {"autotp_size": 2}}, "remove deepspeed.tensor_parallel"),
    ],
)
def test_contradictions_name_key_value_and_remedy(deepspeed, message):
    with pytest.raises(ConfigError) as error:
        engine_config.validate(deepspeed, TRAINING, num_workers=2)
    assert message in str(error.value)


HUGGING_FACE = {
    "stage 2": {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
        "zero_optimization": {
            "stage": 2, "allgather_partitions": True, "allgather_bucket_size": 2e8, "overlap_comm": True, "reduce_scatter": True,
            "reduce_bucket_size": "auto", "contiguous_gradients": True,
        },
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000, "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
    },
    "stage 3": {
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "none", "pin_memory": True}, "offload_param": {"device": "none", "pin_memory": True},
            "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
    },
}  # fmt: skip
"""As they are published for `Trainer`, without the scheduler."""


@pytest.mark.parametrize("name", HUGGING_FACE)
@pytest.mark.parametrize("bf16", [False, True])
def test_hugging_faces_files_mean_what_training_says(name, bf16):
    training = Training(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=0.7, bf16=bf16)
    engine_config.validate(HUGGING_FACE[name], training, 2)
    given = engine_config.complete(HUGGING_FACE[name], training, 2)
    assert "auto" not in repr(given) and "fp16" not in given and "optimizer" not in given
    assert given["zero_optimization"]["stage"] == int(name[-1]) and given["train_batch_size"] == 8
    assert "reduce_bucket_size" not in given["zero_optimization"], "the engine's own"


def test_a_scheduler_of_deepspeeds_is_refused_by_name():
    body = {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0}}}
    with pytest.raises(ConfigError, match="deepspeed.scheduler cannot be used: the rate's shape is training.lr_scheduler_type"):
        engine_config.validate(body, TRAINING)


def test_what_deepspeed_is_given():
    user = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}, "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}
    made = engine_config.complete(user, TRAINING, world_size=2)
    assert made["gradient_clipping"] == 0.0  # DeepSpeed's own default is 1.0
    assert (made["gradient_accumulation_steps"], made["train_micro_batch_size_per_gpu"], made["train_batch_size"]) == (1, 4, 8)
    assert made["zero_optimization"]["reduce_bucket_size"] == 1000 and "bf16" not in made
    made["zero_optimization"]["reduce_bucket_size"] = 1
    assert user["zero_optimization"]["reduce_bucket_size"] == 1000
    assert engine_config.complete({}, TRAINING, 1)["zero_optimization"] == {"stage": 0}


def test_what_deepspeed_is_given_to_offload():
    def made(stage, **more):
        zero = {"stage": stage, "offload_optimizer": {"device": "cpu", "pin_memory": False}, "offload_param": {"device": "none"}}
        return engine_config.complete({"zero_optimization": zero, **more}, TRAINING, world_size=2)

    for stage in (1, 2, 3):
        config = made(stage)
        assert config["zero_optimization"] == {"stage": stage, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
        assert config["zero_force_ds_cpu_optimizer"] is False  # DeepSpeed's default would refuse torch's AdamW
    asked = made(2, zero_force_ds_cpu_optimizer=True)
    assert asked["zero_force_ds_cpu_optimizer"] is True
    assert "compiles" in engine_config.warnings(asked)[0] and not engine_config.warnings(made(2))
    assert "zero_force_ds_cpu_optimizer" not in engine_config.complete({"zero_optimization": {"stage": 2}}, TRAINING, 2)


def test_validation_imports_nothing_heavy():
    code = "import sys, orchestrator.config.deepspeed; print([n for n in ('torch', 'deepspeed') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
