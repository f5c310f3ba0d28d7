"""Strict checks of Kubernetes manifests without a cluster: core kinds by kubernetes-validate, custom kinds by `tests.k8s_schemas`."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
from kubernetes_validate import utils as validating

from orchestrator.verbs import kustomize
from tests.k8s_schemas import SPECS

ROOT = Path(__file__).parents[1]
K8S = ROOT / "k8s"
K8S_VERSION = "1.34"
OVERLAYS = ("local-cpu", "gpu-single", "gpu-multi-node", "kueue")
FOLDERS = ("base", "mlflow", "mlflow-dev", "components/kueue/admin", *(f"overlays/{name}" for name in OVERLAYS))

BUILT = {folder: kustomize.build(K8S / folder) for folder in FOLDERS}
"""What each folder renders to; copy before changing."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)

validating.schema_contents = functools.cache(validating.schema_contents)  # it otherwise reads megabytes of JSON for every document

Document = dict[str, Any]
PodOf = tuple[str, dict[str, str], dict[str, Any]]
"""(where, labels, pod spec)"""


def errors(document: Document) -> list[str]:
    """Everything a strict API server, and then KubeRay's operator, would refuse."""
    key = document.get("apiVersion"), document.get("kind")
    if key not in SPECS:
        return _core(document)
    found = _core({"apiVersion": "v1", "kind": "ConfigMap", "metadata": document.get("metadata", {})})  # ObjectMeta
    if unknown := set(document) - {"apiVersion", "kind", "metadata", "spec"}:
        found.append(f"unknown fields {sorted(unknown)}")
    for error in jsonschema.Draft7Validator(SPECS[key]).iter_errors(document.get("spec") or {}):
        found.append(f"spec.{'.'.join(map(str, error.absolute_path))}: {error.message}")
    for where, labels, spec in pods(document) if not found else []:
        found += [f"{where}: {e}" for e in _core({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", "labels": labels}, "spec": spec})]
    return found or list(_operator(document))


def _core(document: Document) -> list[str]:
    try:
        validating.validate(document, K8S_VERSION, strict=True)
    except jsonschema.ValidationError as error:
        return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"]
    except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError) as error:
        return [f"no schema: {error}"]
    return []


def _operator(document: Document) -> Iterator[str]:
    """KubeRay's own rules for a RayJob (utils/validation.go)."""
    if document["kind"] != "RayJob":
        return
    spec, name = document["spec"], document["metadata"]["name"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > 47:
        yield f"name {name!r} is no DNS label of at most 47 characters"
    if (spec.get("suspend") or spec.get("ttlSecondsAfterFinished")) and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend and ttlSecondsAfterFinished need shutdownAfterJobFinishes"
    if spec.get("clusterSelector") and (spec.get("backoffLimit") or spec.get("suspend")):
        yield "clusterSelector goes with neither backoffLimit nor suspend"
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"group {group['groupName']}: replicas outside minReplicas..maxReplicas"


def templates(document: Document) -> Iterator[tuple[str, Document]]:
    """(role, pod template) of every pod that an object leads to."""
    spec = document.get("spec") or {}
    if document["kind"] == "RayJob":
        yield "submitter", spec["submitterPodTemplate"]
    if document["kind"] in ("RayJob", "RayCluster"):
        cluster = spec.get("rayClusterSpec", spec)
        yield "head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield group["groupName"], group["template"]
    elif document["kind"] in ("Deployment", "StatefulSet", "Job", "DaemonSet"):
        yield "pod", spec["template"]


def pods(document: Document) -> list[PodOf]:
    where = f"{document['kind']}/{document['metadata'].get('name')}"
    return [(f"{where} {role}", template["metadata"]["labels"], template["spec"]) for role, template in templates(document)]


def all_pods(documents: list[Document]) -> list[PodOf]:
    return [pod for document in documents for pod in pods(document)]


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def job(documents: list[Document]) -> Document:
    (found,) = [d for d in documents if d["kind"] == "RayJob"]
    return found


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector takes a pod with these labels; an empty one takes all."""
    for expression in selector.get("matchExpressions", []):
        inside = labels.get(expression["key"]) in expression.get("values", [])
        present = expression["key"] in labels
        if not {"In": inside, "NotIn": not inside, "Exists": present, "DoesNotExist": not present}[expression["operator"]]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def quantity(text: str | int) -> float:
    """A Kubernetes quantity as a number (`500m` -> 0.5, `2Gi` -> bytes)."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()
    return float(number) * {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[unit]


def references(spec: dict[str, Any]) -> Iterator[tuple[str, str, str | None, bool]]:
    """(kind, name, key or None, optional) of every Secret, ConfigMap, claim and service account that a pod names."""
    if "serviceAccountName" in spec:
        yield "ServiceAccount", spec["serviceAccountName"], None, False
    for volume in spec.get("volumes", []):
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"], None, volume["secret"].get("optional", False)
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"], None, volume["configMap"].get("optional", False)
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], None, False
    for container in containers(spec):
        for source in container.get("envFrom", []):
            for kind, name in (("Secret", "secretRef"), ("ConfigMap", "configMapRef")):
                if name in source:
                    yield kind, source[name]["name"], None, source[name].get("optional", False)
        for variable in container.get("env", []):
            for kind, name in (("Secret", "secretKeyRef"), ("ConfigMap", "configMapKeyRef")):
                if found := variable.get("valueFrom", {}).get(name):
                    yield kind, found["name"], found["key"], found.get("optional", False)


@functools.cache
def external_secrets() -> dict[str, set[str]]:
    """Secrets that the operator of the cluster makes, with their keys, as the examples list them."""
    found = {}
    for path in sorted((K8S / "secrets").glob("*.env.example")):
        lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        found[path.name.removesuffix(".env.example")] = {line.partition("=")[0] for line in lines}
    return found | {"safebasin-mlflow-auth": {"basic_auth.ini"}}


@functools.cache
def image_files(dockerfile: Path) -> set[str]:
    """Files that an image gets from the repository: what COPY names, less what .dockerignore takes out. Paths of the repository.

    Handles what our two files use: `COPY SOURCE... DESTINATION` of files and folders, ignore patterns with `*`, `**` and `!`.
    """
    text = re.sub(r"\\\n", " ", dockerfile.read_text())
    sources = [word for line in text.splitlines() if line.startswith("COPY ") for word in line.split()[1:-1]]
    found = set()
    for source in sources:
        path = ROOT / source
        assert path.exists(), f"{dockerfile.name} copies {source}, which is not there"
        files = path.rglob("*") if path.is_dir() else [path]
        found |= {f.relative_to(ROOT).as_posix() for f in files if f.is_file()}
    return {name for name in found if not ignored(name)}


@functools.cache
def ignored(name: str) -> bool:
    """Docker's rule: the last pattern that matches the path or one of its folders decides."""
    parts = name.split("/")
    prefixes = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            regex = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
            if any(re.fullmatch(regex, prefix) for prefix in prefixes):
                out = not line.startswith("!")
    return out


def on_base(component: str, folder: Path) -> list[Document]:
    """The base with one component, built in `folder`."""
    (folder / "k8s").symlink_to(K8S)
    lines = ["kind: Kustomization", "namespace: safebasin", "resources: [k8s/base]", f"components: [k8s/components/{component}]"]
    (folder / "kustomization.yaml").write_text("\n".join(lines))
    return kustomize.build(folder)
