"""Images, versions, the tracking server, the queue, spot nodes: what several files must say alike."""

from __future__ import annotations

import re
import shutil

import pytest

import orchestrator
from orchestrator import config
from orchestrator.verbs import kustomize, render
from tests import k8s_checks as checks
from tests.k8s_checks import BUILT, K8S, OVERLAYS, PINS, PROJECT, ROOT, all_pods, containers, job, quantity

PINNED_IMAGE = re.compile(r"[a-z0-9.-]+(:\d+)?(/[a-z0-9._-]+)+:[\w.-]+@sha256:[0-9a-f]{64}")


def test_images_are_pinned_and_versions_agree():
    version, ray, mlflow = orchestrator.__version__, PINS["ray"], PINS["mlflow"]
    for folder, documents in BUILT.items():
        for where, _, spec in all_pods(documents):
            for image in (c["image"] for c in containers(spec)):
                name, tag, _ = kustomize.split_image(image)
                assert PINNED_IMAGE.fullmatch(image) or (folder, name) == ("mlflow-dev", "docker.io/library/postgres"), f"{folder} {where}: {image}"
                flavour = "cpu" if folder in ("base", "overlays/local-cpu") else "cuda"
                expected = {"safebasin": f"{version}-ray{ray}-{flavour}", "safebasin-mlflow": mlflow}
                assert tag == expected.get(name.rpartition("/")[2], tag), f"{folder} {where}: {image}"
        for document in (d for d in documents if d["kind"] == "RayJob"):
            assert document["spec"]["rayClusterSpec"]["rayVersion"] == ray
            images = {c["image"] for _, _, spec in all_pods([document]) for c in containers(spec)}
            assert len(images) == 1, f"{folder}: Ray wants one version everywhere, not {images}"
    ours, server = (K8S / "Dockerfile").read_text(), (K8S / "Dockerfile.mlflow").read_text()
    assert f'safebasin.ray-version="{ray}"' in ours and f'image.version="{version}"' in ours and f'image.version="{mlflow}"' in server
    requirements = [line for line in (K8S / "mlflow" / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    for name, _, pinned in (line.partition("==") for line in requirements):
        assert pinned and PINS.get(re.sub(r"\[.*", "", name), pinned) == pinned


def test_images_hold_the_code_and_nothing_else():
    files = checks.image_files(K8S / "Dockerfile")
    for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]:
        modules = {p.relative_to(ROOT).as_posix() for p in ROOT.glob(f"{pattern}/**/*.py") if "egg-info" not in str(p)}
        assert modules and modules <= files, pattern
    assert {"constraints.txt", "pyproject.toml", "LICENSE", "README.md", "k8s/base/rayjob.yaml", "orchestrator/config/presets/pocket.yaml"} <= files
    top = {name.split("/")[0] for name in files}
    assert top == {"constraints.txt", "pyproject.toml", "LICENSE", "README.md", "orchestrator", "strategies", "search_spaces", "k8s"}
    assert not [name for name in files if "__pycache__" in name or "/." in name]
    assert checks.image_files(K8S / "Dockerfile.mlflow") == {"constraints.txt", "k8s/mlflow/requirements.txt"}


@pytest.mark.parametrize(("name", "uid"), [("Dockerfile", 1000), ("Dockerfile.mlflow", 1000)])
def test_dockerfiles_are_locked_and_not_root(name, uid):
    text = re.sub(r"\\\n", " ", (K8S / name).read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users and users[-1].split(":")[0] == str(uid)
    assert not [line for line in lines if line.split()[0] in ("ADD", "ENTRYPOINT", "VOLUME")]
    for command in re.findall(r"pip install [^&|]*", text):
        assert "--constraint constraints.txt" in command or "--no-deps ." in command or "^torch==" in command, command
    assert ":latest" not in text and "sudo" not in text
    labels = {"title", "version", "revision", "licenses"}
    assert labels <= set(re.findall(r"org\.opencontainers\.image\.(\w+)=", text))


def test_the_tracking_server_lets_its_clients_in():
    for documents in (BUILT["mlflow"], BUILT["mlflow-dev"]):
        (server,) = [d for d in documents if d["kind"] == "Deployment"]
        namespace = server["metadata"]["namespace"]
        container = server["spec"]["template"]["spec"]["containers"][0]
        environment = {variable["name"]: variable for variable in container["env"]}
        hosts = environment["MLFLOW_SERVER_ALLOWED_HOSTS"]["value"].split(",")
        for host in ("mlflow", f"mlflow.{namespace}", f"mlflow.{namespace}.svc", f"mlflow.{namespace}.svc.cluster.local", "localhost", "127.0.0.1"):
            assert {host, f"{host}:5000"} <= set(hosts)
        for client in (d for d in BUILT["base"] if d["metadata"]["name"] == "safebasin-environment"):
            assert client["data"]["MLFLOW_TRACKING_URI"].removeprefix("http://") in hosts
        secret = {"MLFLOW_BACKEND_STORE_URI", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY", "AWS_SECRET_ACCESS_KEY"}
        assert all("secretKeyRef" in environment[name]["valueFrom"] for name in secret)
        assert "--app-name=basic-auth" in container["args"] and not any("://" in argument for argument in container["args"])
        assert container["startupProbe"]["httpGet"]["path"] == "/health"  # exempt from the host check and from authentication
        assert server["spec"]["strategy"] == {"type": "Recreate"} and server["spec"]["replicas"] == 1


def test_only_the_head_holds_the_tracking_password():
    for name in OVERLAYS:
        holders = {
            labels["safebasin-role"] for _, labels, spec in all_pods(BUILT[f"overlays/{name}"])
            for _, secret, _, _ in checks.references(spec) if secret == "safebasin-mlflow-client"
        }  # fmt: skip
        assert holders == {"head"}


def test_the_queue_can_admit_the_queued_run():
    admin = BUILT["components/kueue/admin"]
    queue, local = (next(d for d in admin if d["kind"] == kind) for kind in ("ClusterQueue", "LocalQueue"))
    queued = job(BUILT["overlays/kueue"])
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert local["metadata"]["namespace"] == queued["metadata"]["namespace"] and local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    (group,) = queue["spec"]["resourceGroups"]
    quota = {r["name"]: quantity(r["nominalQuota"]) for r in group["flavors"][0]["resources"]}
    assert set(group["coveredResources"]) == set(quota)
    replicas = {"workers": queued["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]}
    needed: dict[str, float] = {}
    for role, template in checks.templates(queued):
        for container in template["spec"]["containers"]:
            for resource, amount in container["resources"]["requests"].items():
                needed[resource] = needed.get(resource, 0) + quantity(amount) * replicas.get(role, 1)
    assert {resource: amount for resource, amount in needed.items() if amount > quota.get(resource, 0)} == {}


def test_heads_stay_off_spot_nodes_and_workers_may_use_them():
    cluster = job(BUILT["overlays/kueue"])["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = head["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    marks = {(e["key"], *e["values"]) for e in term["matchExpressions"] if e["operator"] == "NotIn"}
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]
    preferred = worker["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert {(e["key"], *e["values"]) for p in preferred for e in p["preference"]["matchExpressions"]} == marks
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in worker["tolerations"]


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name != "local-cpu"])  # one node: it patches its claims
def test_every_overlay_can_put_its_results_into_a_bucket(name, tmp_path):
    """As docs/kubernetes.md says: storage-s3 instead of storage-pvc; then no pod mounts a claim, and each holds the keys."""
    shutil.copytree(K8S, tmp_path / "k8s")
    file = tmp_path / "k8s" / "overlays" / name / "kustomization.yaml"
    assert "storage-pvc" in file.read_text()
    file.write_text(file.read_text().replace("storage-pvc", "storage-s3"))
    made = render.render(config.load(None, ["ray.use_gpu=false", "output.dir=results"]), str(file.parent))
    documents = [*made.shared, *made.run]
    assert not [problem for document in documents for problem in checks.errors(document)]
    assert not [d for d in documents if d["kind"] == "PersistentVolumeClaim"]
    for _, labels, spec in all_pods(documents):
        found = {reference for reference in checks.references(spec)}
        assert not [one for one in found if one[0] == "PersistentVolumeClaim"]
        if labels["safebasin-role"] in ("head", "worker"):
            assert "safebasin-s3" in {one[1] for one in found if one[0] == "Secret"}
    (environment,) = [d["data"] for d in documents if d["metadata"]["name"] == f"{made.name}-safebasin-environment"]
    (experiment,) = [d["data"]["experiment.yaml"] for d in documents if d["metadata"]["name"] == made.name and d["kind"] == "ConfigMap"]
    (tmp_path / "run.yaml").write_text(experiment.replace(render.RESULTS, environment["SAFEBASIN_RESULTS"]))
    assert config.load(tmp_path / "run.yaml").output_address == f"s3://safebasin/results/{made.name}"


def test_the_wheel_carries_what_render_reads():
    listed = PROJECT["tool"]["setuptools"]["data-files"]
    shipped = {path for patterns in listed.values() for pattern in patterns for path in ROOT.glob(pattern)}
    needed = {path for folder in ("base", "components", "overlays") for path in (K8S / folder).rglob("*.yaml") if "admin" not in path.parts}
    assert shipped == needed
    assert all(target == f"share/safebasin/{patterns[0].rpartition('/')[0]}" for target, patterns in listed.items())
