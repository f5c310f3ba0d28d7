"""Our own check of manifests: what it refuses of what an API server refuses, what it lets pass, and that no file makes it fall over.

Each mutation is one change of a manifest of ours (`tests/k8s_mutations.py`): one that the server, or Kueue's or KubeRay's admission, refuses, or an
odd one that it takes.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.verbs import kustomize
from tests import k8s_checks as checks
from tests import k8s_custom
from tests.k8s_mutations import ACCEPTED, OBJECTS, REFUSED, document, mutated
from tests.k8s_schemas import SPECS


def name_of(case: tuple[str, str, Any]) -> str:
    which, path, value = case
    return f"{which} {path.rpartition('/')[2]} {'removed' if value is ... else str(value)[:40]}"


def test_the_objects_themselves_are_accepted():
    assert {f"{d['kind']}: {error}" for d in OBJECTS for error in checks.errors(d)} == set()


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_what_a_server_refuses_is_refused(case):
    found = checks.errors(mutated(*case))
    assert found and all(": " in error for error in found), found


@pytest.mark.parametrize("case", ACCEPTED, ids=name_of)
def test_what_a_server_accepts_is_accepted(case):
    assert checks.errors(mutated(*case)) == []


def test_a_rule_that_is_no_server_s_says_whose_it_is():
    for path in ("/spec/rayClusterSpec/rayVersion", "/spec/rayClusterSpec/authOptions/mode", "/spec/shutdownAfterJobFinishes"):
        found = checks.errors(mutated("RayJob", path, ...))
        assert found and all("rule)" in error for error in found), found


JUNK = (None, [], {}, "", "x", -1, 1.5, True, [None], {"x": None}, [[]], [{}])


def paths(node: Any, at: str = "") -> list[str]:
    """Every place in a document, as a JSON pointer."""
    parts = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found = [at] if at else []
    for key, value in parts:
        found += paths(value, f"{at}/{str(key).replace('~', '~0').replace('/', '~1')}")
    return found


@pytest.mark.parametrize("which", sorted({d["kind"] for d in OBJECTS}))
def test_no_file_makes_the_check_fall_over(which):
    """Every place of a document removed, and put to things of another kind: sentences, never an exception."""
    places = paths(document(which))
    junk = JUNK if len(places) < 120 else (None, [], "x")
    for path in places:
        for value in (..., *junk):
            broken = document(which)
            operation = {"op": "remove", "path": path} if value is ... else {"op": "replace", "path": path, "value": copy.deepcopy(value)}
            kustomize.apply_operation(broken, operation)
            assert all(isinstance(error, str) for error in checks.errors(broken)), (path, value)
    for bad in (None, [], "x", 1, {}, {"kind": "Pod"}, {"apiVersion": 1, "kind": [], "metadata": 3}):
        assert checks.errors(bad)
    assert checks.errors({"apiVersion": "v1", "kind": "../x", "metadata": {}})


CHANGES = [
    ("PersistentVolumeClaim", "/spec/accessModes", ["ReadWriteMany"], True),
    ("PersistentVolumeClaim", "/spec/storageClassName", "fast", True),
    ("PersistentVolumeClaim", "/spec/resources/requests/storage", "5Gi", True),
    ("PersistentVolumeClaim", "/spec/resources/requests/storage", "9Ti", False),
    ("Deployment", "/spec/selector/matchLabels/x", "y", True),
    ("Deployment", "/spec/replicas", 3, False),
    ("StatefulSet", "/spec/serviceName", "other", True),
    ("StatefulSet", "/spec/replicas", 3, False),
    ("LocalQueue", "/spec/clusterQueue", "other", True),
    ("Topology", "/spec/levels/0/nodeLabel", "zone", True),
    ("RoleBinding", "/roleRef/name", "other", True),
    ("RoleBinding", "/subjects/0/name", "other", False),
]


@pytest.mark.parametrize(("which", "path", "value", "refused"), CHANGES)
def test_what_may_not_change_is_known(which, path, value, refused):
    new = mutated(which, path, value)
    assert bool(list(k8s_custom.changes(document(which), new))) == refused
    assert checks.errors(new) == [] or path.startswith("/spec/selector")


def published() -> dict[tuple[str, str], dict[str, Any]]:
    """(apiVersion, kind) -> schema of `spec`, of the CRD files in the folder that SAFEBASIN_CRDS names."""
    found = {}
    for path in sorted(Path(os.environ["SAFEBASIN_CRDS"]).glob("*.yaml")):
        for crd in yaml.load_all(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # noqa: S506
            for version in crd["spec"]["versions"]:
                key = f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]
                found[key] = version["schema"]["openAPIV3Schema"]["properties"].get("spec", {})
    return found


def differences(ours: dict[str, Any], theirs: dict[str, Any], at: str) -> list[str]:
    """Fields, required fields and enums that a schema of ours and a published one do not share; what ours leaves open is not looked into."""
    found = []
    if "properties" in ours:
        fields, known = set(ours["properties"]), set(theirs.get("properties", {}))
        found += [f"{at}: {sorted(fields ^ known)}"] if fields != known else []
        defaulted = {name for name, schema in theirs.get("properties", {}).items() if "default" in schema}
        if set(ours["required"]) != set(theirs.get("required", [])) - defaulted:
            found.append(f"{at}: required {sorted(ours['required'])}, not {sorted(theirs.get('required', []))}")
        for name in fields & known:
            found += differences(ours["properties"][name], theirs["properties"][name], f"{at}.{name}")
    if "items" in ours:
        found += differences(ours["items"], theirs.get("items", {}), f"{at}[]")
    if "enum" in theirs and set(ours.get("enum", [])) != set(theirs["enum"]):
        found.append(f"{at}: {ours.get('enum')}, not {theirs['enum']}")
    return found


@pytest.mark.skipif("SAFEBASIN_CRDS" not in os.environ, reason="SAFEBASIN_CRDS names no folder with the published CRDs to compare our schemas with")
@pytest.mark.parametrize("key", SPECS, ids="/".join)
def test_our_schemas_say_what_the_published_ones_say(key):
    theirs = published()
    assert key in theirs, f"no CRD of {key} in SAFEBASIN_CRDS"
    assert differences(SPECS[key], theirs[key], "spec") == []
