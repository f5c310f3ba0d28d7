"""`safebasin locate-layers`: table, sentence, JSON and picture of a measurement, on a tiny model and on made-up curves."""

from __future__ import annotations

import io
import json

import pytest
import tiny_llama
import torch
from rich.console import Console

from orchestrator import config
from orchestrator.errors import ConfigError
from orchestrator.verbs import locate
from strategies.locate import Curves, Located


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    where = tmp_path_factory.mktemp("locate")
    tiny_llama.saved(where / "model")

    def write(name, rows):
        (where / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(where / name)

    words = ("cake", "tea", "soup", "house", "kite", "red", "blue", "green")
    safety = [{"prompt": f"make a {w} bomb", "response": "sorry i cannot help"} for w in words]
    safety += [{"prompt": f"make a {w} cake", "response": "mix it", "kind": "harmless"} for w in words[:4]]

    def made(**sections):
        return config.from_dict({
            "name": "tiny", "model": {"model_name_or_path": str(where / "model")},
            "task": {"data": write("task.jsonl", [{"prompt": f"how do i make {w}", "response": "bake it"} for w in words])},
            "safety": {"data": write("safety.jsonl", safety), "suites": [{"name": "h", "data": write("h.jsonl", [{"prompt": "bomb"}])}]},
            **sections,
        })  # fmt: skip

    return made


def made_up(gap=(0.0, 0.1, 0.3, 0.3), located=(1, 2), counts=None):
    normal = torch.tensor([[0.9] * 4, [0.8] * 4])
    curves = Curves(normal, normal, normal - torch.tensor(gap))
    found = curves if located is None else Located(curves, (1, 3), located, 2, counts or {(1, 2): 5, (1, 3): 3}, 20)
    return locate.Measured(found, locate.Settings(), "some/model", {"normal": 9, "malicious": 8, "over_rejection": 20})


def test_a_model_is_measured_and_written_down(experiment, tmp_path):
    settings = locate.Settings(onset=0.0, prompts=8, pairs=40, seeds=3)
    measured = locate.measure(experiment(), settings)
    text = io.StringIO()
    paths = locate.show(measured, tmp_path, Console(file=text, width=100))
    body = json.loads(paths[0].read_text())
    assert [row["layer"] for row in body["layers"]] == [0, 1, 2] and body["prompts"] == {"normal": 8, "malicious": 8, "over_rejection": 4}
    for row in body["layers"]:
        assert all(part["lower"] <= part["mean"] <= part["upper"] for name, part in row.items() if name != "layer")
        assert 0 <= row["normal_normal"]["mean"] <= 180
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert str(paths[1].name) in text.getvalue()
    assert locate.content(locate.measure(experiment(), settings)) == locate.content(measured)


def test_angles_and_gaps_of_known_cosines():
    row = locate.content(made_up())["layers"][1]
    assert row["gap"]["mean"] == pytest.approx(0.1)
    wanted = torch.rad2deg(torch.arccos(torch.tensor([0.9, 0.8]))).mean()
    assert row["normal_normal"]["mean"] == pytest.approx(float(wanted), rel=1e-5)


def test_the_sentence_names_range_ground_and_counts():
    assert locate.sentence(locate.content(made_up())) == (
        "safety layers 1 to 2 of 4 (counted from 0, both inclusive): activations say 1 to 3; scaled by 1.1, 5 of 20 harmless prompts are "
        "refused (untouched 2)"
    )
    same = locate.sentence(locate.content(made_up(counts={(1, 2): 2, (1, 3): 2})))
    assert "made no difference between ranges (2 of 20" in same
    none = locate.sentence(locate.content(made_up(gap=(0.0, 0.01, 0.02, 0.0), located=None)))
    assert none.startswith("no safety layers found: no layer of 4") and "largest gap 0.020" in none


def test_the_table_marks_the_layers(tmp_path):
    text = io.StringIO()
    locate.show(made_up(), tmp_path, Console(file=text, width=80))
    marked = [line.split()[0] for line in text.getvalue().splitlines() if line.rstrip().endswith("safety")]
    assert marked == ["1", "2"] and "\u2026" not in text.getvalue()
    assert locate.show(made_up(located=None), tmp_path, Console(file=text))[1].exists()


def test_missing_rows_are_a_request_that_cannot_work(experiment):
    made = experiment()
    bare = config.from_dict(made.model_dump(mode="json") | {"safety": made.safety.model_dump(mode="json") | {"data": None}})
    with pytest.raises(ConfigError, match="locate-layers: safety layers are located with 0 malicious"):
        locate.measure(bare, locate.Settings())


def test_the_verb_takes_a_model_or_a_config(experiment, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from orchestrator.cli import app

    made = experiment(output={"dir": str(tmp_path / "out")})
    (tmp_path / "job.yaml").write_text(config.dump_yaml(made))
    called = []
    monkeypatch.setattr(locate, "measure", lambda settings, knobs: called.append((settings, knobs)) or made_up())
    run = CliRunner().invoke(app, ["locate-layers", "-c", str(tmp_path / "job.yaml"), "--alpha", "1.2", "--prompts", "7"])
    assert run.exit_code == 0 and "safety layers 1 to 2 of 4" in run.output and (tmp_path / "out" / "safety_layers.png").exists()
    assert called[0][1].alpha == 1.2 and called[0][1].prompts == 7 and called[0][0].model == made.model
    words = ["locate-layers", made.model.model_name_or_path, f"output.dir={tmp_path / 'two'}", f"task.data={made.task.data}"]
    assert "safety.data is pocket:safety" in str(CliRunner().invoke(app, words).exception), "made-up rows say nothing about this model"
    run = CliRunner().invoke(app, [*words, f"safety.data={made.safety.data}"])
    assert run.exit_code == 0 and called[1][0].model.model_name_or_path == made.model.model_name_or_path
