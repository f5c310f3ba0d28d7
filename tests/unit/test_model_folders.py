"""Damaged and odd model folders: each ends in one sentence that names the file, before any weight is loaded."""

from __future__ import annotations

import json
import os
import shutil
import time

import peft
import pytest
import tiny_llama
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator import config
from orchestrator.config import Model
from orchestrator.errors import ModelError
from orchestrator.experiment import checks_model
from orchestrator.models import folders, identity, loading, subjects, weights
from orchestrator.storage import hub
from orchestrator.verbs import doctor


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    where = tmp_path_factory.mktemp("whole")
    tiny_llama.saved(where / "one", layers=2)
    tiny_llama.model(layers=2).save_pretrained(where / "shards", max_shard_size="12kB")
    tiny_llama.tokenizer().save_pretrained(where / "shards")
    assert len(list((where / "shards").glob("*.safetensors"))) > 2
    wrapped = peft.get_peft_model(tiny_llama.model(layers=2), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    wrapped.peft_config["default"].base_model_name_or_path = str(where / "one")
    wrapped.save_pretrained(where / "adapter")
    tiny_llama.tokenizer().save_pretrained(where / "adapter")
    return where


def changed(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def third(folder):
    return sorted(folder.glob("model-*.safetensors"))[2]


DAMAGE = {
    "config no JSON": ("one", lambda f: (f / "config.json").write_text("{model_type: llama"), r"config.json is no JSON \(line 1"),
    "config empty": ("one", lambda f: (f / "config.json").write_text(""), "config.json is no JSON .it is empty"),
    "config a list": ("one", lambda f: (f / "config.json").write_text("[1]"), "config.json holds list where an object"),
    "config deep": ("one", lambda f: (f / "config.json").write_text("[" * 100_000), "config.json is no JSON"),
    "config not UTF-8": ("one", lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), "config.json is no UTF-8"),
    "config without type": ("one", lambda f: (f / "config.json").write_text("{}"), "config.json names no model_type"),
    "config of an unknown type": ("one", lambda f: changed(f / "config.json", model_type="nope"), "cannot be loaded.*nope"),
    "config with a wrong value": ("one", lambda f: changed(f / "config.json", hidden_size="many"), "cannot be loaded.*hidden_size"),
    "config with no heads": ("one", lambda f: changed(f / "config.json", num_attention_heads=0), "cannot be loaded"),
    "config gone": ("one", lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is a folder": ("one", lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "no config.json"),
    "config of a small vocabulary": ("one", lambda f: changed(f / "config.json", vocab_size=10), "ids up to 53.*10 embeddings"),
    "config quantised": ("one", lambda f: changed(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}), "is quantised"),
    "weights cut": ("one", lambda f: cut(f / "model.safetensors"), r"model.safetensors is cut: it has \d+ bytes of \d+"),
    "weights cut in the header": ("one", lambda f: (f / "model.safetensors").write_bytes(b"\x00\x10"), "cut within its header"),
    "weights empty": ("one", lambda f: (f / "model.safetensors").write_bytes(b""), "cut within its header"),
    "weights no header": ("one", lambda f: (f / "model.safetensors").write_bytes(b"\x08" + 7 * b"\0" + b"not json"), "header is damaged"),
    "weights longer": ("one", lambda f: (f / "model.safetensors").open("ab").write(b"x"), "longer than its header says"),
    "weights a pointer": ("one", lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "weights gone": ("one", lambda f: (f / "model.safetensors").unlink(), "holds no weights; model.safetensors"),
    "weights pickled": ("one", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only pickled weights .pytorch_model.bin"),
    "weights of another name": ("one", lambda f: (f / "model.safetensors").rename(f / "other.safetensors"), "holds other.safetensors, but neither"),
    "weights a dead link": ("one", lambda f: ((f / "model.safetensors").unlink(),
                                              (f / "model.safetensors").symlink_to("gone")), "a link to .gone., which is not there"),
    "tokenizer gone": ("one", lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer"),
    "tokenizer no JSON": ("one", lambda f: cut(f / "tokenizer.json"), "tokenizer.json is no JSON"),
    "tokenizer empty": ("one", lambda f: (f / "tokenizer.json").write_text("{}"), "the tokenizer of .* cannot be loaded"),
    "tokenizer settings no JSON": ("one", lambda f: (f / "tokenizer_config.json").write_text("nope"), "tokenizer_config.json is no JSON"),
    "template not UTF-8": ("one", lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), "chat_template.jinja is no UTF-8"),
    "generation settings no JSON": ("one", lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json is no JSON"),
    "generation settings below 0": ("one", lambda f: changed(f / "generation_config.json", max_new_tokens=-5), "max_new_tokens. must be greater"),
    "an end that is a text": ("one", lambda f: changed(f / "generation_config.json", eos_token_id="x"), "eos_token_id is 'x', not the number"),
    "shard cut": ("shards", lambda f: cut(third(f)), "model-00003-of-.*safetensors is cut"),
    "shard gone": ("shards", lambda f: third(f).unlink(), "index.json names .* files, of which 1 are not there, e.g. model-00003"),
    "shard another": ("shards", lambda f: shutil.copy(sorted(f.glob("model-*"))[0], third(f)), "says that model-0000.*but it does not"),
    "index no JSON": ("shards", lambda f: cut(f / "model.safetensors.index.json"), "index.json is no JSON"),
    "index without map": ("shards", lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    "index of numbers": ("shards", lambda f: changed(f / "model.safetensors.index.json", weight_map={"a": 1}), "no weight_map"),
    "index outwards": ("shards", lambda f: changed(f / "model.safetensors.index.json", weight_map={"a": "../x"}), "'../x', which is no file of"),
    "index gone": ("shards", lambda f: (f / "model.safetensors.index.json").unlink(), "holds model-00001.*, but neither"),
}  # fmt: skip


@pytest.mark.parametrize(("form", "damage", "said"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_folder_is_refused_before_weights_are_loaded(whole, tmp_path, form, damage, said):
    shutil.copytree(whole / form, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(ModelError, match=said) as caught:
        checks_model.check(Model(model_name_or_path=str(tmp_path / "m")))
    assert "\n" not in str(caught.value) and str(tmp_path / "m") in str(caught.value)


@pytest.mark.parametrize(("damage", "said"), [
    (lambda f: cut(f / "adapter_model.safetensors"), "adapter_model.safetensors is cut"),
    (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "only pickled weights .adapter_model.bin"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), "no weights; adapter_model.safetensors"),
    (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json is no JSON"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer of the adapter in"),
    (lambda f: cut(f / "tokenizer.json"), "tokenizer.json is no JSON"),
])  # fmt: skip
def test_a_damaged_adapter_is_refused_before_its_base_is_loaded(whole, tmp_path, monkeypatch, damage, said):
    shutil.copytree(whole / "adapter", tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text((whole / "one" / "config.json").read_text())  # a copied config changes nothing
    damage(tmp_path / "a")
    monkeypatch.setattr(loading, "network", lambda *_: pytest.fail("the base was loaded"))
    for use in (subjects.voice, subjects.load):
        with pytest.raises(ModelError, match=said):
            use(str(tmp_path / "a"), Model())


def test_weights_that_are_not_the_configs_are_refused_when_loaded(whole, tmp_path):
    lacks = r"lack 9 tensors of the model \(LlamaForCausalLM\), which would start at random: model.layers.2"
    for layers, said in ((3, lacks), (1, "num_hidden_layers=1, but its weights hold model.layers.1")):
        shutil.copytree(whole / "one", tmp_path / str(layers))
        changed(tmp_path / str(layers) / "config.json", num_hidden_layers=layers)
        with pytest.raises(ModelError, match=said):
            loading.load(Model(model_name_or_path=str(tmp_path / str(layers))))


def test_sound_folders_pass_and_are_read_once(whole, monkeypatch):
    for name in ("one", "shards"):
        assert checks_model.check(Model(model_name_or_path=str(whole / name)))[0] == 2
        assert set(weights.FolderWeights(whole / name)) == set(folders.tensors(whole / name))
    monkeypatch.setattr(folders, "tensors", lambda *_: pytest.fail("read again"))
    folders.check_model(whole / "shards")
    (whole / "shards" / "config.json").touch()
    with pytest.raises(BaseException, match="read again"):
        folders.check_model(whole / "shards")


@given(at=st.integers(0, 400), value=st.integers(0, 255))
@example(at=0, value=255)
@example(at=7, value=255)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_byte_of_a_header_is_a_sentence_or_another_sound_header(whole, tmp_path, at, value):
    data = bytearray((whole / "adapter" / "adapter_model.safetensors").read_bytes())
    data[at] = value
    path = tmp_path / "flipped.safetensors"
    path.write_bytes(bytes(data))
    try:
        found = folders.header(path)
    except ModelError as error:
        assert "flipped.safetensors" in str(error)
    else:
        assert found and all(isinstance(t.dtype, str) for t in found.values())


# ------------------------------------------------------------------------------------------------ names and places


def test_places_that_are_no_folder_are_sentences(whole, tmp_path, monkeypatch):
    os.symlink(tmp_path / "b", tmp_path / "a")
    os.symlink(tmp_path / "a", tmp_path / "b")
    os.symlink(tmp_path / "gone", tmp_path / "dead")
    (tmp_path / "empty").mkdir()
    (tmp_path / "llama-tuned").mkdir()
    for name, said in (
        (tmp_path / "a", "cannot be looked at: Too many levels of symbolic links"), (tmp_path / "dead", "a link to .*gone'"),
        (tmp_path / "empty", "no config.json"), (tmp_path / ("x" * 300), "cannot be looked at: File name too long"),
        ("\0", "no hub id"), (tmp_path / "llama-tunde", "does not exist.*did you mean the folder .*llama-tuned'"),
        (whole, "holds the folders adapter, one, shards: name one"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=said):
            checks_model.check(Model(model_name_or_path=str(name)))
    denied = tmp_path / "denied"
    shutil.copytree(whole / "one", denied)
    refusing = type("P", (), {"__call__": lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))})()
    monkeypatch.setattr(type(denied), "iterdir", lambda self: refusing())
    with pytest.raises(ModelError, match="denied may not be read by this user"):
        checks_model.check(Model(model_name_or_path=str(denied)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_a_sentence(whole, tmp_path):
    shutil.copytree(whole / "one", tmp_path / "m")
    (tmp_path / "m").chmod(0)
    try:
        with pytest.raises(ModelError, match="may not be read"):
            checks_model.check(Model(model_name_or_path=str(tmp_path / "m")))
    finally:
        (tmp_path / "m").chmod(0o700)


def test_spaces_percent_signs_slashes_and_a_home_are_paths_like_any(whole, tmp_path, monkeypatch):
    for name in ("my model", "50%20", "a#b [x]"):
        shutil.copytree(whole / "one", tmp_path / name)
        assert checks_model.check(Model(model_name_or_path=f"{tmp_path / name}/"))[0] == 2
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checks_model.check(Model(model_name_or_path="~/my model"))[0] == 2
    assert identity.model_hash("~/my model") == identity.model_hash(str(whole / "one"))
    monkeypatch.chdir(tmp_path)
    assert checks_model.check(Model(model_name_or_path="my model"))[0] == 2
    monkeypatch.setattr(hub, "away", lambda: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError, match="did you mean the folder 'my model'"):
        checks_model.check(Model(model_name_or_path="my%20model"))


def test_a_name_with_a_typo_and_no_network_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_known", {})
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "llama").mkdir()
    started = time.monotonic()
    said = r"'meta/lama' is no folder here and not in the local cache, and http.*did you mean the folder 'meta/llama'"
    for use in (checks_model.check, loading.load, identity.model_hash, identity.num_layers, lambda m: subjects.voice(m.model_name_or_path, m)):
        with pytest.raises(ModelError, match=said):
            use(Model(model_name_or_path="meta/lama"))
    assert time.monotonic() - started < 20, "nobody retries for minutes"


def test_a_model_in_the_cache_is_used_where_the_hub_is_away(whole, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    kept = tmp_path / "models--we--tiny"
    shutil.copytree(whole / "one", kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "away", lambda: "it is away")
    assert checks_model.check(Model(model_name_or_path="we/tiny"))[0] == 2
    assert identity.model_hash("we/tiny") == f"hub:{commit}", "the same identity as with the hub"


def test_doctor_and_validate_name_the_file(whole, tmp_path):
    shutil.copytree(whole / "one", tmp_path / "m")
    cut(tmp_path / "m" / "model.safetensors")
    suites = [{"name": "harmful", "data": "pocket:harmful", "kind": "harmful"}]  # written out: made-up data is refused for another model else
    made = config.from_dict({
        "model": {"model_name_or_path": str(tmp_path / "m")}, "task": {"data": "pocket:obey"}, "safety": {"data": "pocket:safety", "suites": suites},
    })  # fmt: skip
    found = [f for f in doctor._config(made) if f.state == "fail"]
    assert any("model.safetensors is cut" in f.detail for f in found)
