"""The part of kustomize that `k8s/` uses, so that `safebasin render` and the tests need no binary.

Known: resources, components, configMapGenerator from files with fixed names, JSON 6902 patches from files with a target, images,
namespace. Everything else is refused, never skipped, and so is a patch whose target is not there (kustomize lets that pass). A test
compares the result with `kubectl kustomize` where there is one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import ConfigError

Document = dict[str, Any]

KEYS = {"apiVersion", "kind", "namespace", "resources", "components", "generatorOptions", "configMapGenerator", "patches", "images"}
CLUSTER_SCOPED = {"Namespace", "ClusterQueue", "ResourceFlavor", "ClusterRole", "ClusterRoleBinding", "StorageClass", "PriorityClass"}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """SafeLoader that refuses a key written twice."""


def _mapping(loader: Any, node: Any, deep: bool = False) -> dict:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is written twice", node.start_mark)
    return yaml.constructor.SafeConstructor.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def documents(path: Path) -> list[Any]:
    """The YAML documents of a file. Raises ConfigError where it is missing, is no YAML or writes a key twice."""
    try:
        return [found for found in yaml.load_all(path.read_text(encoding="utf-8"), Loader=_Loader) if found is not None]  # noqa: S506
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; a kustomization names it") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def build(folder: str | Path) -> list[Document]:
    """What `kubectl kustomize folder` prints, as documents in the order they are named.

    Raises ConfigError, naming the file, for anything that is missing, unknown, ambiguous or twice there.
    """
    built = _accumulate(Path(folder), "Kustomization", [])
    seen = set()
    for document in built:
        if (identity := _identity(document)) in seen:
            raise ConfigError(f"{folder}: {' '.join(map(str, identity))} is there twice")
        seen.add(identity)
    return built


def _identity(document: Document) -> tuple:
    metadata = document["metadata"]
    return document["apiVersion"], document["kind"], metadata.get("namespace"), metadata["name"]


def _accumulate(folder: Path, kind: str, given: list[Document]) -> list[Document]:
    """`given` and what the folder adds, after the folder's changes; a component's changes reach what was there before."""
    path = folder / "kustomization.yaml"
    body = documents(path)[0]
    if body.get("kind") != kind:
        raise ConfigError(f"{path} is a {body.get('kind')}, but it is named as a {kind}")
    if unknown := sorted(set(body) - KEYS):
        raise ConfigError(f"{path}: {', '.join(unknown)} is not supported by `safebasin render`; use {', '.join(sorted(KEYS))}, or kubectl kustomize")
    built = list(given)
    for name in body.get("resources", []):
        source = folder / name
        built += _accumulate(source, "Kustomization", []) if source.is_dir() else copy.deepcopy(documents(source))
    for name in body.get("components", []):
        built = _accumulate(folder / name, "Component", built)
    built += [_config_map(folder, entry, body) for entry in body.get("configMapGenerator", [])]
    for entry in body.get("patches", []):
        _patch_all(folder, entry, built)
    for document in built:
        if "namespace" in body:
            if document["kind"] in CLUSTER_SCOPED:
                raise ConfigError(f"{path}: {document['kind']} belongs to no namespace; apply it from a folder without `namespace:`")
            document["metadata"]["namespace"] = body["namespace"]
        for entry in body.get("images", []):
            _set_image(document, entry, path)
    return built


def _config_map(folder: Path, entry: dict[str, Any], body: Document) -> Document:
    _only(folder, "configMapGenerator", entry, {"name", "files"})
    if body.get("generatorOptions") != {"disableNameSuffixHash": True}:
        raise ConfigError(f"{folder}: configMapGenerator needs generatorOptions.disableNameSuffixHash: true; a RayJob's references are not rewritten")
    data = {}
    for name in entry["files"]:
        try:
            data[Path(name).name] = (folder / name).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{folder / name}: {error.strerror}; configMapGenerator {entry['name']!r} names it") from error
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": entry["name"]}, "data": data}


def _only(folder: Path, what: str, entry: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(entry) - known):
        raise ConfigError(f"{folder}: {what}.{unknown[0]} is not supported by `safebasin render`; use {', '.join(sorted(known))}")


def _patch_all(folder: Path, entry: dict[str, Any], built: list[Document]) -> None:
    _only(folder, "patches", entry, {"path", "target"})
    target, path = entry["target"], folder / entry["path"]
    _only(folder, "patches.target", target, {"kind", "name"})
    chosen = [d for d in built if d["kind"] == target["kind"] and target.get("name") in (None, d["metadata"]["name"])]
    if not chosen:
        raise ConfigError(f"{path}: nothing to patch; there is no {target['kind']} {target.get('name', '')}".rstrip())
    operations = documents(path)[0]
    if not isinstance(operations, list):
        raise ConfigError(f"{path} is no list of JSON 6902 operations")
    for document in chosen:
        for operation in operations:
            try:
                apply_operation(document, operation)
            except (KeyError, IndexError, ValueError) as error:
                raise ConfigError(f"{path}: {operation['op']} {operation['path']} cannot be done: {error}") from error


def apply_operation(document: Document, operation: dict[str, Any]) -> None:
    """One JSON 6902 operation (add, replace, remove, test) in place.

    Raises KeyError or IndexError where the path leads nowhere, ValueError for a failed test or an operation not known.
    """
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    node: Any = document
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    kind, value = operation["op"], copy.deepcopy(operation.get("value"))
    if kind == "add" and isinstance(node, list):
        node.insert(len(node) if last == "-" else int(last), value)
        return
    key = int(last) if isinstance(node, list) else last
    if kind == "add":
        node[key] = value
        return
    found = node[key]
    if kind == "replace":
        node[key] = value
    elif kind == "remove":
        del node[key]
    elif kind == "test":
        if found != value:
            raise ValueError(f"it is {found!r}, not {value!r}")
    else:
        raise ValueError("unknown operation; use add, replace, remove or test")


def containers(node: Any) -> Iterator[dict[str, Any]]:
    """Every container and init container anywhere below `node`."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers") and isinstance(value, list):
                yield from value
            else:
                yield from containers(value)
    elif isinstance(node, list):
        for value in node:
            yield from containers(value)


def config_map_references(node: Any) -> Iterator[dict[str, Any]]:
    """Every place below `node` that names a ConfigMap (volumes, projected volumes, variables), as the dict whose `name` it is."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("configMap", "configMapRef", "configMapKeyRef") and isinstance(value, dict) and "name" in value:
                yield value
            else:
                yield from config_map_references(value)
    elif isinstance(node, list):
        for value in node:
            yield from config_map_references(value)


def split_maps(documents: list[Document], reader: Document, names: dict[str, str], prefix: str) -> tuple[list[Document], list[Document]]:
    """(copies of the ConfigMaps that `reader` reads, for it alone; the documents without the originals that nothing else reads).

    A copy is named by `names`, else its old name after `prefix`, and `reader` refers to it then.
    """
    known = {d["metadata"]["name"]: d for d in documents if d["kind"] == "ConfigMap"}
    own: dict[str, Document] = {}
    for reference in [*({"name": name} for name in names), *config_map_references(reader)]:
        if (old := reference["name"]) in known:
            if old not in own:
                own[old] = copy.deepcopy(known[old])
                own[old]["metadata"]["name"] = names.get(old, prefix + old)
            reference["name"] = own[old]["metadata"]["name"]
    read = {reference["name"] for d in documents if d is not reader for reference in config_map_references(d)}
    gone = [known[old] for old in own if old not in read]
    return list(own.values()), [d for d in documents if not any(d is one for one in gone)]


def split_image(reference: str) -> tuple[str, str, str]:
    """(name, tag, digest) of `name[:tag][@digest]`, "" for what is not there; a registry's port is no tag."""
    rest, _, digest = reference.partition("@")
    folder, slash, last = rest.rpartition("/")
    last, _, tag = last.partition(":")
    return folder + slash + last, tag, digest


def _set_image(document: Document, entry: dict[str, Any], path: Path) -> None:
    _only(path.parent, "images", entry, {"name", "newName", "newTag", "digest"})
    for container in containers(document):
        name, tag, digest = split_image(container["image"])
        if name == entry["name"]:
            if "newTag" in entry or "digest" in entry:  # as kustomize: one of them alone drops the other
                tag, digest = str(entry.get("newTag", "")), entry.get("digest", "")
            container["image"] = entry.get("newName", name) + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
