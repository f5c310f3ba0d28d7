"""Models: loaded from folders and from a hub, copied for trials bit for bit, saved and loaded back; what cannot be is refused."""

from __future__ import annotations

import hashlib
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny_llama
import torch

from orchestrator.config import Model
from orchestrator.errors import ModelError
from orchestrator.models import copies, identity, loading, saving

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama.saved(tmp_path_factory.mktemp("models") / "tiny")


def settings(path, **more):
    return Model(model_name_or_path=str(path), **more)


def same(one, two):
    a, b = copies.snapshot(one), copies.snapshot(two)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_folder_loads_in_evaluation_mode_with_the_wanted_dtype(folder):
    network, tokenizer = loading.load(settings(folder))
    assert not network.training and next(network.parameters()).dtype == torch.float32 and tokenizer.pad_token == "<pad>"
    assert same(network, tiny_llama.model())
    assert next(loading.load(settings(folder, dtype="bfloat16"))[0].parameters()).dtype == torch.bfloat16


def test_a_missing_pad_token_becomes_the_end_token_without_resizing(tmp_path):
    path = tiny_llama.saved(tmp_path)
    body = json.loads((path / "tokenizer_config.json").read_text())
    body.pop("pad_token")
    (path / "tokenizer_config.json").write_text(json.dumps(body))
    network, tokenizer = loading.load(settings(path))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id and network.get_input_embeddings().weight.shape[0] == 80


def test_a_model_without_a_chat_template_names_the_remedy_and_the_remedy_works(tmp_path):
    path = tiny_llama.saved(tmp_path / "m", template=None)
    with pytest.raises(ModelError, match=r"no chat template.*model\.chat_template.*\{% for m in messages %\}"):
        loading.load(settings(path))
    assert loading.tokenizer(settings(path, chat_template=loading.TEMPLATE_EXAMPLE)).chat_template == loading.TEMPLATE_EXAMPLE
    (tmp_path / "t.jinja").write_text(tiny_llama.TEMPLATE)
    assert loading.tokenizer(settings(path, chat_template=str(tmp_path / "t.jinja"))).chat_template == tiny_llama.TEMPLATE
    with pytest.raises(ModelError, match="neither a Jinja text"):
        loading.tokenizer(settings(path, chat_template=str(tmp_path / "none.jinja")))


def test_pickled_weights_are_refused(tmp_path):
    path = tiny_llama.saved(tmp_path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        loading.load(settings(path))
    (path / "pytorch_model.bin").write_bytes(b"would run code")
    with pytest.raises(ModelError, match="pickled weights.*pytorch_model.bin.*safetensors"):
        loading.load(settings(path))


def test_folders_that_are_no_model_are_refused(tmp_path, folder):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for path, said in [
        ("/nowhere/model", "does not exist"),
        (tmp_path, "no config.json"),
        (tmp_path / "adapter", "holds an adapter"),
        (folder / "config.json", "is a file"),
    ]:
        with pytest.raises(ModelError, match=said):
            loading.load(settings(path))


def test_code_that_ships_with_a_model_does_not_run_unasked(tmp_path):
    path = tiny_llama.saved(tmp_path)
    body = json.loads((path / "config.json").read_text())
    body |= {"model_type": "homemade", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (path / "config.json").write_text(json.dumps(body))
    (path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="model.trust_remote_code=true"):
        loading.load(settings(path))
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    path = tiny_llama.saved(tmp_path, vocabulary=20)
    with pytest.raises(ModelError, match="do not belong together"):
        loading.load(settings(path))


def test_layers_and_hashes_are_read_without_loading_weights(folder, tmp_path):
    assert identity.num_layers(settings(folder)) == 3
    other = tiny_llama.saved(tmp_path / "other", seed=1)
    twin = tiny_llama.saved(tmp_path / "twin")
    assert identity.model_hash(str(twin)) == identity.model_hash(settings(folder)) != identity.model_hash(settings(other))
    plain, changed = tiny_llama.tokenizer(), tiny_llama.tokenizer(tiny_llama.TEMPLATE + " ")
    assert identity.template_hash(plain) == identity.template_hash(tiny_llama.tokenizer()) != identity.template_hash(changed)


@pytest.mark.parametrize("tie", [True, False])
def test_the_lane_hands_out_untouched_copies_whatever_was_done_to_earlier_ones(tmp_path, tie):
    path, cache = tiny_llama.saved(tmp_path, tie=tie), {}
    first, _ = copies.base(cache, settings(path))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1)
            parameter.requires_grad_(False)
    first.train()
    second, _ = copies.base(cache, settings(path))
    assert same(second, tiny_llama.model(tie=tie)) and not second.training
    assert all(p.requires_grad for p in second.parameters())
    assert (second.lm_head.weight is second.model.embed_tokens.weight) is tie
    kept = [k for k in cache if k[0] == "base model"]
    copies.base(cache, settings(path, dtype="bfloat16"))
    assert len(kept) == 1 == len([k for k in cache if k[0] == "base model"])


def test_snapshot_and_restore_are_bit_exact_and_refuse_other_models():
    network = tiny_llama.model()
    state = copies.snapshot(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    assert same(copies.restore(network, state), tiny_llama.model())
    with pytest.raises(KeyError, match="lacks"):
        copies.restore(tiny_llama.model(layers=2), state)


def test_whole_models_and_adapters_come_back_as_they_were_saved(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    ids = torch.tensor([[2, 5, 9, 10, 6]])
    network, tokenizer = loading.load(settings(folder))
    with torch.no_grad():
        network.model.layers[0].mlp.up_proj.weight.add_(0.1)
    saving.save(network, tokenizer, tmp_path / "full", {"recipe": "full"})
    back, words = saving.attach(tmp_path / "full", settings(folder))
    assert same(back, network) and words.chat_template == tiny_llama.TEMPLATE
    assert json.loads((tmp_path / "full" / "safebasin.json").read_text()) == {"recipe": "full"}

    adapted = get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    saving.save(adapted, tokenizer, tmp_path / "lora")
    assert not list((tmp_path / "lora").glob("model*.safetensors"))
    loaded, _ = saving.attach(tmp_path / "lora", settings(tmp_path / "full"))
    assert torch.equal(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits)
    with pytest.raises(ModelError, match="does not fit"):
        saving.attach(tmp_path / "lora", settings(tiny_llama.saved(tmp_path / "shallow", layers=1)))


def test_broken_weights_are_not_handed_over_as_a_model(tmp_path):
    network = tiny_llama.model()
    with torch.no_grad():
        network.model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinite.*model.norm.weight"):
        saving.save(network, tiny_llama.tokenizer(), tmp_path / "nan")
    network = tiny_llama.model()
    network.model.norm.weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(ModelError, match="empty tensor model.norm.weight.*sharded"):
        saving.save(network, tiny_llama.tokenizer(), tmp_path / "empty")


# ------------------------------------------------------------------------------------------------ a hub of our own


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs: file metadata, bytes, and the list of files."""

    folder: Path
    asked: list[str]

    def _serve(self, body: bool) -> None:
        self.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            files = [{"rfilename": p.name} for p in sorted(self.folder.iterdir())]
            listed = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40} for p in sorted(self.folder.iterdir())]
            return self._send(
                json.dumps(listed if "tree" in parts else {"id": "we/tiny", "sha": COMMIT, "siblings": files}).encode(), {}, body
            )
        path = self.folder / parts[-1]
        if parts[:3] != ["we", "tiny", "resolve"] or not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if parts[:2] == ["we", "tiny"] else "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content = path.read_bytes()
        return self._send(content, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, body)

    def _send(self, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": "application/octet-stream", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_GET(self):
        self._serve(True)

    def do_HEAD(self):
        self._serve(False)

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def hub(folder):
    handler = type("Hub", (_Hub,), {"folder": folder, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler.asked
    server.shutdown()
    server.server_close()


FROM_HUB = """
import sys
from orchestrator.models import identity, loading
from orchestrator.config import Model
from orchestrator.errors import ModelError
try:
    model = Model(model_name_or_path=sys.argv[1], revision=sys.argv[2] or None)
    network, tokenizer = loading.load(model)
    print(identity.model_hash(model), identity.num_layers(model), float(sum(p.detach().double().sum() for p in network.parameters())))
except ModelError as error:
    print("refused:", error)
"""


def from_hub(endpoint, cache, name, revision=""):
    import os

    environment = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY") and k != "HF_HUB_OFFLINE"}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", FROM_HUB, name, revision]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_hub_id_is_downloaded_from_the_endpoint_and_known_by_its_commit(hub, tmp_path):
    endpoint, asked = hub
    expected = float(sum(p.detach().double().sum() for p in tiny_llama.model().parameters()))
    said = from_hub(endpoint, tmp_path, "we/tiny", "v1")
    assert not said.startswith("refused"), said
    digest, layers, total = said.split()
    assert digest == f"hub:{COMMIT}" and layers == "3" and float(total) == pytest.approx(expected)
    assert any("/v1" in path for path in asked) and any(path.endswith("/model.safetensors") for path in asked)
    assert not any(path.endswith("pytorch_model.bin") for path in asked)


def test_a_name_the_hub_does_not_know_is_one_sentence(hub, tmp_path):
    said = from_hub(hub[0], tmp_path, "we/none")
    assert said.startswith("refused: model 'we/none' is no folder here and could not be had from the hub") and "HF_TOKEN" in said
