"""What the API server refuses in a core object, kind by kind, beyond its structure; and what may not change once an object is there."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from typing import Any

from tests import k8s_pods as podrules
from tests import k8s_rights
from tests import k8s_values as values
from tests.k8s_values import Errors, among, amount, at_least, named, unique

Document = dict[str, Any]
SECURITY_LEVELS = ("privileged", "baseline", "restricted")
SECRET_KEYS = {"kubernetes.io/tls": ("tls.crt", "tls.key"), "kubernetes.io/dockerconfigjson": (".dockerconfigjson",)}
OBJECT_BYTES = 1024 * 1024


def metadata(document: Document) -> Errors:
    """Name, namespace, labels and annotations of an object."""
    found, kind = document.get("metadata") or {}, document["kind"]
    patterns = {"Namespace": (values.LABEL, 63), "Service": (values.LETTER_LABEL, 63)}
    patterns |= {"CronJob": (values.SUBDOMAIN, 52), "Job": (values.SUBDOMAIN, 63)}
    if kind in ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"):
        if not found.get("name") or re.search("[/%]", found["name"]) or found["name"] in (".", ".."):
            yield f"metadata.name: {found.get('name')!r} is missing, or has / or %"
    elif found.get("name") or not found.get("generateName"):
        yield from named("metadata.name", found.get("name"), *patterns.get(kind, (values.SUBDOMAIN, 253)))
    if found.get("namespace") is not None:
        yield from named("metadata.namespace", found["namespace"], values.LABEL, 63)
    yield from values.metadata("metadata", found)
    for finalizer in found.get("finalizers") or []:
        yield from values.qualified("metadata.finalizers", finalizer)


def rules(document: Document) -> Errors:
    """Everything about a core object but its structure."""
    yield from metadata(document)
    if (rule := KINDS.get(document["kind"])) is not None:
        yield from rule(document)


def _pod(document: Document) -> Errors:
    yield from podrules.pod("spec", document.get("spec") or {})


def _workload(document: Document) -> Errors:
    """Deployment, DaemonSet, StatefulSet: a selector that takes its own pods."""
    kind, spec = document["kind"], document.get("spec") or {}
    template, selector = spec.get("template") or {}, spec.get("selector") or {}
    for key in ("replicas", "minReadySeconds", "revisionHistoryLimit", "progressDeadlineSeconds"):
        yield from at_least(f"spec.{key}", spec.get(key))
    yield from values.selector("spec.selector", selector)
    if not selector.get("matchLabels") and not selector.get("matchExpressions"):
        yield "spec.selector: is empty; it must take the template's labels"
    labels = (template.get("metadata") or {}).get("labels") or {}
    if missing := {k: v for k, v in (selector.get("matchLabels") or {}).items() if labels.get(k) != v}:
        yield f"spec.selector: {missing} is not among the template's labels {labels}"
    claims = tuple((claim.get("metadata") or {}).get("name") for claim in spec.get("volumeClaimTemplates") or [])
    found = podrules.template("spec.template", template, ("Always",), claims)
    yield from (f"{e} (the controller makes this pod, and the API server refuses it)" for e in found) if kind == "StatefulSet" else found
    if (template.get("spec") or {}).get("activeDeadlineSeconds") is not None:
        yield "spec.template.spec.activeDeadlineSeconds: goes with pods and Jobs only"
    if kind == "StatefulSet":
        yield from among("spec.podManagementPolicy", spec.get("podManagementPolicy"), "OrderedReady", "Parallel")
        strategy = spec.get("updateStrategy") or {}
        yield from among("spec.updateStrategy.type", strategy.get("type"), "RollingUpdate", "OnDelete")
        yield from at_least("spec.updateStrategy.rollingUpdate.partition", (strategy.get("rollingUpdate") or {}).get("partition"))
        for i, claim in enumerate(spec.get("volumeClaimTemplates") or []):
            found = _claim({"spec": claim.get("spec") or {}})
            yield from (f"spec.volumeClaimTemplates[{i}].{e} (the controller makes this claim, and the API server refuses it)" for e in found)
        return
    strategy = spec.get("strategy" if kind == "Deployment" else "updateStrategy") or {}
    yield from among("spec.strategy.type", strategy.get("type"), "RollingUpdate", "Recreate" if kind == "Deployment" else "OnDelete")
    rolling = strategy.get("rollingUpdate")
    if rolling is not None and strategy.get("type") not in (None, "RollingUpdate"):
        yield f"spec.strategy.rollingUpdate: does not go with type {strategy['type']}"
    rolling = rolling or {}
    yield from values.count_or_percent("spec.strategy.rollingUpdate.maxSurge", rolling.get("maxSurge"), over=True)
    yield from values.count_or_percent("spec.strategy.rollingUpdate.maxUnavailable", rolling.get("maxUnavailable"))
    if kind == "Deployment" and {str(rolling.get(key)) for key in ("maxSurge", "maxUnavailable")} <= {"0", "0%"}:
        yield "spec.strategy.rollingUpdate: maxSurge and maxUnavailable may not both be 0"
    if kind == "Deployment" and spec.get("progressDeadlineSeconds", 600) <= spec.get("minReadySeconds", 0):
        yield "spec.progressDeadlineSeconds: must be greater than minReadySeconds"


def _job(document: Document, at: str = "spec") -> Errors:
    spec = document.get("spec") or {}
    for key in ("parallelism", "completions", "backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"):
        yield from at_least(f"{at}.{key}", spec.get(key))
    yield from among(f"{at}.podReplacementPolicy", spec.get("podReplacementPolicy"), "TerminatingOrFailed", "Failed")
    yield from among(f"{at}.completionMode", spec.get("completionMode"), "NonIndexed", "Indexed")
    if spec.get("completionMode") == "Indexed" and spec.get("completions") is None:
        yield f"{at}.completions: is missing; Indexed needs it"
    if spec.get("selector") is not None and not spec.get("manualSelector"):
        yield f"{at}.selector: leave it out; the server makes one"
    yield from podrules.template(f"{at}.template", spec.get("template") or {}, ("Never", "OnFailure"))
    if (policy := spec.get("podFailurePolicy")) is not None:
        if ((spec.get("template") or {}).get("spec") or {}).get("restartPolicy") != "Never":
            yield f"{at}.podFailurePolicy: needs restartPolicy Never"
        for i, rule in enumerate(policy.get("rules") or []):
            here = f"{at}.podFailurePolicy.rules[{i}]"
            yield from among(f"{here}.action", rule.get("action") or "", "FailJob", "FailIndex", "Ignore", "Count")
            if (rule.get("onExitCodes") is None) == (not rule.get("onPodConditions")):
                yield f"{here}: has exactly one of onExitCodes and onPodConditions"
            codes = rule.get("onExitCodes") or {"operator": "In", "values": [1]}
            yield from among(f"{here}.onExitCodes.operator", codes.get("operator") or "", "In", "NotIn")
            if not codes.get("values") or (codes.get("operator") == "In" and 0 in codes["values"]):
                yield f"{here}.onExitCodes.values: needs values, and 0 is no failure"


def _cron_job(document: Document) -> Errors:
    spec = document.get("spec") or {}
    yield from values.cron("spec.schedule", spec.get("schedule") or "")
    yield from values.time_zone("spec.timeZone", spec.get("timeZone"))
    yield from among("spec.concurrencyPolicy", spec.get("concurrencyPolicy"), "Allow", "Forbid", "Replace")
    for key in ("startingDeadlineSeconds", "successfulJobsHistoryLimit", "failedJobsHistoryLimit"):
        yield from at_least(f"spec.{key}", spec.get(key))
    yield from _job(spec.get("jobTemplate") or {}, "spec.jobTemplate.spec")


def _service(document: Document) -> Errors:
    spec = document.get("spec") or {}
    yield from among("spec.type", spec.get("type"), "ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
    yield from among("spec.sessionAffinity", spec.get("sessionAffinity"), "None", "ClientIP")
    for key in ("externalTrafficPolicy", "internalTrafficPolicy"):
        yield from among(f"spec.{key}", spec.get(key), "Cluster", "Local")
    yield from values.labels("spec.selector", spec.get("selector"))
    external, ports = spec.get("type") == "ExternalName", spec.get("ports") or []
    if external:
        yield from named("spec.externalName", str(spec.get("externalName") or "").removesuffix("."))
    if not ports and not external and spec.get("clusterIP") != "None":
        yield "spec.ports: is missing; only a headless Service and ExternalName have none"
    yield from among("spec.ipFamilyPolicy", spec.get("ipFamilyPolicy"), "SingleStack", "PreferDualStack", "RequireDualStack")
    for network in spec.get("loadBalancerSourceRanges") or []:
        if values.network(str(network).strip()) is None:
            yield f"spec.loadBalancerSourceRanges: {network!r} is no network such as 10.0.0.0/8"
    if (ip := spec.get("clusterIP")) not in (None, "", "None") and not values.address(ip):
        yield f"spec.clusterIP: {ip!r} is neither None nor an address"
    for i, port in enumerate(ports):
        at = f"spec.ports[{i}]"
        yield from values.port(f"{at}.port", port.get("port"))
        if port.get("targetPort") is not None:
            yield from values.port(f"{at}.targetPort", port["targetPort"], name=True)
        if len(ports) > 1 or port.get("name"):
            yield from named(f"{at}.name", port.get("name"), values.LABEL, 63)
        if port.get("nodePort"):
            yield from values.port(f"{at}.nodePort", port["nodePort"])
            if spec.get("type") not in ("NodePort", "LoadBalancer"):
                yield f"{at}.nodePort: goes with type NodePort or LoadBalancer only"
        yield from among(f"{at}.protocol", port.get("protocol"), "TCP", "UDP", "SCTP")
    yield from unique("spec.ports", [port.get("name") for port in ports], "name")
    yield from unique("spec.ports", [(port.get("port"), port.get("protocol") or "TCP") for port in ports], "port")


def _network_policy(document: Document) -> Errors:
    spec = document.get("spec") or {}
    yield from values.selector("spec.podSelector", spec.get("podSelector"))
    types = spec.get("policyTypes") or []
    for kind in types:
        yield from among("spec.policyTypes", kind, "Ingress", "Egress")
    if len(types) > 2:
        yield "spec.policyTypes: has more than two"
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        for i, rule in enumerate(spec.get(direction) or []):
            at = f"spec.{direction}[{i}]"
            for j, port in enumerate(rule.get("ports") or []):
                yield from _policy_port(f"{at}.ports[{j}]", port)
            for j, peer in enumerate(rule.get(peers) or []):
                yield from _peer(f"{at}.{peers}[{j}]", peer)


def _policy_port(at: str, port: dict[str, Any]) -> Errors:
    yield from among(f"{at}.protocol", port.get("protocol"), "TCP", "UDP", "SCTP")
    if port.get("port") is not None:
        yield from values.port(f"{at}.port", port["port"], name=True)
    if (end := port.get("endPort")) is not None:
        if not isinstance(port.get("port"), int):
            yield f"{at}.endPort: needs a port that is a number"
        elif not port["port"] <= end <= 65535:
            yield f"{at}.endPort: {end} is not within {port['port']} to 65535"


def _peer(at: str, peer: dict[str, Any]) -> Errors:
    block, selectors = peer.get("ipBlock"), [key for key in ("podSelector", "namespaceSelector") if peer.get(key) is not None]
    if block is None and not selectors:
        yield f"{at}: names nobody; write podSelector, namespaceSelector or ipBlock"
    for key in selectors:
        yield from values.selector(f"{at}.{key}", peer[key])
    if block is not None:
        if selectors:
            yield f"{at}: ipBlock goes with no selector; make two peers"
        outer = values.network(block.get("cidr"))
        if outer is None:
            yield f"{at}.ipBlock.cidr: {block.get('cidr')!r} is no network such as 10.0.0.0/8"
        for inside in block.get("except") or []:
            inner = values.network(inside)
            if inner is None:
                yield f"{at}.ipBlock.except: {inside!r} is no network such as 10.0.0.0/8"
            elif outer is not None and (inner.version != outer.version or inner == outer or not inner.subnet_of(outer)):
                yield f"{at}.ipBlock.except: {inside} is not within {block['cidr']}"


def _budget(document: Document) -> Errors:
    spec = document.get("spec") or {}
    if spec.get("minAvailable") is not None and spec.get("maxUnavailable") is not None:
        yield "spec: has both minAvailable and maxUnavailable; keep one"
    for key in ("minAvailable", "maxUnavailable"):
        yield from values.count_or_percent(f"spec.{key}", spec.get(key))
    yield from values.selector("spec.selector", spec.get("selector"))
    yield from among("spec.unhealthyPodEvictionPolicy", spec.get("unhealthyPodEvictionPolicy"), "IfHealthyBudget", "AlwaysAllow")


def _claim(document: Document) -> Errors:
    spec = document.get("spec") or {}
    modes = spec.get("accessModes") or []
    if not modes:
        yield "spec.accessModes: is missing"
    for mode in modes:
        yield from among("spec.accessModes", mode, "ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")
    if "ReadWriteOncePod" in modes and len(modes) > 1:
        yield "spec.accessModes: ReadWriteOncePod goes with no other"
    yield from among("spec.volumeMode", spec.get("volumeMode"), "Filesystem", "Block")
    if spec.get("storageClassName"):
        yield from named("spec.storageClassName", spec["storageClassName"])
    requests = (spec.get("resources") or {}).get("requests") or {}
    if "storage" not in requests:
        yield "spec.resources.requests.storage: is missing"
    for key, value in requests.items():
        yield from values.quantity(f"spec.resources.requests.{key}", value, positive=key == "storage")
    limit = ((spec.get("resources") or {}).get("limits") or {}).get("storage")
    if limit is not None:
        yield from values.quantity("spec.resources.limits.storage", limit)
        if None not in (amount(limit), amount(requests.get("storage"))) and amount(requests["storage"]) > amount(limit):
            yield f"spec.resources.requests.storage: {requests['storage']} is more than the limit {limit}"
    yield from values.selector("spec.selector", spec.get("selector"))


def _texts(document: Document) -> Errors:
    """ConfigMap and Secret: keys, sizes, what must be base64."""
    size = 0
    for part in ("data", "binaryData", "stringData"):
        for key, value in (document.get(part) or {}).items():
            if len(str(key)) > 253 or not values.CONFIG_KEY.fullmatch(str(key)) or str(key) == "." or str(key).startswith(".."):
                yield f"{part}: {key!r} is no key of A-Z, a-z, 0-9, -, _ and ., at most 253 of them"
            size += len(str(value).encode())
            if part == "binaryData" or (part == "data" and document["kind"] == "Secret"):
                try:
                    base64.b64decode(re.sub(r"[\r\n]", "", str(value or "")), validate=True)
                except (binascii.Error, ValueError):
                    yield f"{part}.{key}: is no base64; write plain text into stringData"
    for key in SECRET_KEYS.get(document.get("type") or "", ()) if document["kind"] == "Secret" else ():
        if key not in (document.get("data") or {}) and key not in (document.get("stringData") or {}):
            yield f"data.{key}: is missing; a Secret of type {document['type']} has it"
    if both := set(document.get("data") or {}) & set(document.get("binaryData") or {}):
        yield f"binaryData: {sorted(both)} stand in data as well"
    if size > OBJECT_BYTES:
        yield f"data: {size} bytes are more than {OBJECT_BYTES}; put large files on a volume"


def _namespace(document: Document) -> Errors:
    for key, value in (document["metadata"].get("labels") or {}).items():
        if re.fullmatch(r"pod-security\.kubernetes\.io/(enforce|audit|warn)", key):
            yield from among(f"metadata.labels.{key}", value, *SECURITY_LEVELS)
        elif re.fullmatch(r"pod-security\.kubernetes\.io/(enforce|audit|warn)-version", key) and not re.fullmatch(r"latest|v1\.\d+", value):
            yield f"metadata.labels.{key}: {value!r} is neither latest nor a version such as v1.34"


KINDS: dict[str, Callable[[Document], Errors]] = {
    "Pod": _pod, "Deployment": _workload, "DaemonSet": _workload, "StatefulSet": _workload, "Job": _job, "CronJob": _cron_job,
    "Service": _service, "NetworkPolicy": _network_policy, "PodDisruptionBudget": _budget, "PersistentVolumeClaim": _claim,
    "ConfigMap": _texts, "Secret": _texts, "Namespace": _namespace, "Role": k8s_rights.role, "ClusterRole": k8s_rights.role,
    "RoleBinding": k8s_rights.binding, "ClusterRoleBinding": k8s_rights.binding,
}  # fmt: skip
