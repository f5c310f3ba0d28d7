"""What doctor says of devices and memory, for a model known by its sizes and for machines that are made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_llama
import torch
from safetensors.torch import save_file

from orchestrator import config
from orchestrator.errors import ConfigError
from orchestrator.experiment import checks
from orchestrator.trial.engine import memory
from orchestrator.verbs import doctor

LLAMA_8B = 8_030_261_248
"""Weights of Llama 3.1 8B, as its model card and the sizes below give them."""
FULL = memory.Parameters(trained=LLAMA_8B, frozen=0, bytes_each=2, largest=128256 * 4096)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder that says what Llama 3.1 8B is and holds one number."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("llama")
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8, dtype="bfloat16").save_pretrained(folder)
    save_file({"lm_head.weight": torch.zeros(1)}, folder / "model.safetensors")  # sizes are read off the config
    tiny_llama.tokenizer().save_pretrained(folder)
    return folder


def experiment(model="pocket", **changes):
    return config.from_dict({"model": {"model_name_or_path": str(model), "dtype": "bfloat16"}, **changes})


def test_known_sizes_are_counted_without_weights(llama):
    from orchestrator.models import identity

    name = config.Model(model_name_or_path=str(llama), dtype="bfloat16")
    found = memory.count(identity.shape(name), [("full", {})])
    assert found == FULL
    adapters = memory.count(identity.shape(name), [("safegrad", {}), ("lora", {"lora_r": 16})])
    attention, mlp = 2 * (4096 + 4096) + 2 * (4096 + 1024), 3 * (4096 + 14336)
    assert adapters.trained == 32 * 16 * (attention + mlp) and adapters.frozen == LLAMA_8B and adapters.held == 2


def test_sixteen_bytes_a_weight_are_shared_by_stage_and_moved_by_offload():
    """Weights, gradients and Adam's moments in float32: 4 + 4 + 8 bytes (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054)."""
    need = {stage: memory.need(FULL, stage=stage, workers=8, bucket=1) for stage in (0, 1, 2, 3)}
    assert sum(need[0].device.values()) == pytest.approx(16 * LLAMA_8B, rel=1e-6)
    assert [need[s].device["moments"] / LLAMA_8B for s in (0, 1, 2, 3)] == pytest.approx([8, 1, 1, 1], rel=1e-6)
    assert [need[s].device["weights"] / LLAMA_8B for s in (0, 1, 2, 3)] == pytest.approx([4, 4, 4, 0.5], rel=1e-6)
    totals = [sum(need[s].device.values()) for s in (0, 1, 2, 3)]
    assert totals == sorted(totals, reverse=True)
    host = memory.need(FULL, stage=2, workers=8, bucket=1, offload_optimizer=True)
    assert not {"moments", "gradients", "float32 shards"} & set(host.device) and host.host["moments"] == need[2].device["moments"]
    both = memory.need(FULL, stage=3, workers=8, bucket=1, offload_optimizer=True, offload_param=True)
    assert set(both.device) == {"buffers"} and both.peak == both.whole == 4 * LLAMA_8B


def findings(made, what):
    return [(f.state, f.detail) for f in doctor.examine(made) if f.what == what]


def test_a_gpu_that_is_not_there_fails_before_anything_starts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ((state, detail),) = findings(experiment(ray={"use_gpu": True}), "gpu")
    assert state == "fail" and "set ray.use_gpu=false, or ray.address" in detail
    ((state, _),) = findings(experiment(ray={"use_gpu": True, "address": "auto"}), "gpu")
    assert state == "warn"
    assert findings(experiment(ray={"use_gpu": True}), "lanes")[0][0] == "fail"


def test_what_would_not_fit_on_a_card_is_a_number(monkeypatch, llama):
    """A machine of two cards of 24 GiB, made up."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    card = SimpleNamespace(total_memory=24 * 2**30)
    for name, value in {
        "device_count": lambda: 2, "get_device_name": lambda i: "Card", "is_bf16_supported": lambda: True, "get_device_properties": lambda i: card,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=512 * 2**30, available=500 * 2**30))
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    made = experiment(
        llama, recipes=[["full"], ["lora"]], training={"bf16": True}, deepspeed={"zero_optimization": zero},
        ray={"use_gpu": True, "num_workers": 2, "cpus_per_worker": 4},
    )  # fmt: skip
    assert findings(made, "worker") == [
        ("ok", "1 GPU, 4 CPU, bf16 compute with float32 weights; NCCL, ZeRO stage 3, optimizer in host memory, torch's AdamW")
    ]
    assert findings(made, "lanes") == [("ok", "1 lane of 2 workers (4 CPUs and 1 GPU each) on 8 CPUs and 2 GPUs")]
    assert checks._slow_host(made) == [
        "with offload_optimizer AdamW runs on the CPU, and training.torch_threads=1 leaves it one thread; set training.torch_threads=4"
    ]
    full, lora = findings(made, "memory")
    assert full[0] == "fail" and "29.9 GiB with the model still whole" in full[1] and "the GPU has 24.0 GiB: take lora" in full[1]
    assert lora[0] == "ok" and lora[1].startswith("lora: 15.0 GiB of a GPU")


def test_two_workers_of_a_lane_do_not_share_a_gpu():
    with pytest.raises(ConfigError, match=r"ray.gpus_per_worker=0.5 may put two .* set ray.gpus_per_worker=1, or ray.num_workers=1"):
        checks.check_combinations(experiment(ray={"use_gpu": True, "gpus_per_worker": 0.5, "num_workers": 2}))
    checks.check_combinations(experiment(ray={"use_gpu": True, "gpus_per_worker": 0.5}))
