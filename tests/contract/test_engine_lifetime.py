"""Many engines in one process, as in a lane: nothing is left behind; bfloat16; misuse."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import engine_cases
import psutil
import pytest
import torch
import toy

from orchestrator.errors import ConfigError
from orchestrator.trial.engine import memory
from orchestrator.trial.engine.deepspeed import DeepSpeedEngine


def once(stage, **changes):
    """Build, one step, export, close; weak references to what must be gone, and what is kept."""
    data = engine_cases.rows(0, 1)
    engine = engine_cases.make(stage, toy.model(layers=1), 0, 1, **changes)
    engine_cases.plain(engine, data, 0)
    engine.step()
    inside = [weakref.ref(engine._ds), weakref.ref(engine._optimizer)]
    whole = engine.export()
    engine.close()
    return inside, whole


@pytest.mark.parametrize("stage", (0, 1, 2, 3, *engine_cases.OFFLOADED))
def test_a_closed_engine_is_gone_while_its_model_lives(stage):
    inside, whole = once(stage)
    assert torch.nn.functional.linear is torch._C._nn.linear, "stage 3 left its own linear function to the process"
    gc.collect()
    assert [ref() for ref in inside] == [None, None]
    assert whole(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, toy.VOCABULARY)


def test_thirty_engines_leave_no_memory_behind():
    process = psutil.Process()
    for stage in (0, 1, 2, 3):
        once(stage)
    before, tensors = process.memory_info().rss, _tensors()
    for i in range(30):
        once((1, 2, 0, 3)[i % 4 if i % 10 == 0 else i % 3])
    gc.collect()
    assert _tensors() <= tensors + 50
    assert process.memory_info().rss - before < 60 * 2**20


def _tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_an_engine_dropped_in_the_middle_of_a_step_does_not_harm_the_next():
    data, wanted = engine_cases.rows(0, 1), engine_cases.run(None, 0, 1)[0]
    for stage in (0, 2, 3):
        engine = engine_cases.make(stage, toy.model(layers=2), 0, 1)
        engine_cases.plain(engine, data, 0)
        engine.close()
        assert toy.largest_difference(engine_cases.run(stage, 0, 1)[0], wanted) < 1e-5


def allocated() -> int:
    """Bytes of all tensors of the process, views counted once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor) and found.device.type != "meta":
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("stage", (1, 2, 3, "1, optimizer on the host", "2, optimizer on the host", "3, both on the host"))
def test_an_engine_allocates_what_was_foretold(stage):
    once(1)  # the first engine of a process puts what is there out of the collector's sight
    number, keys = engine_cases.OFFLOADED.get(stage, (stage, ()))
    data, before = engine_cases.rows(0, 1), allocated()
    model = toy.model(layers=2, hidden=64)
    offload = {key: key in keys for key in ("offload_optimizer", "offload_param")}
    foretold = memory.need(memory.count(model, [("full", {})]), stage=number, bucket=4000, **offload)
    engine = engine_cases.make(stage, model, 0, 1)
    engine_cases.plain(engine, data, 0)
    engine.step()
    engine_cases.plain(engine, data, 1)
    measured = allocated() - before
    engine.close()
    found = [{**foretold.device, **foretold.host}[name] for name in ("weights", "float32 shards", "gradients", "moments")]
    whole = foretold.whole if stage == 1 else 0  # its gradient before it is reduced is gone by now
    assert measured == pytest.approx(sum(found) - whole, rel=0.05)


@pytest.mark.parametrize("stage", (2, "2, optimizer on the host", "3, both on the host"))
def test_adapters_in_float32_train_on_a_model_in_bfloat16(stage):
    recipe = (("lora", {"lora_r": 4}),)
    wanted, wanted_logs = engine_cases.run(None, 0, 1, recipe=recipe, bf16=True, dtype=torch.bfloat16)
    weights, logs = engine_cases.run(stage, 0, 1, recipe=recipe, bf16=True, dtype=torch.bfloat16)
    assert {name: w.dtype for name, w in weights.items()} == {name: w.dtype for name, w in wanted.items()}
    assert {w.dtype for w in weights.values()} == {torch.float32, torch.bfloat16}
    assert [log["grad_norm"] for log in logs] == pytest.approx([log["grad_norm"] for log in wanted_logs], rel=2e-2)


@pytest.mark.parametrize("stage", (0, 1, 2, 3, "3, both on the host"))
def test_bf16_matches_plain_autocast(stage):
    weights, logs = engine_cases.run(stage, 0, 1, bf16=True)
    wanted, wanted_logs = engine_cases.run(None, 0, 1, bf16=True)
    assert toy.largest_difference(weights, wanted) < 2e-4
    assert [log["grad_norm"] for log in logs] == pytest.approx([log["grad_norm"] for log in wanted_logs], rel=2e-2)
    assert {w.dtype for w in weights.values()} == {torch.float32}
    exact, _ = engine_cases.run(None, 0, 1)
    assert toy.largest_difference(wanted, exact) > 0  # bfloat16 was at work


def test_workers_without_a_process_group_and_contradictions_are_refused():
    with pytest.raises(ConfigError, match="contradicts training.max_grad_norm"):
        DeepSpeedEngine(toy.model(), training=engine_cases.settings(), deepspeed={"gradient_clipping": 3.0}, max_steps=1)
    with pytest.raises(ConfigError, match=r"2 workers need an initialised|has 1 workers, the engine was told 2"):
        DeepSpeedEngine(toy.model(), training=engine_cases.settings(), deepspeed={}, max_steps=1, world_size=2)


def test_a_save_of_another_stage_is_refused(tmp_path):
    from strategies.checkpoint import CheckpointError

    first = engine_cases.make(1, toy.model(layers=1), 0, 1)
    first.save(tmp_path)
    first.close()
    second = engine_cases.make(3, toy.model(layers=1), 0, 1)
    with pytest.raises(CheckpointError, match="of another training"):
        second.load(tmp_path)
    second.close()


def test_settings_are_those_of_the_config():
    """The stand-in for `config.Training` names real fields only."""
    from orchestrator.config import Training

    assert isinstance(engine_cases.settings(), SimpleNamespace)
    assert set(vars(engine_cases.settings())) <= set(Training.model_fields)
