"""Every rendered manifest: strict schemas, references, selectors, pod security, versions, image contents. No cluster, nothing from outside."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
import subprocess

import pytest
import yaml

from orchestrator import config
from orchestrator.lanes import capacity
from orchestrator.verbs import kustomize, render
from tests import k8s_checks as checks
from tests.k8s_checks import BUILT, FOLDERS, K8S, OVERLAYS, PROJECT, ROOT, all_pods, containers, job, quantity

SERVER = {"mlflow": BUILT["mlflow"], "mlflow-dev": BUILT["mlflow-dev"]}
COMPONENTS = sorted(path.parent.name for path in K8S.glob("components/*/kustomization.yaml"))


def built(folder: str) -> list[checks.Document]:
    return copy.deepcopy(BUILT[folder])


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_document_is_accepted_by_strict_schemas(folder):
    assert {f"{d['kind']}: {error}" for d in BUILT[folder] for error in checks.errors(d)} == set()


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_stands_on_the_base_alone(component, tmp_path):
    documents = checks.on_base(tmp_path, component)
    assert {error for d in documents for error in checks.errors(d)} == set()
    assert documents != BUILT["base"], f"{component} changes nothing"


def test_plain_files_are_accepted_too():
    (namespace,) = kustomize.documents(K8S / "namespace.yaml")
    assert checks.errors(namespace) == []
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert all(d["metadata"].get("namespace") in (None, namespace["metadata"]["name"]) for docs in BUILT.values() for d in docs)
    (files,) = kustomize.documents(K8S / "files.yaml")
    assert checks.errors(files) == []
    claims = {("PersistentVolumeClaim", name, None, False) for name in ("safebasin-results", "safebasin-cache")}
    assert set(checks.references(files["spec"])) == claims
    assert_restricted("files", files["spec"])


MISTAKES = {
    "a misspelt field of the job": ("RayJob", "/spec/shutdownAfterJobFinish", True),
    "a misspelt field of the cluster": ("RayJob", "/spec/rayClusterSpec/headGroupSpec/rayStartParam", {}),
    "a misspelt field of a worker group": ("RayJob", "/spec/rayClusterSpec/workerGroupSpecs/0/replica", 1),
    "a misspelt field of a pod": ("RayJob", "/spec/rayClusterSpec/headGroupSpec/template/spec/containers/0/imagePullPolcy", "Always"),
    "a misspelt field of the submitter": ("RayJob", "/spec/submitterPodTemplate/spec/restartPolcy", "Never"),
    "a misspelt field of the metadata": ("RayJob", "/metadata/lables", {"a": "b"}),
    "a mode that does not exist": ("RayJob", "/spec/submissionMode", "K8sJob"),
    "an authentication mode that does not exist": ("RayJob", "/spec/rayClusterSpec/authOptions/mode", "tokn"),
    "authentication that is left off": ("RayJob", "/spec/rayClusterSpec/authOptions", {}),
    "text for a number": ("RayJob", "/spec/rayClusterSpec/workerGroupSpecs/0/replicas", "1"),
    "a list for a text": ("RayJob", "/spec/entrypoint", ["python", "train.py"]),
    "a start parameter that is no text": ("RayJob", "/spec/rayClusterSpec/headGroupSpec/rayStartParams/num-cpus", 0),
    "no clean-up, but a time for it": ("RayJob", "/spec/shutdownAfterJobFinishes", False),
    "a deadline that is none": ("RayJob", "/spec/activeDeadlineSeconds", 0),
    "replicas outside their bounds": ("RayJob", "/spec/rayClusterSpec/workerGroupSpecs/0/replicas", 7),
    "a name that is too long": ("RayJob", "/metadata/name", "a" * 48),
    "a misspelt field of a core kind": ("PodDisruptionBudget", "/spec/minAvailible", 1),
    "a kind that nobody knows": ("PodDisruptionBudget", "/kind", "PodDisruptionBudgets"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_checks_refuse(mistake):
    kind, path, value = MISTAKES[mistake]
    (document,) = [d for d in built("base") if d["kind"] == kind]
    kustomize.apply_operation(document, {"op": "add", "path": path, "value": value})
    assert checks.errors(document) != []


@pytest.mark.parametrize("folder", FOLDERS)
def test_kubectl_renders_the_same(folder):
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on this machine to compare with; every other test of the manifests ran on our own rendering")
    printed = subprocess.run(["kubectl", "kustomize", str(K8S / folder)], capture_output=True, text=True, check=True).stdout
    theirs = {(d["kind"], d["metadata"]["name"]): d for d in yaml.safe_load_all(printed)}
    assert {(d["kind"], d["metadata"]["name"]): d for d in BUILT[folder]} == theirs


@pytest.mark.parametrize("folder", [*(f"overlays/{name}" for name in OVERLAYS), "mlflow", "mlflow-dev"])
def test_everything_that_is_referred_to_exists_or_is_listed_as_external(folder):
    own = {(d["kind"], d["metadata"]["name"]) for d in BUILT[folder]}
    secrets = checks.external_secrets()
    assert "Secret" not in {kind for kind, _ in own}
    for where, _, spec in all_pods(BUILT[folder]):
        for kind, name, key, _ in checks.references(spec):
            if kind == "Secret":
                assert name in secrets, f"{where}: Secret {name} has no example in k8s/secrets"
                assert key is None or key in secrets[name], f"{where}: {key} is not in the example of Secret {name}"
            else:
                assert (kind, name) in own, f"{where}: {kind} {name} is nowhere"
    for document in BUILT[folder]:
        if document["kind"] == "RayJob":
            auth = document["spec"]["rayClusterSpec"]["authOptions"]
            assert auth["mode"] == "token" and "auth_token" in secrets[auth["secretName"]]


def test_every_example_of_a_secret_is_used_and_none_holds_a_value(tmp_path):
    everything = [*BUILT.values(), checks.on_base(tmp_path, "storage-s3")]
    used = {d["spec"]["rayClusterSpec"]["authOptions"]["secretName"] for docs in everything for d in docs if d["kind"] == "RayJob"}
    used |= {name for docs in everything for _, _, spec in all_pods(docs) for kind, name, _, _ in checks.references(spec) if kind == "Secret"}
    assert used == set(checks.external_secrets())
    for path in (K8S / "secrets").glob("*.example"):
        for key, _, value in (line.partition("=") for line in path.read_text().splitlines() if "=" in line and not line.startswith("#")):
            secret = re.search(r"PASSWORD|KEY|token|TOKEN|SECRET", key)
            assert not value.strip() or not secret, f"{path.name}: {key} has a value"
            assert "://" not in value or "PASSWORD@" in value or value.startswith("s3://"), f"{path.name}: {key} holds an address with a password"
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"k8s/secrets/*.env", "k8s/secrets/*.ini"} <= set(ignored)
    assert not [p for p in checks.image_files(K8S / "Dockerfile") if "secrets" in p]


@pytest.mark.parametrize("name", OVERLAYS)
def test_selectors_take_a_pod(name, tmp_path):
    """Policies, services, budgets, monitors and spreads select pods of the overlay or of the tracking server; not one of them selects none."""
    documents = BUILT[f"overlays/{name}"] + SERVER["mlflow-dev"] + checks.on_base(tmp_path, "podmonitor")
    labels = [found for _, found, _ in all_pods(documents)]
    selectors = []

    def collect(node, where):
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("podSelector", "labelSelector") or (key == "selector" and ("matchLabels" in value or "matchExpressions" in value)):
                    selectors.append((where, value))
                elif key == "selector":
                    selectors.append((where, {"matchLabels": value}))
                else:
                    collect(value, where)
        elif isinstance(node, list):
            for value in node:
                collect(value, where)

    for document in documents:
        if document["kind"] != "ClusterQueue":
            collect(document.get("spec", {}), f"{document['kind']}/{document['metadata']['name']}")
    assert len(selectors) > 4
    for where, selector in selectors:
        assert any(checks.matches(selector, found) for found in labels), f"{where}: {selector} selects no pod"


def test_services_and_monitors_name_ports_that_exist(tmp_path):
    ports = {p["name"] for _, _, spec in all_pods(BUILT["overlays/local-cpu"]) for c in containers(spec) for p in c.get("ports", [])}
    (monitor,) = [d for d in checks.on_base(tmp_path, "podmonitor") if d["kind"] == "PodMonitor"]
    assert {e["port"] for e in monitor["spec"]["podMetricsEndpoints"]} <= ports
    for documents in SERVER.values():
        for service in (d for d in documents if d["kind"] == "Service"):
            pod_ports = {
                p["name"] for _, labels, spec in all_pods(documents) if checks.matches({"matchLabels": service["spec"]["selector"]}, labels)
                for c in containers(spec) for p in c.get("ports", [])
            }  # fmt: skip
            assert {p["targetPort"] for p in service["spec"]["ports"]} <= pod_ports


@pytest.mark.parametrize("folder", FOLDERS)
def test_pods_meet_the_restricted_standard(folder):
    for where, _, spec in all_pods(BUILT[folder]):
        assert_restricted(where, spec)


def assert_restricted(where: str, spec: dict) -> None:
    """The restricted pod security standard, and memory that is requested as it is limited."""
    assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & set(spec), where
    assert spec["automountServiceAccountToken"] is False, where
    pod = spec["securityContext"]
    assert pod["runAsNonRoot"] is True and pod["runAsUser"] > 0 and pod["seccompProfile"] == {"type": "RuntimeDefault"}, where
    for volume in spec.get("volumes", []):
        assert set(volume) - {"name"} <= {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}, f"{where}: {volume}"
    for container in containers(spec):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False and context["capabilities"] == {"drop": ["ALL"]}, f"{where} {container['name']}"
        assert not context.get("privileged") and context.get("runAsUser") != 0, where
        assert not any("hostPort" in port for port in container.get("ports", [])), where
        resources = container["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"], f"{where}: memory requested is not its limit"
        in_memory = [quantity(v["emptyDir"]["sizeLimit"]) for v in spec.get("volumes", []) if v.get("emptyDir", {}).get("medium") == "Memory"]
        assert sum(in_memory) <= quantity(resources["limits"]["memory"]) / 2, f"{where}: /dev/shm takes more than half of the memory"
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        claimed = {volume["name"] for volume in spec.get("volumes", [])} | ({"data"} if "StatefulSet" in where else set())
        assert mounted <= claimed, f"{where}: {mounted - claimed} has no volume"


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_job_ends_is_repeated_and_cleans_up(name):
    spec = job(BUILT[f"overlays/{name}"])["spec"]
    cluster, queued = spec["rayClusterSpec"], name == "kueue"
    assert "suspend" not in spec, "written, a second apply would suspend a job that runs; Kueue's webhook suspends by the label"
    assert spec["submissionMode"] == "K8sJobMode" and spec["backoffLimit"] > 0
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
    assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] > 0
    assert cluster["enableInTreeAutoscaling"] is False
    assert ("kueue.x-k8s.io/queue-name" in job(BUILT[f"overlays/{name}"])["metadata"]["labels"]) == queued
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert not {"entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "runtimeEnvYAML"} & set(spec)
    for container in head["template"]["spec"]["containers"]:
        assert "nvidia.com/gpu" not in {**container["resources"]["limits"], **container["resources"]["requests"]}
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] > 0
        (container,) = group["template"]["spec"]["containers"]
        assert float(group["rayStartParams"]["num-cpus"]) == quantity(container["resources"]["requests"]["cpu"])
        gpus = [container["resources"][part].get("nvidia.com/gpu") for part in ("requests", "limits")]
        assert gpus == ([None, None] if name == "local-cpu" else ["1", "1"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_entry_point_can_run(name, tmp_path, monkeypatch):
    """The command is in the image, the config is mounted where it looks, valid with its overrides, resumable, and fits the workers."""
    documents = BUILT[f"overlays/{name}"]
    spec = job(documents)["spec"]
    assert re.fullmatch(r"[\w./=:-]+( [\w./=:-]+)*", spec["entrypoint"]), "KubeRay pastes it into a shell script"
    program, verb, *arguments = shlex.split(spec["entrypoint"])
    module = PROJECT["project"]["scripts"][program].partition(":")[0].replace(".", "/") + ".py"
    assert module in checks.image_files(K8S / "Dockerfile")
    assert verb == "run" and "--exit-zero" in arguments
    path = arguments[arguments.index("--config") + 1]
    overrides = [a for a in arguments if "=" in a]
    assert overrides == ["output.resume=true"]
    (data,) = [d["data"] for d in documents if d["kind"] == "ConfigMap" and d["metadata"]["name"] == render.EXPERIMENT]
    for _, _, pod in all_pods([job(documents)])[1:]:
        mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
        volume = {v["name"]: v for v in pod["volumes"]}[mounts[path.rpartition("/")[0]]]
        assert volume["configMap"]["name"] == render.EXPERIMENT
    (environment,) = [d["data"] for d in documents if d["kind"] == "ConfigMap" and d["metadata"]["name"] == "safebasin-environment"]
    monkeypatch.setenv("SAFEBASIN_RESULTS", environment["SAFEBASIN_RESULTS"])
    (tmp_path / "experiment.yaml").write_text(data[path.rpartition("/")[2]])
    experiment = config.load(tmp_path / "experiment.yaml", overrides)
    assert experiment.output.resume and not experiment.output.overwrite
    assert experiment.output.dir.startswith(environment["SAFEBASIN_RESULTS"] + "/")
    assert experiment.ray.address is None and experiment.tracking.uri is None
    plan = capacity.plan(experiment, render.worker_nodes(job(documents)), experiment.search.trials)
    assert plan.lanes * plan.workers >= spec["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"], "some workers would idle"


def test_results_and_caches_outlive_the_cluster():
    for name in OVERLAYS:
        documents = BUILT[f"overlays/{name}"]
        (environment,) = [d["data"] for d in documents if d["kind"] == "ConfigMap" and d["metadata"]["name"] == "safebasin-environment"]
        claims = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "PersistentVolumeClaim"}
        nodes = sum(group["replicas"] for group in job(documents)["spec"]["rayClusterSpec"]["workerGroupSpecs"])
        if environment["SAFEBASIN_RESULTS"].startswith("s3://"):
            assert not claims and environment["SAFEBASIN_CACHE_URI"].startswith("s3://")
            continue
        own = "safebasin-local" if name == "local-cpu" else "safebasin"
        assert set(claims) == {f"{own}-results", f"{own}-cache"}
        shared = all(claim["accessModes"] == ["ReadWriteMany"] for claim in claims.values())
        assert shared or (name == "local-cpu" and nodes == 1), f"{name}: head and workers sit on several nodes, a ReadWriteOnce claim on one"
