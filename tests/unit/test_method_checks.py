"""A method that cannot work on a model's architecture is refused by validate, on a small copy, before a device is taken."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "families"))
import tiny

from strategies.base import StrategyError
from strategies.full import Full


def validate(tmp_path: Path, family: str, recipes: str, more: str = "", **shape) -> list[str]:
    """Command line of `validate` for one recipe list on a tiny model of the family."""
    if not (tmp_path / "m").exists():
        tiny.saved(tmp_path / "m", family, **shape)
    (tmp_path / "a.txt").write_text("how do i make a bomb\n" * 3)
    rows = [{"prompt": f"make tea {i}", "response": "yes tea"} for i in range(8)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = [{"prompt": f"make bomb {i}", "response": "sorry i cannot help", "rejected": "yes bomb"} for i in range(8)]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "c.yaml").write_text(
        f"model: {{model_name_or_path: {tmp_path}/m{more}}}\ntask: {{data: {tmp_path}/t.jsonl, eval_size: 2, metric: neg_loss}}\n"
        f"safety: {{data: {tmp_path}/s.jsonl, suites: [{{name: h, data: {tmp_path}/a.txt, kind: harmful}}]}}\nrecipes: {recipes}\n"
        f"output: {{dir: {tmp_path}/out}}\n"
    )
    return ["safebasin", "validate", "-c", str(tmp_path / "c.yaml")]


def ended(monkeypatch, capsys, command: list[str]) -> tuple[int, str]:
    """(exit code, everything said, in one line) of a command."""
    from orchestrator import cli

    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capsys.readouterr()
    return end.value.code or 0, " ".join((told.err + told.out).split())


def test_a_refusal_on_the_small_copy_ends_validate_with_2(tmp_path, capsys, monkeypatch):
    seen = []

    def refuse(self, model):
        seen.append(model)
        raise StrategyError("full: this kind of model is refused for the test; take another")

    monkeypatch.setattr(Full, "check_model", refuse)
    code, said = ended(monkeypatch, capsys, validate(tmp_path, "llama", "[[full]]"))
    assert code == 2 and "recipes: [full]: full: this kind of model is refused for the test; take another" in said and "Traceback" not in said
    assert len(seen) == 1 and all(p.device.type == "cpu" for p in seen[0].parameters())


def test_a_warning_of_the_small_copy_is_shown_and_equal_methods_look_once(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(Full, "check_model", lambda self, model: [f"look {seen.append(model) or len(seen)} at this kind of model"])
    code, said = ended(monkeypatch, capsys, validate(tmp_path, "llama", "[[full], [ema, full]]"))
    assert code == 0 and "look 1 at this kind of model" in said and len(seen) == 1


@pytest.mark.parametrize(("recipe", "name"), [("enchtable", "enchtable"), ("{curvature_restore: {solver: cg}}", "curvature_restore")])
def test_attention_that_a_method_cannot_differentiate_is_refused(tmp_path, capsys, monkeypatch, recipe, name):
    command = validate(tmp_path, "llama", f"[[full, {recipe}]]", ", attn_implementation: flex_attention")
    code, said = ended(monkeypatch, capsys, command)
    assert code == 2 and f"{name} needs attention that can be differentiated again" in said and "not flex_attention" in said


REFUSED = {
    "bloom": ("{enchtable: {modules: attention_mlp}}", "attention and mlp, which BloomForCausalLM does not give"),
    "recurrent_gemma": ("enchtable", "attention, which RecurrentGemmaForCausalLM does not give"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_without_the_derivative_is_refused_before_a_device_is_taken(tmp_path, capsys, monkeypatch, family):
    recipe, wanted = REFUSED[family]
    wanted = f"enchtable.ntk=true needs a forward-mode derivative of {wanted}"
    code, said = ended(monkeypatch, capsys, validate(tmp_path, family, f"[[full, {recipe}]]"))
    assert code == 2 and wanted in said and "set enchtable.ntk=false" in said and "Traceback" not in said


def test_families_that_used_to_fail_are_taken(tmp_path, capsys, monkeypatch):
    recipes = "[[sap], [full, enchtable], [freeze_layers: {range: auto}]]"
    for family in ("mistral", "gemma3_text", "llama4_text", "mamba", "openai-gpt"):
        (tmp_path / family).mkdir()
        code, said = ended(monkeypatch, capsys, validate(tmp_path / family, family, recipes))
        assert code == 0 and "valid" in said, (family, said)


def test_shared_layers_are_warned_of(tmp_path, capsys, monkeypatch):
    shape = {"num_hidden_layers": 4, "layers_block_type": ["hybrid", "mamba", "hybrid", "mamba"]}
    code, said = ended(monkeypatch, capsys, validate(tmp_path, "zamba2", "[[full, {freeze_layers: {start: 2, end: 2}}]]", **shape))
    assert code == 0 and "layers of this kind of model share tensors" in said


def test_what_reads_the_output_layer_is_refused_where_that_is_not_called():
    import torch
    import toy

    from strategies.recipe import build

    model = toy.model().eval()
    weight = model.lm_head.weight
    model.lm_head.forward = lambda hidden: torch.zeros(*hidden.shape[:-1], len(weight))
    own = model.lm_head
    model.lm_head = torch.nn.Identity()  # another module is called in the place of the one that is named
    model.get_output_embeddings = lambda: own
    for name in ("sbr", "spard"):
        with pytest.raises(StrategyError, match=f"{name} reads what the output layer is given, and LlamaForCausalLM does not give it one finite"):
            build([(name, {})]).strategies[0].check_model(model)


def test_second_derivatives_are_tried(monkeypatch):
    from strategies import after
    from strategies.recipe import build

    method = build([("curvature_restore", {"solver": "cg"})]).strategies[0]
    model = tiny.model("llama")
    assert method.check_model(model) == [] and all(p.grad is None and p.requires_grad for p in model.parameters())

    def refuse(*_):
        raise RuntimeError("the kernel has no second derivative. Please file an issue")

    monkeypatch.setattr(after, "hessian_vector", refuse)
    said = r"solver=cg needs .* LlamaForCausalLM does not give \(the kernel has no second derivative\); use solver=diagonal or lbfgs"
    with pytest.raises(StrategyError, match=said):
        method.check_model(model)
