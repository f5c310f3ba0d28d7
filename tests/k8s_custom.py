"""What Kueue's CRDs and webhook, KubeRay's CRDs and operator, and this project refuse, beyond structure. Each sentence names whose rule it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from orchestrator.verbs import kustomize
from tests import k8s_pods as podrules
from tests import k8s_values as values
from tests.k8s_values import Errors, amount, unique

Document = dict[str, Any]
QUEUE = "kueue.x-k8s.io/queue-name"
ELASTIC = "kueue.x-k8s.io/elastic-job"
MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
NAME_LIMITS = {"RayJob": 47, "RayCluster": 53, "RayCronJob": 36}
GATED = {"historyServerOptions": "RayClusterHistoryServer", "networkPolicy": "RayClusterNetworkPolicy", "tlsOptions": "RayClusterMTLS"}


def rules(document: Document) -> Errors:
    """Everything about a custom object but its structure and its pods."""
    if (rule := KINDS.get(document["kind"])) is not None:
        yield from rule(document)


# Kueue


def _queue(document: Document) -> Errors:
    spec = document.get("spec") or {}
    yield from values.selector("spec.namespaceSelector", spec.get("namespaceSelector"))
    fungibility, preemption = spec.get("flavorFungibility") or {}, spec.get("preemption") or {}
    when = fungibility.get("whenCanBorrow", "MayStopSearch"), fungibility.get("whenCanPreempt", "TryNextFlavor")
    if fungibility.get("preference") and when != ("TryNextFlavor", "TryNextFlavor"):
        yield "spec.flavorFungibility.preference: needs whenCanBorrow and whenCanPreempt of TryNextFlavor (rule of the CRD)"
    borrowing = (preemption.get("borrowWithinCohort") or {}).get("policy", "Never")
    if preemption.get("reclaimWithinCohort", "Never") == "Never" and borrowing != "Never":
        yield "spec.preemption: reclaimWithinCohort Never goes with borrowWithinCohort.policy Never only (rule of the CRD)"
    groups = spec.get("resourceGroups") or []
    yield from unique("spec.resourceGroups", [name for group in groups for name in group["coveredResources"]], "resource")
    yield from unique("spec.resourceGroups", [flavor["name"] for group in groups for flavor in group["flavors"]], "flavor")
    for i, group in enumerate(groups):
        for name in group["coveredResources"]:
            yield from values.qualified(f"spec.resourceGroups[{i}].coveredResources", name)
        for j, flavor in enumerate(group["flavors"]):
            yield from _quotas(f"spec.resourceGroups[{i}].flavors[{j}]", flavor, group["coveredResources"], bool(spec.get("cohortName")))


def _quotas(at: str, flavor: dict[str, Any], covered: list[str], cohort: bool) -> Errors:
    if len(flavor["resources"]) != len(covered):
        yield f"{at}.resources: has {len(flavor['resources'])} entries, coveredResources {len(covered)} (rule of the CRD)"
    for i, (quota, name) in enumerate(zip(flavor["resources"], covered, strict=False)):
        here = f"{at}.resources[{i}]"
        if quota["name"] != name:
            yield f"{here}.name: {quota['name']!r} must be {name!r}, in the order of coveredResources (rule of Kueue's webhook)"
        for key in ("nominalQuota", "borrowingLimit", "lendingLimit"):
            if quota.get(key) is not None:
                yield from values.quantity(f"{here}.{key}", quota[key])
                if key != "nominalQuota" and not cohort:
                    yield f"{here}.{key}: goes with a cohort only (rule of {'the CRD' if key == 'borrowingLimit' else 'Kueue’s webhook'})"
        lending, nominal = amount(quota.get("lendingLimit")), amount(quota["nominalQuota"])
        if lending is not None and nominal is not None and lending > nominal:
            yield f"{here}.lendingLimit: {quota['lendingLimit']} is more than nominalQuota {quota['nominalQuota']} (rule of Kueue's webhook)"


def _flavor(document: Document) -> Errors:
    spec = document.get("spec") or {}
    yield from values.labels("spec.nodeLabels", spec.get("nodeLabels"))
    if spec.get("topologyName") and not spec.get("nodeLabels"):
        yield "spec.nodeLabels: a flavor with a topology needs at least one (rule of the CRD)"
    for i, taint in enumerate(spec.get("nodeTaints") or []):
        yield from values.qualified(f"spec.nodeTaints[{i}].key", taint["key"])
        yield from values.label_value(f"spec.nodeTaints[{i}].value", taint.get("value"))
        yield from values.among(f"spec.nodeTaints[{i}].effect", taint["effect"], *podrules.EFFECTS)
    for i, toleration in enumerate(spec.get("tolerations") or []):
        yield from podrules.tolerates(f"spec.tolerations[{i}]", toleration)


def _topology(document: Document) -> Errors:
    levels = [level["nodeLabel"] for level in document["spec"]["levels"]]
    yield from unique("spec.levels", levels, "nodeLabel")
    if "kubernetes.io/hostname" in levels[:-1]:
        yield "spec.levels: kubernetes.io/hostname can only be the lowest level (rule of the CRD)"


# KubeRay


def _ray_name(document: Document) -> Errors:
    name, limit = (document.get("metadata") or {}).get("name") or "", NAME_LIMITS[document["kind"]]
    if name and (len(name) > limit or not values.LETTER_LABEL.fullmatch(name)):
        yield f"metadata.name: {name!r} is no DNS label of at most {limit} characters that starts with a letter (KubeRay's rule)"


def _ray_job(document: Document) -> Errors:
    yield from _ray_name(document)
    found, spec = document.get("metadata") or {}, document.get("spec") or {}
    queued, cluster = QUEUE in (found.get("labels") or {}), spec.get("rayClusterSpec") or {}
    yield from job_spec("spec", spec, queued=queued)
    if queued and cluster.get("enableInTreeAutoscaling") and (found.get("annotations") or {}).get(ELASTIC) != "true":
        yield f"spec.rayClusterSpec.enableInTreeAutoscaling: with a queue's label needs the annotation {ELASTIC} (rule of Kueue's webhook)"
    if queued and "head" in [group["groupName"] for group in cluster.get("workerGroupSpecs") or []]:
        yield "spec.rayClusterSpec.workerGroupSpecs: the name head is taken by the head's own group (rule of Kueue's webhook)"


def _ray_cluster(document: Document) -> Errors:
    yield from _ray_name(document)
    yield from _cluster("spec", document.get("spec") or {})


def _ray_cron_job(document: Document) -> Errors:
    yield from _ray_name(document)
    spec = document["spec"]
    yield from values.cron("spec.schedule", spec["schedule"])
    yield from values.time_zone("spec.timeZone", spec.get("timeZone"))
    yield from job_spec("spec.jobTemplate", spec["jobTemplate"])


def job_spec(at: str, spec: dict[str, Any], *, queued: bool = False) -> Errors:
    """KubeRay's rules for a RayJob's spec, and Kueue's where it is `queued`."""
    mode, chosen, cluster = spec.get("submissionMode") or "K8sJobMode", spec.get("clusterSelector"), spec.get("rayClusterSpec")
    yield from (f"{e} (KubeRay's rule)" for e in values.among(f"{at}.submissionMode", mode, *MODES))
    if not spec.get("entrypoint") and mode != "InteractiveMode" and not spec.get("submitterPodTemplate"):
        yield f"{at}.entrypoint: is missing, so there is nothing to run (our rule)"
    if not cluster and not chosen:
        yield f"{at}: needs rayClusterSpec or clusterSelector (KubeRay's rule)"
    if (spec.get("suspend") or (spec.get("ttlSecondsAfterFinished") or 0) > 0) and not spec.get("shutdownAfterJobFinishes"):
        yield f"{at}.shutdownAfterJobFinishes: suspend and ttlSecondsAfterFinished need it (KubeRay's rule)"
    for key, least in (("ttlSecondsAfterFinished", 0), ("backoffLimit", 0), ("activeDeadlineSeconds", 1)):
        yield from (f"{e} (KubeRay's rule)" for e in values.at_least(f"{at}.{key}", spec.get(key), least))
    if (chosen or mode == "InteractiveMode") and (spec.get("backoffLimit") or (chosen and spec.get("suspend"))):
        yield f"{at}: backoffLimit and suspend go with neither clusterSelector nor InteractiveMode (KubeRay's rule)"
    if mode == "SidecarMode" and (spec.get("submitterPodTemplate") or spec.get("submitterConfig") or chosen):
        yield f"{at}: SidecarMode takes no submitterPodTemplate, submitterConfig or clusterSelector (KubeRay's rule)"
    if queued and cluster and (not spec.get("shutdownAfterJobFinishes") or chosen):
        yield f"{at}: with a queue's label, shutdownAfterJobFinishes must be true and clusterSelector empty (rule of Kueue's webhook)"
    if re.search(r"""["'$;`&|<>\\]""", spec.get("entrypoint") or ""):
        yield f"{at}.entrypoint: KubeRay pastes it into a shell script; leave out quotes, $ and ; (our rule)"
    try:
        if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML") or "{}"), dict):
            yield f"{at}.runtimeEnvYAML: is no mapping (KubeRay's rule)"
    except yaml.YAMLError as error:
        yield f"{at}.runtimeEnvYAML: {' '.join(str(error).split())} (KubeRay's rule)"
    yield from _deletion(f"{at}.deletionStrategy", spec)
    if cluster:
        yield from _cluster(f"{at}.rayClusterSpec", cluster)


def _deletion(at: str, spec: dict[str, Any]) -> Errors:
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    found, old = strategy.get("deletionRules") or [], {"onSuccess", "onFailure"} & set(strategy)
    if bool(found) == bool(old) or len(old) == 1:
        yield f"{at}: takes deletionRules, or both onSuccess and onFailure (rule of the CRD)"
    if found and spec.get("shutdownAfterJobFinishes"):
        yield f"{at}.deletionRules: does not go with shutdownAfterJobFinishes (KubeRay's rule)"
    after: dict[str, dict[str, int]] = {}
    for i, rule in enumerate(found):
        condition = rule["condition"]
        states = [condition[key] for key in ("jobStatus", "jobDeploymentStatus") if condition.get(key)]
        if len(states) != 1:
            yield f"{at}.deletionRules[{i}].condition: takes exactly one of jobStatus and jobDeploymentStatus (rule of the CRD)"
            continue
        if rule["policy"] in after.setdefault(states[0], {}):
            yield f"{at}.deletionRules[{i}]: {rule['policy']} on {states[0]} is there twice (KubeRay's rule)"
        after[states[0]][rule["policy"]] = condition.get("ttlSeconds") or 0
        if rule["policy"] == "DeleteWorkers" and (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling"):
            yield f"{at}.deletionRules[{i}]: DeleteWorkers does not go with the autoscaler (KubeRay's rule)"
    for state, seconds in after.items():
        order = [seconds[policy] for policy in ("DeleteWorkers", "DeleteCluster", "DeleteSelf") if policy in seconds]
        if order != sorted(order):
            yield f"{at}.deletionRules: on {state} workers go first, then the cluster, then the job (KubeRay's rule)"


def _cluster(at: str, cluster: dict[str, Any]) -> Errors:
    version, auth, scaled = cluster.get("rayVersion"), cluster.get("authOptions") or {}, bool(cluster.get("enableInTreeAutoscaling"))
    if not re.fullmatch(r"\d+\.\d+\.\d+", version or ""):
        yield f"{at}.rayVersion: {version!r} is no version such as 2.60.0; KubeRay picks probes by it (our rule)"
    if auth.get("mode") != "token":
        yield f"{at}.authOptions.mode: write token; without it the cluster takes jobs from anybody (our rule)"
    elif tuple(int(n) for n in re.findall(r"\d+", version or "")) < (2, 52):
        yield f"{at}.rayVersion: {version!r}; token authentication needs 2.52.0 (KubeRay's rule)"
    for image in sorted({str(container.get("image")) for container in kustomize.containers(cluster)}):
        tagged = re.search(r"(?:rayproject/ray\S*:|-ray)(\d+\.\d+\.\d+)", image)
        if tagged and tagged[1] != version:
            yield f"{at}.rayVersion: {version!r} is not that of the image {image} (our rule)"
    for field, gate in GATED.items():
        if cluster.get(field) is not None:
            yield f"{at}.{field}: an operator with default gates refuses it; it needs {gate} (KubeRay's rule)"
    if (cluster.get("autoscalerOptions") or {}).get("idleTimeoutSeconds", 0) < 0:
        yield f"{at}.autoscalerOptions.idleTimeoutSeconds: must be at least 0 (KubeRay's rule)"
    groups = cluster.get("workerGroupSpecs") or []
    yield from unique(f"{at}.workerGroupSpecs", [group["groupName"] for group in groups], "group")
    for name, group in (("head", cluster["headGroupSpec"]), *((group["groupName"], group) for group in groups)):
        spec = group["template"].get("spec") or {}
        if not spec.get("containers"):
            yield f"{at}: group {name} has no container (KubeRay's rule)"
        if scaled and (cluster.get("autoscalerOptions") or {}).get("version") == "v2" and spec.get("restartPolicy") not in (None, "Never"):
            yield f"{at}: group {name} needs restartPolicy Never with autoscaler v2 (KubeRay's rule)"
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(group.get("rayStartParams") or {}):
            yield f"{at}: group {name} says its resources twice, in rayStartParams and resources (KubeRay's rule)"
    for group in groups:
        least, most, now = group.get("minReplicas"), group.get("maxReplicas"), group.get("replicas")
        numbers = [n for n in (0, least, now, most) if n is not None]
        if numbers != sorted(numbers):
            yield f"{at}: group {group['groupName']}: 0 <= minReplicas <= replicas <= maxReplicas does not hold (KubeRay's rule)"


def templates(document: Document) -> Iterator[tuple[str, Document]]:
    """(role, pod template) of every pod that an object leads to; nothing for what is not there."""
    kind, spec = document["kind"], document.get("spec") or {}
    if kind == "RayCronJob":
        kind, spec = "RayJob", spec.get("jobTemplate") or {}
    if kind == "RayJob" and "submitterPodTemplate" in spec:
        yield "submitter", spec["submitterPodTemplate"]
    if kind in ("RayJob", "RayCluster") and (cluster := spec if kind == "RayCluster" else spec.get("rayClusterSpec")):
        yield "head", cluster["headGroupSpec"]["template"]
        for group in cluster.get("workerGroupSpecs") or []:
            yield group["groupName"], group["template"]
    elif kind in ("Deployment", "StatefulSet", "Job", "DaemonSet"):
        yield "pod", spec["template"]


KINDS: dict[str, Callable[[Document], Errors]] = {
    "ClusterQueue": _queue, "ResourceFlavor": _flavor, "Topology": _topology,
    "RayJob": _ray_job, "RayCluster": _ray_cluster, "RayCronJob": _ray_cron_job,
}  # fmt: skip


# what may not change


FREE = {
    "Deployment": None, "DaemonSet": None,
    "StatefulSet": {
        "replicas", "template", "updateStrategy", "ordinals", "persistentVolumeClaimRetentionPolicy", "minReadySeconds", "revisionHistoryLimit",
    },
    "Job": {"parallelism", "suspend", "activeDeadlineSeconds", "ttlSecondsAfterFinished", "backoffLimit"},
    "PersistentVolumeClaim": {"resources", "volumeAttributesClassName"},
}  # fmt: skip
FIXED = {
    "Deployment": ("selector",), "DaemonSet": ("selector",), "LocalQueue": ("clusterQueue",), "Topology": ("levels",), "RayJob": ("managedBy",),
    "Service": ("clusterIP",),
}  # fmt: skip


def changes(old: Document, new: Document) -> Errors:
    """What the server refuses when `new` is applied over `old`, an object of the same kind and name."""
    kind, before, after = new["kind"], old.get("spec") or {}, new.get("spec") or {}
    free = FREE.get(kind)
    fixed = FIXED.get(kind, ()) if free is None else sorted((set(before) | set(after)) - free)
    if kind == "ResourceFlavor" and before.get("topologyName"):
        fixed = ("nodeLabels", "tolerations", "topologyName")
    for key in fixed:
        if before.get(key) != after.get(key) and not (key == "clusterIP" and after.get(key) is None):
            yield f"{kind} {new['metadata']['name']}: spec.{key} is {before.get(key)!r} and cannot become {after.get(key)!r}; use another name"
    if kind == "PersistentVolumeClaim":
        sizes = [amount(((spec.get("resources") or {}).get("requests") or {}).get("storage")) for spec in (before, after)]
        if None not in sizes and sizes[1] < sizes[0]:
            yield f"{kind} {new['metadata']['name']}: spec.resources.requests.storage cannot shrink; use another name"
    if kind in ("RoleBinding", "ClusterRoleBinding") and old.get("roleRef") != new.get("roleRef"):
        yield f"{kind} {new['metadata']['name']}: roleRef cannot change; use another name"
    if kind in ("ConfigMap", "Secret") and old.get("immutable") and any(old.get(key) != new.get(key) for key in ("data", "binaryData")):
        yield f"{kind} {new['metadata']['name']}: is immutable; use another name"
