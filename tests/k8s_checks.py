"""Strict checks of Kubernetes manifests without a cluster: structure by kubernetes-validate's schemas and `tests.k8s_schemas`, values by
`tests.k8s_kinds`, `tests.k8s_pods` and `tests.k8s_custom`."""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import referencing

from orchestrator.verbs import kustomize
from tests import k8s_custom, k8s_kinds, k8s_pods
from tests.k8s_schemas import SPECS
from tests.k8s_values import amount

ROOT = Path(__file__).parents[1]
K8S = ROOT / "k8s"
K8S_VERSION = "1.34"
OVERLAYS = ("local-cpu", "gpu-single", "gpu-multi-node", "kueue")
ADMIN = ("components/kueue/admin", "components/kueue-topology/admin")
FOLDERS = ("base", "mlflow", "mlflow-dev", *ADMIN, *(f"overlays/{name}" for name in OVERLAYS))

BUILT = {folder: kustomize.build(K8S / folder) for folder in FOLDERS}
"""What each folder renders to; copy before changing."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)

Document = dict[str, Any]
PodOf = tuple[str, dict[str, str], dict[str, Any]]
"""(where, labels, pod spec)"""


def errors(document: Any) -> list[str]:
    """Everything a strict API server, and then Kueue and KubeRay, would refuse; a sentence for whatever the document is."""
    if not isinstance(document, dict):
        return [f"a document is a mapping, not {type(document).__name__}"]
    if bad := [key for key in ("apiVersion", "kind") if not isinstance(document.get(key), str)]:
        return [f"{', '.join(bad)}: is missing or no text"]
    if not isinstance(document.get("metadata"), dict):
        return ["metadata: is missing or no mapping"]
    document = present(document)
    key = document["apiVersion"], document["kind"]
    if key not in SPECS:
        return structure(document) or list(k8s_kinds.rules(document))
    found = structure({"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]})  # ObjectMeta
    if unknown := set(document) - {"apiVersion", "kind", "metadata", "spec", "status"}:
        found.append(f"unknown fields {sorted(unknown)}")
    for error in jsonschema.Draft7Validator(SPECS[key]).iter_errors(document.get("spec", {})):
        found.append(f"spec.{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}")
    for where, template in k8s_custom.templates(document) if not found else ():
        found += [f"{where}: {error} (the operator makes this pod, and the API server refuses it)" for error in _template(template)]
    return found or [*k8s_kinds.metadata(document), *k8s_custom.rules(document)]


def _template(template: Document) -> list[str]:
    if unknown := set(template) - {"metadata", "spec"}:
        return [f"unknown fields {sorted(unknown)}"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata", {}), "spec": template.get("spec")}
    if not isinstance(pod["metadata"], dict) or not isinstance(pod["spec"], dict):
        return ["metadata and spec of a pod template are mappings"]
    return structure(pod) or list(k8s_pods.template("template", template))


def present(node: Any) -> Any:
    """Without the fields that are null: the server takes them for absent."""
    if isinstance(node, dict):
        return {key: present(value) for key, value in node.items() if value is not None}
    return [present(value) for value in node] if isinstance(node, list) else node


FORMATS = jsonschema.FormatChecker(formats=())
for _format, _bits in (("int32", 31), ("int64", 63)):
    FORMATS.checks(_format)(lambda value, limit=2**_bits: not isinstance(value, int) or -limit <= value < limit)


@functools.cache
def _validator(api_version: str, kind: str, version: str) -> jsonschema.protocols.Validator | None:
    """The strict schema of a core kind, with the ranges of its numbers; None where there is none."""
    group, _, rest = api_version.rpartition("/")
    stem = f"{kind.lower()}-{group.partition('.')[0] + '-' if group else ''}{rest}"
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    if not re.fullmatch(r"[a-z0-9-]+", stem) or not (folder / f"{stem}.json").is_file():
        return None
    parts = [referencing.Resource.from_contents(json.loads((folder / name).read_text())) for name in (f"{stem}.json", "_definitions.json")]
    return jsonschema.Draft202012Validator(parts[0].contents, registry=parts @ referencing.Registry(), format_checker=FORMATS)


def structure(document: Document, version: str = K8S_VERSION) -> list[str]:
    """Unknown and missing fields, types, ranges of numbers, and null where a list has no place for it."""
    validator = _validator(document["apiVersion"], document["kind"], version)
    if validator is None:
        return [f"no schema: kind {document['kind']!r} of {document['apiVersion']!r} is not known to Kubernetes {version}"]
    wrong = [error for error in validator.iter_errors(document) if not _defaulted(error)]
    found = [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in wrong]
    return found or [f"{path}: an entry of a list is null" for path in _nulls(document, "")]


def _defaulted(error: jsonschema.ValidationError) -> bool:
    """Fields that the schemas require and the server fills in, or takes without."""
    missing = {"apiGroup": "roleRef", "serviceName": "spec", "status": "onPodConditions"}
    where = [part for part in error.absolute_path if isinstance(part, str)]
    return error.validator == "required" and any(error.message.startswith(f"'{key}'") and where[-1:] == [at] for key, at in missing.items())


def _nulls(node: Any, at: str) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _nulls(value, f"{at}.{key}" if at else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            if value is None:
                yield f"{at}[{i}]"
            yield from _nulls(value, f"{at}[{i}]")


templates = k8s_custom.templates


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
    found = amount(text)
    assert found is not None, f"{text!r} is no quantity"
    return float(found)


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


def on_base(folder: Path, *components: str) -> list[Document]:
    """The base with components in this order, built in `folder`."""
    if not (folder / "k8s").exists():
        (folder / "k8s").symlink_to(K8S)
    named = ", ".join(f"k8s/components/{component}" for component in components)
    lines = ["kind: Kustomization", "namespace: safebasin", "resources: [k8s/base]", f"components: [{named}]"]
    (folder / "kustomization.yaml").write_text("\n".join(lines))
    return kustomize.build(folder)
