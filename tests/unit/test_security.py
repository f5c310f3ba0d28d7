"""What an attacker, or a careless config, can plant: pickles that run code, paths out of the output folder, secrets in the config."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import made_up
import pytest
import tiny_llama

from orchestrator import config
from orchestrator.config import Model
from orchestrator.data import rows
from orchestrator.errors import ConfigError, DataError, ModelError, StorageError
from orchestrator.models import identity, loading, saving, subjects, weights
from orchestrator.tracking import spool
from orchestrator.trial import shared_training

SECRET = "hunter2hunter2"


# --- pickles ---


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def canary(tmp_path):
    """A function that plants a pickle which makes a file when it is read in full; after the test nothing has made it."""
    sign = tmp_path / "canary"
    bomb = pickle.dumps(Canary(sign))
    pickle.loads(bomb)
    assert sign.exists(), "the pickle works"
    sign.unlink()

    def plant(path: Path, torch_format: bool = False) -> Path:
        import torch

        path.parent.mkdir(parents=True, exist_ok=True)
        if torch_format:
            torch.save({"weights": [Canary(sign)]}, path)
        else:
            path.write_bytes(bomb)
        return path

    yield plant
    assert not sign.exists(), "a planted pickle was executed"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny_llama.saved(tmp_path_factory.mktemp("model"))


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and len(text) < 500, text
    return text


@pytest.mark.parametrize("torch_format", [False, True])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth", "model.safetensors"])
def test_pickled_weights_of_a_model_are_refused(canary, whole, tmp_path, name, torch_format):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in whole.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    canary(folder / name, torch_format)
    for read in (lambda: loading.load(Model(model_name_or_path=str(folder))), lambda: saving.attach(folder, Model(model_name_or_path=str(whole)))):
        with pytest.raises(ModelError, match="is no safetensors file" if name == "model.safetensors" else f"{name}.*can run code") as caught:
            read()
        assert str(folder) in one_sentence(caught.value)
    with pytest.raises(ModelError, match="no safetensors|can run code"):
        weights.of_name(str(folder), Model(model_name_or_path=str(whole)))


def test_pickles_beside_safetensors_are_not_read(canary, whole, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in whole.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt", "tokenizer.pkl", "vocab.pkl"):
        canary(folder / name)
    network, _ = loading.load(Model(model_name_or_path=str(folder)))
    assert sum(p.numel() for p in network.parameters()) > 0
    assert identity.model_hash(str(folder)) == identity.model_hash(str(whole))


@pytest.mark.parametrize("torch_format", [False, True])
def test_a_pickled_adapter_is_refused(canary, whole, tmp_path, torch_format):
    from peft import LoraConfig

    folder = tmp_path / "adapter"
    LoraConfig(base_model_name_or_path=str(whole), target_modules=["q_proj"]).save_pretrained(folder)
    canary(folder / "adapter_model.safetensors", torch_format)
    with pytest.raises(ModelError, match="adapter_model.safetensors is no safetensors file"):
        saving.attach(folder, Model(model_name_or_path=str(whole)))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    for read in (lambda: saving.attach(folder, Model(model_name_or_path=str(whole))), lambda: subjects.load(str(folder), Model())):
        with pytest.raises(ModelError, match="can run code") as caught:
            read()
        assert "adapter_model.bin" in one_sentence(caught.value)


@pytest.mark.parametrize("torch_format", [False, True])
def test_a_planted_checkpoint_is_refused(canary, tmp_path, torch_format):
    from strategies import checkpoint, markers

    signature = {"engine": "plain"}
    checkpoint.write(tmp_path / "checkpoint", {"weights": []}, step=5, rank=0, world_size=1, signature=signature)
    (shards,) = (tmp_path / "checkpoint").glob("step-*/rank-0.pt")
    canary(shards, torch_format)
    found = checkpoint.read(tmp_path / "checkpoint", rank=0, world_size=1, signature=signature)
    assert found.step is None and "SHA-256 differs" in found.trouble and "starts over" in found.trouble
    marker = json.loads((tmp_path / "checkpoint" / "latest").read_text())
    for path in (tmp_path / "checkpoint" / "latest", shards.with_name("whole.json")):  # planted with all its hashes
        path.write_text(json.dumps(markers.seal(marker | {"sha256": {"rank-0.pt": markers.file_hash(shards)}})))
    found = checkpoint.read(tmp_path / "checkpoint", rank=0, world_size=1, signature=signature)
    assert found.step is None and "something else than tensors and plain values" in found.trouble


def test_a_checkpoint_cannot_point_elsewhere(canary, tmp_path):
    from strategies import checkpoint

    canary(tmp_path / "elsewhere" / "rank-0.pt", True)
    marker = {"step": 5, "world_size": 1, "signature": {}, "folder": "../elsewhere"}
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "latest").write_text(json.dumps(marker))
    found = checkpoint.read(tmp_path / "checkpoint", rank=0, world_size=1, signature={})
    assert found.step is None and "is damaged" in found.trouble


def test_planted_files_of_the_caches_are_not_unpickled(canary, tmp_path, monkeypatch):
    """Baselines, shared trainings, the tracking queue, the study: each is text or safetensors, and says so when it is not."""
    from orchestrator.experiment import baseline
    from orchestrator.search import studies

    monkeypatch.setenv("SAFEBASIN_CACHE", str(tmp_path / "cache"))
    experiment = made_up.experiment(tmp_path)
    monkeypatch.setattr(baseline, "key", lambda experiment: "k")
    record = canary(baseline.path(experiment))
    assert record.is_relative_to(tmp_path / "cache") and baseline.recall(record) is None and not record.exists(), "measured anew"

    canary(tmp_path / "trained" / "x" / "weights.safetensors")
    (tmp_path / "trained" / "x" / "facts.json").write_text('{"steps": 1, "trial_id": "t1", "strategies": {}, "monitor": {}}')
    import torch

    with pytest.raises(ValueError, match="no safetensors file.*remove"):
        shared_training.read(tmp_path / "trained" / "x", torch.nn.Linear(2, 2))

    queue = spool.Spool(canary(tmp_path / "out" / "tracking.spool.jsonl"))
    assert len(queue) == 0

    canary(studies.storage_path(experiment))
    with pytest.raises(StorageError, match="no journal of a search") as caught:
        studies.open_storage(experiment)
    one_sentence(caught.value)


@pytest.mark.parametrize("name", ["rows.pkl", "rows.bin", "rows.pt"])
def test_pickled_rows_are_refused(canary, tmp_path, name):
    with pytest.raises(DataError) as caught:
        rows.load_rows(str(canary(tmp_path / name)))
    assert "task.data" in one_sentence(caught.value)


# --- paths ---


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../escaped"}, {"name": ".."}, {"name": "/tmp/escaped"}, {"name": "a/b"},
        {"safety": {"suites": [{"name": "../../escaped", "data": "pocket:harmful"}]}},
        {"safety": {"suites": [{"name": "/tmp/escaped", "data": "pocket:harmful"}]}},
        {"safety": {"external": [{"name": "..", "harness": "lm_eval", "task": "x"}]}},
        {"recipes": [["../escaped"]]},
    ],
    ids=str,
)  # fmt: skip
def test_names_cannot_leave_the_output_folder(change, tmp_path):
    from orchestrator.experiment import checks

    with pytest.raises(ConfigError) as caught:
        experiment = config.from_dict({**change, "output": {"dir": str(tmp_path / "out")}})
        checks.check(experiment, build_pocket=False)  # where the names of strategies are looked up
    assert "escaped" in one_sentence(caught.value) or ".." in str(caught.value) or "a/b" in str(caught.value)


@pytest.mark.parametrize(
    "section",
    [
        {"tensorboard": {"enabled": True, "output_path": "/tmp/escaped"}}, {"csv_monitor": {"enabled": True, "output_path": "../escaped"}},
        {"flops_profiler": {"enabled": True, "output_file": "/tmp/escaped"}}, {"wandb": {"enabled": True}},
    ],
    ids=lambda section: next(iter(section)),
)  # fmt: skip
def test_deepspeed_writes_nothing_elsewhere(section):
    from orchestrator.config import deepspeed

    with pytest.raises(ConfigError, match="deepspeed"):
        deepspeed.validate({"zero_optimization": {"stage": 0}, **section}, config.Training())


# --- secrets ---


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"tracking": {"uri": f"http://me:{SECRET}@mlflow:5000"}}, "tracking.uri"),
        ({"tracking": {"uri": f"postgresql://me:{SECRET}@db/mlflow"}}, "tracking.uri"),
        ({"ray": {"init_kwargs": {"runtime_env": {"env_vars": {"HF_TOKEN": SECRET}}}}}, "ray.init_kwargs.runtime_env.env_vars.HF_TOKEN"),
        ({"safety": {"judge": {"name": "llm", "model": "m", "api_key": SECRET}}}, "safety.judge.api_key"),
        ({"safety": {"judge": {"name": "llm", "model": "m", "base_url": f"http://me:{SECRET}@judge/v1"}}}, "safety.judge.base_url"),
        ({"variables": {"door": f"http://me:{SECRET}@host"}}, "variables.door"),
    ],
)
def test_a_secret_in_the_config_is_refused_and_not_repeated(change, key):
    with pytest.raises(ConfigError) as caught:
        config.from_dict(change)
    said = one_sentence(caught.value)
    assert key in said and SECRET not in said and "environment" in said


def test_a_variable_of_the_environment_does_not_smuggle_one_in(tmp_path, monkeypatch):
    monkeypatch.setenv("DOOR", f"http://me:{SECRET}@mlflow:5000")
    (tmp_path / "job.yaml").write_text('tracking: {uri: "${DOOR}"}\n')
    with pytest.raises(ConfigError, match=r"tracking\.uri") as caught:
        config.load(tmp_path / "job.yaml")
    assert SECRET not in str(caught.value)


def test_ordinary_settings_are_no_secrets():
    config.from_dict({
        "tracking": {"uri": "http://mlflow.internal:5000"},
        "safety": {
            "judge": {"name": "llm", "model": "m", "api_key_env": "MY_KEY", "base_url": "http://judge:8000/v1"},
            "suites": [{"name": "xstest (safe), 2", "data": "pocket:borderline", "kind": "benign", "where": {"token": "yes"}}],
        },
        "ray": {"init_kwargs": {"runtime_env": {"env_vars": {"NCCL_SOCKET_IFNAME": "eth0", "TOKENIZERS_PARALLELISM": "false"}}}},
    })  # fmt: skip


# --- clusters ---


@pytest.mark.parametrize(
    ("environment", "level", "said"),
    [
        ({}, "warn", "RAY_AUTH_MODE is not token"),
        ({"RAY_AUTH_MODE": "disabled"}, "warn", "runs code on it"),
        ({"RAY_AUTH_MODE": "token"}, "fail", "no token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": SECRET}, "ok", "token"),
    ],
)
def test_doctor_flags_a_cluster_without_authentication(environment, level, said, tmp_path, monkeypatch):
    from orchestrator.verbs import doctor

    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = {finding.what: finding for finding in doctor._ray(made_up.experiment(tmp_path))}
    assert found["ray auth"].state == level and said in found["ray auth"].detail and SECRET not in found["ray auth"].detail


def test_the_token_of_local_clusters_is_for_its_user_alone(tmp_path):
    from orchestrator.lanes import cluster

    token = tmp_path / "auth_token"
    cluster.keep_token_private(token)  # none yet
    token.write_text("t")
    token.chmod(0o644)
    cluster.keep_token_private(token)
    assert token.stat().st_mode & 0o777 == 0o600 and token.read_text() == "t"
