"""`safebasin render`: names, what travels, what is refused; and our part of kustomize, feature by feature."""

from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from orchestrator import cli, config
from orchestrator.errors import CapacityError, ConfigError, UnknownNameError
from orchestrator.verbs import kustomize, render
from tests import k8s_checks as checks

DIGEST = "sha256:" + "ab" * 32
IMAGE = f"ghcr.io/acme/safebasin:0.1.0-ray2.60.0-cpu@{DIGEST}"


def experiment(*overrides: str) -> config.Experiment:
    return config.load(None, overrides)


def carried(manifests: render.Manifests) -> dict[str, str]:
    (found,) = [d for d in manifests.run if d["kind"] == "ConfigMap" and d["metadata"]["name"] == manifests.name]
    return found["data"]


def as_pods_see_it(manifests: render.Manifests, folder, monkeypatch) -> config.Experiment:
    """The experiment as `safebasin run` loads it in the pod."""
    monkeypatch.setenv("SAFEBASIN_RESULTS", "/results")
    (folder / "experiment.yaml").write_text(carried(manifests)["experiment.yaml"])
    return config.load(folder / "experiment.yaml")


@pytest.mark.parametrize("overlay", checks.OVERLAYS)
def test_what_is_written_is_accepted_and_complete(overlay):
    gpu = ("ray.use_gpu=true",) if overlay != "local-cpu" else ()
    manifests = render.render(experiment("name=My_Job.1", *gpu), overlay, IMAGE)
    documents = [*manifests.shared, *manifests.run]
    assert {error for d in documents for error in checks.errors(d)} == set()
    assert manifests.warnings == []
    assert {d["kind"] for d in manifests.run} == {"RayJob", "ConfigMap", "PodDisruptionBudget"}
    assert {d["metadata"]["name"] for d in manifests.run} == {manifests.name, f"{manifests.name}-safebasin-environment"}
    assert {d["metadata"]["labels"]["safebasin-run"] for d in manifests.run} == {manifests.name}, "one selector finds all that a run leaves"
    assert manifests.run[-1]["kind"] == "RayJob", "what the pods read is there before them"
    own = {(d["kind"], d["metadata"]["name"]) for d in documents}
    job = checks.job(documents)
    (budget,) = [d for d in manifests.run if d["kind"] == "PodDisruptionBudget"]
    for where, labels, spec in checks.all_pods([job]):
        assert labels["safebasin-run"] == manifests.name
        assert {c["image"] for c in checks.containers(spec)} == {IMAGE}
        missing = {(kind, name) for kind, name, _, _ in checks.references(spec) if kind != "Secret"} - own
        assert not missing, where
        assert checks.matches(budget["spec"]["selector"], labels) == where.endswith("head")
    assert not any("safebasin-run" in str(d) for d in manifests.shared), "what all runs share names no run"


def test_the_pod_runs_the_same_experiment(tmp_path, monkeypatch):
    given_ = experiment("search.trials=7", "training.learning_rate=3e-4")
    manifests = render.render(given_, "local-cpu")
    seen = as_pods_see_it(manifests, tmp_path, monkeypatch)
    assert seen.digest() == given_.digest()
    assert seen.output.dir == f"/results/{manifests.name}"
    assert seen.model_dump(exclude={"output", "variables"}) == given_.model_dump(exclude={"output", "variables"})


def test_the_same_request_is_the_same_run_and_a_changed_one_another():
    first = render.render(experiment(), "local-cpu")
    assert render.render(experiment(), "local-cpu") == first
    assert render.render(experiment("ray.max_failures=9"), "local-cpu").name == first.name, "where it runs is not what it finds"
    assert render.render(experiment("search.trials=99"), "local-cpu").name != first.name


@settings(deadline=None)
@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}", fullmatch=True))
def test_names_are_dns_labels(name):
    found = render.run_name(config.Experiment(name=name), {})
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", found) and len(found) <= 47 and "--" not in found


def test_local_files_travel(tmp_path, monkeypatch):
    rows = tmp_path / "my rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    settings = experiment(f"task.data={rows}", f"task.eval_data={rows}", f"model.chat_template={template}")
    manifests = render.render(settings, "local-cpu")
    seen = as_pods_see_it(manifests, tmp_path, monkeypatch)
    assert seen.task.data == seen.task.eval_data != str(rows)
    data = carried(manifests)
    assert data[seen.task.data.removeprefix("/etc/safebasin/")] == rows.read_text()
    assert data[seen.model.chat_template.removeprefix("/etc/safebasin/")] == template.read_text()
    assert all(re.fullmatch(r"[-._a-zA-Z0-9]+", key) for key in data) and str(tmp_path) not in str(data)
    rows.write_text('{"prompt": "a", "response": "c"}\n')
    assert render.render(settings, "local-cpu").name != manifests.name, "other rows are another run"


def test_paths_on_the_volumes_stay(tmp_path, monkeypatch):
    manifests = render.render(experiment("task.data=/cache/data/train.jsonl"), "local-cpu")
    assert as_pods_see_it(manifests, tmp_path, monkeypatch).task.data == "/cache/data/train.jsonl"
    assert set(carried(manifests)) == {"experiment.yaml"}


REFUSED = {
    "its own cluster": (["ray.address=10.0.0.1:6379"], "ray.address"),
    "what a retry would destroy": (["output.overwrite=true"], "output.overwrite"),
    "a study elsewhere": (["search.storage=study.journal"], "search.storage"),
    "a database that pods do not see": (["tracking.uri=sqlite:///mlflow.db"], "tracking.uri"),
    "a password in an address": (["tracking.uri=http://me:hunter2@mlflow:5000"], "secret"),
    "a path that is nowhere": (["task.data=/nowhere/train.jsonl"], "task.data=/nowhere/train.jsonl"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    overrides, word = REFUSED[case]
    with pytest.raises(ConfigError, match=re.escape(word)) as error:
        render.render(experiment(*overrides), "local-cpu")
    assert "hunter2" not in str(error.value)


def test_folders_large_files_and_binary_files_are_refused(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(ConfigError, match="folder of this machine"):
        render.render(experiment(f"model.model_name_or_path={model}"), "local-cpu")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("x" * (render.CONFIG_MAP_BYTES + 1))
    with pytest.raises(ConfigError, match="do not fit into a ConfigMap"):
        render.render(experiment(f"task.data={rows}"), "local-cpu")
    rows.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        render.render(experiment(f"task.data={rows}"), "local-cpu")


def test_what_does_not_fit_the_workers_is_refused_and_idle_gpus_are_named():
    with pytest.raises(CapacityError, match="overlay local-cpu: .*GPU"):
        render.render(experiment("ray.use_gpu=true"), "local-cpu")
    with pytest.raises(CapacityError, match="num_workers=5"):
        render.render(experiment("ray.use_gpu=true", "ray.num_workers=5"), "gpu-multi-node")
    assert any("idle" in line for line in render.render(experiment(), "gpu-single", IMAGE).warnings)
    with pytest.raises(UnknownNameError, match="did you mean 'gpu-single'"):
        render.render(experiment(), "gpu-singel")


def test_images_that_cannot_be_told_later_are_named():
    assert "placeholder" in render.render(experiment(), "local-cpu").warnings[0]
    assert "not pinned" in render.render(experiment(), "local-cpu", "safebasin:dev").warnings[0]


LOOKS_LIKE_ANOTHER_TYPE = ["1e3", "0440", "on", "no", "3e-4", "12_000", "~", "0x1f", "1:30", "", "null", ".5", "1.", "true"]


@settings(deadline=None)
@given(st.dictionaries(st.text("abc", min_size=1, max_size=4), st.one_of(st.sampled_from(LOOKS_LIKE_ANOTHER_TYPE), st.text()), max_size=4))
def test_texts_stay_texts_for_every_reader(data):
    """Kubernetes reads YAML 1.2-ish, PyYAML 1.1: what either could take for a number or a truth value is quoted."""
    text = render.to_yaml([data])
    assert yaml.safe_load(text) == data
    for key, value in data.items():
        if value in LOOKS_LIKE_ANOTHER_TYPE:
            assert re.search(rf"""^{key}: ['"]""", text, re.M), text


def test_the_verb_writes_two_files_and_says_what_to_do(tmp_path):
    run = CliRunner()
    result = run.invoke(cli.app, ["render", "--overlay", "local-cpu", "--image", IMAGE, "--output", str(tmp_path), "search.trials=3"])
    assert result.exit_code == 0, result.output
    assert re.findall(r"apply --server-side -f \S*/(\w+)\.yaml", result.output) == ["shared", "run"]
    written = [d for name in ("shared", "run") for d in yaml.safe_load_all((tmp_path / f"{name}.yaml").read_text())]
    assert {e for d in written for e in checks.errors(d)} == set()
    printed = run.invoke(cli.app, ["render", "--overlay", "local-cpu", "--image", IMAGE, "search.trials=3"])
    assert list(yaml.safe_load_all(printed.stdout)) == written
    own = run.invoke(cli.app, ["render", "--overlay", "gpu-single", "-c", str(checks.K8S / "overlays/gpu-single/experiment.yaml")])
    assert own.exit_code == 0, "an overlay's own experiment renders although its variables exist in pods only"


def kustomization(folder, **body) -> list[dict]:
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({"kind": "Kustomization", **body}))
    return kustomize.build(folder)


def a_pod(folder, name="pod", image="acme/app:1") -> str:
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {"containers": [{"name": "a", "image": image}]}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(body))
    return f"{name}.yaml"


def test_kustomize_refuses_what_it_does_not_know(tmp_path):
    pod = a_pod(tmp_path)
    (tmp_path / "patch.yaml").write_text("[{op: test, path: /metadata/name, value: other}]")
    cases = {
        "namePrefix is not supported": {"resources": [pod], "namePrefix": "x-"},
        "is there twice": {"resources": [pod, pod]},
        "nothing to patch": {"resources": [pod], "patches": [{"path": "patch.yaml", "target": {"kind": "Job"}}]},
        "it is 'pod', not 'other'": {"resources": [pod], "patches": [{"path": "patch.yaml", "target": {"kind": "Pod", "name": "pod"}}]},
        "needs generatorOptions": {"resources": [pod], "configMapGenerator": [{"name": "x", "files": [pod]}]},
        "No such file": {"resources": ["missing.yaml"]},
        "patches.options is not supported": {"resources": [pod], "patches": [{"path": "patch.yaml", "target": {"kind": "Pod"}, "options": {}}]},
    }
    for message, body in cases.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            kustomization(tmp_path, **body)
    (tmp_path / "pod.yaml").write_text("kind: Pod\nkind: Job\n")
    with pytest.raises(ConfigError, match="written twice"):
        kustomization(tmp_path, resources=[pod])


@pytest.mark.parametrize(
    ("given_", "entry", "expected"),
    [
        ("host:5000/acme/app:1@sha256:aa", {"newTag": "2"}, "host:5000/acme/app:2"),
        ("host:5000/acme/app:1@sha256:aa", {"newTag": "2", "digest": "sha256:bb"}, "host:5000/acme/app:2@sha256:bb"),
        ("host:5000/acme/app:1", {"digest": "sha256:bb"}, "host:5000/acme/app@sha256:bb"),
        ("host:5000/acme/app:1@sha256:aa", {"newName": "mine/app"}, "mine/app:1@sha256:aa"),
        ("host:5000/acme/apps:1", {"newTag": "2"}, "host:5000/acme/apps:1"),
    ],
)
def test_images_are_replaced_as_kustomize_does(tmp_path, given_, entry, expected):
    (pod,) = kustomization(tmp_path, resources=[a_pod(tmp_path, image=given_)], images=[{"name": "host:5000/acme/app", **entry}])
    assert pod["spec"]["containers"][0]["image"] == expected


def test_operations_follow_rfc_6902():
    document = {"a": {"b/c": [1, 2]}, "d": 1}
    for operation in (
        {"op": "add", "path": "/a/b~1c/-", "value": 3},
        {"op": "add", "path": "/a/b~1c/0", "value": 0},
        {"op": "replace", "path": "/d", "value": 2},
        {"op": "add", "path": "/e~0", "value": {}},
        {"op": "remove", "path": "/a/b~1c/1"},
        {"op": "test", "path": "/d", "value": 2},
    ):
        kustomize.apply_operation(document, operation)
    assert document == {"a": {"b/c": [0, 2, 3]}, "d": 2, "e~": {}}
    for operation in ({"op": "replace", "path": "/missing", "value": 1}, {"op": "remove", "path": "/a/b~1c/9"}, {"op": "move", "path": "/d"}):
        with pytest.raises((KeyError, IndexError, ValueError)):
            kustomize.apply_operation(document, operation)


def test_a_map_that_others_read_too_stays_for_them():
    def reader(name: str) -> dict:
        variables = {"name": "a", "envFrom": [{"configMapRef": {"name": "shared"}}, {"configMapRef": {"name": "elsewhere"}}]}
        volumes = [{"name": "v", "projected": {"sources": [{"configMap": {"name": "own"}}]}}] if name == "job" else []
        return {"kind": "Pod", "metadata": {"name": name}, "spec": {"containers": [variables], "volumes": volumes}}

    maps = [{"kind": "ConfigMap", "metadata": {"name": name}, "data": {"x": name}} for name in ("shared", "own", "unread")]
    job, other = reader("job"), reader("other")
    own, rest = kustomize.split_maps([*maps, job, other], job, {"own": "run"}, "run-")
    assert {d["metadata"]["name"]: d["data"]["x"] for d in own} == {"run": "own", "run-shared": "shared"}
    assert [d["metadata"]["name"] for d in rest] == ["shared", "unread", "job", "other"], "the original that only the job read is gone"
    assert sorted(r["name"] for r in kustomize.config_map_references(job)) == ["elsewhere", "run", "run-shared"]
    assert sorted(r["name"] for r in kustomize.config_map_references(other)) == ["elsewhere", "shared"]
