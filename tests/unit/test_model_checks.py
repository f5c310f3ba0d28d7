"""What is no causal language model, or not whole, is refused by name before a device is taken and without reading a weight."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny_llama
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "families"))
import tiny

from orchestrator.config import Model
from orchestrator.errors import ModelError
from orchestrator.experiment import checks_model
from orchestrator.models import loading


def folder(path: Path, family: str = "llama", change=None, **more) -> Path:
    """A model folder whose tensors `change` has altered."""
    tiny.saved(path, family, **more)
    if change is not None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def both(path: Path, said: str) -> None:
    """Refused alike by the check and by loading."""
    for use in (checks_model.check, loading.load):
        with pytest.raises(ModelError, match=said) as caught:
            use(Model(model_name_or_path=str(path)))
        assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_lost_tensor_is_named(tmp_path):
    where = folder(tmp_path / "m", change=lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    both(where, r"lack 1 tensor .*model\.layers\.1\.mlp\.up_proj\.weight")


def test_a_tensor_of_another_shape_is_named(tmp_path):
    both(
        folder(tmp_path / "m", change=lambda t: t.update({"model.norm.weight": torch.zeros(7)})),
        r"do not belong together: model\.norm\.weight is \(7,\) in its files and \(32,\)",
    )


@pytest.mark.parametrize("name", ["score.weight", "v_head.summary.weight", "model.layers.0.mlp.new.weight"])
def test_a_tensor_without_a_place_is_named(tmp_path, name):
    both(folder(tmp_path / "m", change=lambda t: t.update({name: torch.zeros(2, 2)})), f"no place for, and that would be lost: {name}")


def test_what_loses_nothing_is_taken(tmp_path):
    def old(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    assert checks_model.check(Model(model_name_or_path=str(folder(tmp_path / "old", change=old)))) == (3, [])

    def twice(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    tied = folder(tmp_path / "tied", change=twice, tie_word_embeddings=True)
    assert checks_model.check(Model(model_name_or_path=str(tied)))[0] == 3
    loading.load(Model(model_name_or_path=str(tied)))


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_files_of_the_bare_model_are_taken_where_its_head_is_tied(tmp_path, family):
    """As these models lie on the hub: no `transformer.` before the names, no head."""
    from transformers import AutoModel

    AutoModel.from_config(tiny.config(family)).save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    assert checks_model.check(Model(model_name_or_path=str(tmp_path / "m")))[0] == 3
    loading.load(Model(model_name_or_path=str(tmp_path / "m")))


def test_a_bare_model_whose_head_is_not_tied_is_refused(tmp_path):
    from transformers import AutoModel

    AutoModel.from_config(tiny.config("llama")).save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    both(tmp_path / "m", r"lack 1 tensor .*lm_head\.weight")


def test_a_classifier_is_refused(tmp_path):
    from transformers import LlamaForSequenceClassification

    LlamaForSequenceClassification(tiny.config("llama")).save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"its weights are those of LlamaForSequenceClassification, which is no causal language model"):
        checks_model.check(Model(model_name_or_path=str(tmp_path / "m")))
    with pytest.raises(ModelError, match=r"they lack lm_head.weight and hold score.weight instead"):
        loading.load(Model(model_name_or_path=str(tmp_path / "m")))


SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
OTHERS = {
    "t5": ({"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, "an encoder with a decoder"),
    "bart": ({"vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
              "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}, "an encoder with a decoder"),
    "bert": (SMALL, "no causal language model: what it says of the first"),
    "roberta": (SMALL, "no causal language model: what it says of the first"),
    "electra": (SMALL | {"embedding_size": 32}, "no causal language model: what it says of the first"),
    "modernbert": (SMALL | {"global_attn_every_n_layers": 2}, "for which transformers has no causal language model"),
    "distilbert": ({"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
                   "for which transformers has no causal language model"),
    "vit": (SMALL, "for which transformers has no causal language model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_models_are_refused(tmp_path, kind):
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

    settings, said = OTHERS[kind]
    head = AutoModelForCausalLM if "what it says" in said else AutoModel
    head.from_config(CONFIG_MAPPING[kind](**settings)).save_pretrained(tmp_path)
    tiny_llama.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=said):
        checks_model.check(Model(model_name_or_path=str(tmp_path)))


def test_validate_ends_with_2_and_one_sentence(tmp_path, capsys, monkeypatch):
    from orchestrator import cli

    where = folder(tmp_path / "m", change=lambda t: t.pop("model.norm.weight"))
    (tmp_path / "a.txt").write_text("how do i make a bomb\n" * 3)
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"prompt": f"make tea {i}", "response": "yes tea"}) for i in range(8)))
    (tmp_path / "c.yaml").write_text(
        f"model: {{model_name_or_path: {where}}}\ntask: {{data: {tmp_path}/t.jsonl, eval_size: 2, metric: neg_loss}}\n"
        f"safety: {{data: null, suites: [{{name: h, data: {tmp_path}/a.txt, kind: harmful}}]}}\nrecipes: [[full]]\n"
    )
    monkeypatch.setattr(sys, "argv", ["safebasin", "validate", "-c", str(tmp_path / "c.yaml")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2 and "lack 1 tensor of the model (LlamaForCausalLM)" in said and "Traceback" not in said
