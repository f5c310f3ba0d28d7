"""What the API server refuses in roles and their bindings."""

from __future__ import annotations

from typing import Any

from tests.k8s_values import Errors, among

Document = dict[str, Any]


def role(document: Document) -> Errors:
    for i, rule in enumerate(document.get("rules") or []):
        if not rule.get("verbs"):
            yield f"rules[{i}].verbs: is missing"
        if rule.get("nonResourceURLs"):
            if document["kind"] == "Role" or rule.get("resources") or rule.get("apiGroups"):
                yield f"rules[{i}].nonResourceURLs: goes with a ClusterRole, and with no resources"
        elif not rule.get("apiGroups") or not rule.get("resources"):
            yield f"rules[{i}]: needs apiGroups and resources"


def binding(document: Document) -> Errors:
    rbac, target = "rbac.authorization.k8s.io", document.get("roleRef") or {}
    yield from among("roleRef.apiGroup", target.get("apiGroup") or None, rbac)
    kinds = ("ClusterRole",) if document["kind"] == "ClusterRoleBinding" else ("Role", "ClusterRole")
    yield from among("roleRef.kind", target.get("kind") or "", *kinds)
    if not target.get("name"):
        yield "roleRef.name: is missing"
    for i, subject in enumerate(document.get("subjects") or []):
        at, account = f"subjects[{i}]", subject.get("kind") == "ServiceAccount"
        yield from among(f"{at}.kind", subject.get("kind") or "", "ServiceAccount", "User", "Group")
        yield from among(f"{at}.apiGroup", subject.get("apiGroup"), *(("",) if account else (rbac,)))
        if not subject.get("name"):
            yield f"{at}.name: is missing"
        if account and not subject.get("namespace"):
            yield f"{at}.namespace: is missing; a ServiceAccount has one"
