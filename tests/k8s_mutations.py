"""Objects of ours, and changes of them that an API server refuses (`REFUSED`) or takes (`ACCEPTED`): a place, and its value; `...` removes it."""

from __future__ import annotations

import copy
from typing import Any

from orchestrator.verbs import kustomize
from tests import k8s_checks as checks

HEAD = "/spec/rayClusterSpec/headGroupSpec/template/spec"
MLFLOW = "/spec/template/spec/containers/0"
QUOTA = "/spec/resourceGroups/0/flavors/0/resources"
LONG = "a" * 64
ROLES = kustomize.documents(checks.K8S / "role.yaml")
OBJECTS = [
    *checks.BUILT["mlflow-dev"], *checks.BUILT["overlays/gpu-multi-node"], *checks.BUILT["components/kueue/admin"], *ROLES,
    *kustomize.documents(checks.K8S / "namespace.yaml"), *kustomize.documents(checks.K8S / "files.yaml"),
    {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "data": {"a": "YQ=="}},
    {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "c"}, "spec": {"schedule": "0 3 * * *", "jobTemplate": {"spec": {"template": {
        "spec": {"restartPolicy": "Never", "containers": [{"name": "a", "image": "b"}]}}}}}},
    {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}, "spec": {"template": {
        "spec": {"restartPolicy": "Never", "containers": [{"name": "a", "image": "b"}]}}}},
    {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "Topology", "metadata": {"name": "t"}, "spec": {"levels": [
        {"nodeLabel": "rack"}, {"nodeLabel": "kubernetes.io/hostname"}]}},
]  # fmt: skip


def document(which: str) -> checks.Document:
    """`Kind` or `Kind/name`, a copy."""
    kind, _, name = which.partition("/")
    return copy.deepcopy(next(d for d in OBJECTS if d["kind"] == kind and name in ("", d["metadata"]["name"])))


def mutated(which: str, path: str, value: Any) -> checks.Document:
    """The object with `path` removed (`...`), put to `value`, or added."""
    found = document(which)
    try:
        kustomize.apply_operation(found, {"op": "remove" if value is ... else "replace", "path": path, "value": value})
    except (KeyError, IndexError, ValueError):
        kustomize.apply_operation(found, {"op": "add", "path": path, "value": value})
    return found


PROBE = {"httpGet": {"path": "/", "port": 80}}
REFUSED: list[tuple[str, str, Any]] = [
    # quantities, requests, limits
    ("Deployment", f"{MLFLOW}/resources/limits/memory", "2GB"),
    ("Deployment", f"{MLFLOW}/resources/limits/memory", "2 Gi"),
    ("Deployment", f"{MLFLOW}/resources/requests/cpu", "-1"),
    ("Deployment", f"{MLFLOW}/resources/requests/memory", "4Gi"),
    ("Deployment", f"{MLFLOW}/resources/requests/gpu", "1"),
    ("Deployment", f"{MLFLOW}/resources/requests/nvidia.com~1gpu", "1"),
    ("Deployment", f"{MLFLOW}/resources/limits/nvidia.com~1gpu", "0.5"),
    ("Pod", "/spec/volumes/0", {"name": "results", "emptyDir": {"sizeLimit": "ten"}}),
    ("PersistentVolumeClaim", "/spec/resources/requests/storage", "0"),
    ("PersistentVolumeClaim", "/spec/resources/requests/storage", "200gi"),
    ("PersistentVolumeClaim", "/spec/resources/requests", {}),
    # mounts, volumes, variables
    ("Deployment", f"{MLFLOW}/volumeMounts/0/name", "temp"),
    ("Pod", "/spec/containers/0/volumeMounts/1/mountPath", "/results"),
    ("Pod", "/spec/containers/0/volumeMounts/0/subPath", "../x"),
    ("Pod", "/spec/volumes/0/emptyDir", {}),
    ("Pod", "/spec/volumes/0", {"name": "results"}),
    ("Pod", "/spec/volumes/1/name", "results"),
    ("Deployment", f"{MLFLOW}/env/1", {"name": "A", "value": "b", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}),
    ("Deployment", f"{MLFLOW}/env/1", {"name": "A=B", "value": "b"}),
    ("Deployment", "/spec/template/spec/volumes/1/secret/defaultMode", 1000),
    # enums
    ("Deployment", f"{MLFLOW}/imagePullPolicy", "Sometimes"),
    ("Deployment", "/spec/strategy/type", "Recreat"),
    ("Deployment", "/spec/template/spec/restartPolicy", "Never"),
    ("Deployment", "/spec/template/spec/securityContext/seccompProfile/type", "runtimeDefault"),
    ("Deployment", "/spec/template/spec/dnsPolicy", "clusterFirst"),
    ("Pod", "/spec/securityContext/fsGroupChangePolicy", "Never"),
    ("Service/mlflow", "/spec/type", "Clusterip"),
    ("Service/mlflow", "/spec/ports/0/protocol", "HTTP"),
    ("StatefulSet", "/spec/podManagementPolicy", "Ordered"),
    ("NetworkPolicy/mlflow", "/spec/policyTypes/0", "ingress"),
    ("PersistentVolumeClaim", "/spec/accessModes/0", "ReadWriteAll"),
    ("PodDisruptionBudget", "/spec/unhealthyPodEvictionPolicy", "Always"),
    ("CronJob", "/spec/concurrencyPolicy", "Never"),
    ("Namespace", "/metadata/labels/pod-security.kubernetes.io~1enforce", "strict"),
    # names and labels
    ("Deployment", "/metadata/name", "MLflow"),
    ("Service/mlflow", "/metadata/name", "1mlflow"),
    ("Deployment", "/metadata/labels/app", "ml flow"),
    ("Deployment", "/metadata/labels/app", LONG),
    ("Deployment", "/metadata/labels/-app", "x"),
    ("Deployment", "/metadata/annotations", {"a/b/c": "x"}),
    ("Deployment", f"{MLFLOW}/name", "ml_flow"),
    ("ConfigMap", "/data/a b", "x"),
    ("Namespace", "/metadata/name", "safe.basin"),
    ("Secret", "/data/a", "not base64!"),
    # ports
    ("Deployment", f"{MLFLOW}/ports/0/containerPort", 70000),
    ("Deployment", f"{MLFLOW}/ports/0/name", "this-name-is-too-long"),
    ("Service/mlflow", "/spec/ports/0/port", 0),
    ("Service/mlflow", "/spec/ports/0/targetPort", "HTTP_1"),
    ("Service/mlflow", "/spec/ports/-", {"port": 5001}),
    ("Service/mlflow", "/spec/ports/0/nodePort", 30000),
    ("Service/mlflow", "/spec/ports", ...),
    ("NetworkPolicy/mlflow", "/spec/ingress/0/ports/0", {"protocol": "TCP", "port": 5000, "endPort": 4000}),
    # selectors
    ("Deployment", "/spec/selector/matchLabels/app", "other"),
    ("StatefulSet", "/spec/selector", {}),
    ("NetworkPolicy/safebasin-egress", "/spec/podSelector/matchExpressions/0/operator", "in"),
    ("NetworkPolicy/safebasin-egress", "/spec/podSelector/matchExpressions/0/values", ...),
    # probes
    ("Deployment", f"{MLFLOW}/readinessProbe/tcpSocket", {"port": 1}),
    ("Deployment", f"{MLFLOW}/livenessProbe/successThreshold", 2),
    ("Deployment", f"{MLFLOW}/livenessProbe/periodSeconds", -1),
    ("Deployment", f"{MLFLOW}/readinessProbe/terminationGracePeriodSeconds", 5),
    ("Deployment", f"{MLFLOW}/startupProbe/httpGet", ...),
    ("Deployment", f"{MLFLOW}/startupProbe/httpGet/port", 0),
    ("Deployment", "/spec/template/spec/initContainers/0/livenessProbe", PROBE),
    # networks, budgets
    ("NetworkPolicy/mlflow", "/spec/egress/1/to/0/ipBlock/cidr", "0.0.0.0"),
    ("NetworkPolicy/mlflow", "/spec/egress/1/to/0/ipBlock/cidr", "10.0.0.0/33"),
    ("NetworkPolicy/mlflow", "/spec/egress/1/to/0/ipBlock/cidr", "10.0.0.0/8"),
    ("NetworkPolicy/mlflow", "/spec/ingress/0/from/0/ipBlock", {"cidr": "10.0.0.0/8"}),
    ("PodDisruptionBudget", "/spec/maxUnavailable", 1),
    ("PodDisruptionBudget", "/spec/minAvailable", "half"),
    ("PodDisruptionBudget", "/spec/minAvailable", "150%"),
    # numbers
    ("Deployment", "/spec/replicas", 2**31),
    ("Deployment", "/spec/replicas", -1),
    ("Deployment", "/spec/template/spec/securityContext/runAsUser", -1),
    ("Deployment", "/spec/progressDeadlineSeconds", 0),
    ("Pod", "/spec/terminationGracePeriodSeconds", -1),
    ("RayJob", "/spec/backoffLimit", 2**31),
    ("Job", "/spec/backoffLimit", -1),
    ("Job", "/spec/template/spec/restartPolicy", "Always"),
    ("CronJob", "/spec/schedule", "0 25 * * *"),
    ("CronJob", "/spec/schedule", "daily"),
    # tolerations, affinity, spreads
    ("RayJob", "/spec/rayClusterSpec/workerGroupSpecs/0/template/spec/tolerations/0/tolerationSeconds", "300"),
    ("Pod", "/spec/tolerations", [{"key": "a", "operator": "Exists", "value": "b"}]),
    ("Pod", "/spec/tolerations", [{"effect": "NoSchedule"}]),
    ("Pod", "/spec/tolerations", [{"key": "a", "operator": "Exists", "effect": "Never"}]),
    ("Pod", "/spec/affinity", {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 101, "preference": {}}]}}),
    ("Pod", "/spec/topologySpreadConstraints", [{"maxSkew": 0, "topologyKey": "a", "whenUnsatisfiable": "DoNotSchedule"}]),
    # rights
    ("Role", "/rules/0/verbs", []),
    ("RoleBinding", "/roleRef/kind", "Roles"),
    ("RoleBinding", "/subjects/0", {"kind": "ServiceAccount", "name": "x"}),
    # what few write
    ("Deployment", f"{MLFLOW}/env/1/name", "MLFLOW_SERVER_ALLOWED_HOSTS"),
    ("Deployment", f"{MLFLOW}/env/1", {"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.nam"}}}),
    ("Deployment", f"{MLFLOW}/env/1", {"name": "A", "valueFrom": {"resourceFieldRef": {"resource": "limits.gpu"}}}),
    ("Deployment", f"{MLFLOW}/env/1", {"name": "A", "valueFrom": {"secretKeyRef": {"key": "x"}}}),
    ("Deployment", f"{MLFLOW}/securityContext/privileged", True),
    ("Pod", "/spec/dnsPolicy", "None"),
    ("Pod", "/spec/hostAliases", [{"ip": "10.0.0", "hostnames": ["a"]}]),
    ("Pod", "/spec/securityContext/supplementalGroups", [-1]),
    ("CronJob", "/spec/timeZone", "Mars/Phobos"),
    ("Service/mlflow", "/spec/clusterIP", "10.0.0.300"),
    ("Service/mlflow", "/spec/ipFamilyPolicy", "DualStack"),
    ("StatefulSet", "/spec/updateStrategy", {"type": "RollingUpdate", "rollingUpdate": {"partition": -1}}),
    ("Secret", "/type", "kubernetes.io/tls"),
    # Kueue
    ("ClusterQueue", f"{QUOTA}/0/nominalQuota", "forty"),
    ("ClusterQueue", f"{QUOTA}/0/nominalQuota", "-1"),
    ("ClusterQueue", f"{QUOTA}/0/borrowingLimit", "1"),
    ("ClusterQueue", f"{QUOTA}/0/name", "gpu"),
    ("ClusterQueue", f"{QUOTA}/3", ...),
    ("ClusterQueue", "/spec/resourceGroups/0/coveredResources/0", "memory"),
    ("ClusterQueue", "/spec/queueingStrategy", "FIFO"),
    ("ClusterQueue", "/spec/preemption", {"reclaimWithinCohort": "Never", "borrowWithinCohort": {"policy": "LowerPriority"}}),
    ("ClusterQueue", "/spec/flavorFungibility", {"preference": "BorrowingOverPreemption", "whenCanBorrow": "MayStopSearch"}),
    ("ClusterQueue", "/spec/cohort", "x"),
    ("ClusterQueue", "/spec/cohortName", "My_Cohort"),
    ("LocalQueue", "/spec/clusterQueue", "Safe Basin"),
    ("LocalQueue", "/spec/stopPolicy", "Stop"),
    ("ResourceFlavor", "/spec", {"topologyName": "default"}),
    ("ResourceFlavor", "/spec", {"nodeTaints": [{"key": "a", "effect": "NoExec"}]}),
    ("ResourceFlavor", "/spec", {"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}),
    ("ResourceFlavor", "/spec", {"nodeLabels": {f"a{i}": "b" for i in range(9)}}),
    ("Topology", "/spec/levels/0/nodeLabel", "kubernetes.io/hostname"),
    # RayJob and its pods
    ("RayJob", "/metadata/labels/kueue.x-k8s.io~1queue-name", "not a queue"),
    ("RayJob", f"{HEAD}/containers/0/volumeMounts/0/name", "result"),
    ("RayJob", f"{HEAD}/containers/0/resources/limits/memory", "8GB"),
    ("RayJob", "/spec/deletionStrategy", {"deletionRules": [{"policy": "DeleteWorkers", "condition": {"jobStatus": "SUCCEEDED"}}]}),
    ("RayJob", "/spec/submissionMode", "SidecarMode"),
]

ACCEPTED: list[tuple[str, str, Any]] = [
    *[("Deployment", f"{MLFLOW}/resources/limits/memory", value) for value in ("2.5Gi", "3000M", "3e9", 4294967296, "2.5e9", "3000000k", "2Gi")],
    *[("Deployment", f"{MLFLOW}/resources/requests/cpu", value) for value in ("0.1", 0.1, 1, ".5", "1.", "100000u", "+1", "0")],
    ("Deployment", f"{MLFLOW}/resources/requests", ...),
    ("Deployment", f"{MLFLOW}/resources/limits/nvidia.com~1gpu", 1),
    ("Deployment", f"{MLFLOW}/ports/0/name", "a1"),
    ("Deployment", f"{MLFLOW}/ports/0/protocol", "SCTP"),
    ("Deployment", f"{MLFLOW}/env/1", {"name": "odd.name-with spaces", "value": ""}),
    ("Deployment", f"{MLFLOW}/env/1", {"name": "EMPTY"}),
    ("Deployment", f"{MLFLOW}/env/1", {"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}}),
    ("Service/mlflow", "/spec/clusterIP", "fd00::1"),
    ("CronJob", "/spec/timeZone", "Europe/Berlin"),
    ("Deployment", f"{MLFLOW}/livenessProbe/timeoutSeconds", 0),
    ("Deployment", f"{MLFLOW}/livenessProbe/httpGet/port", "any-port"),
    ("Deployment", f"{MLFLOW}/securityContext/runAsUser", 0),
    ("Deployment", f"{MLFLOW}/image", "not a:valid:reference"),
    ("Deployment", "/metadata/labels/app.kubernetes.io~1Part_Of", ""),
    ("Deployment", "/metadata/name", "ml.flow-1"),
    ("Deployment", "/metadata/annotations", {"Example.com/Key_1": "any text: ü, 'quotes'\n"}),
    ("Deployment", "/spec/strategy", {"rollingUpdate": {"maxSurge": "150%", "maxUnavailable": 0}}),
    ("Deployment", "/spec/replicas", None),
    ("Deployment", "/spec/selector", {"matchExpressions": [{"key": "app", "operator": "Exists"}]}),
    ("Service/mlflow", "/spec/ports/0/targetPort", 65535),
    ("Service/postgres", "/spec/ports", ...),
    ("Service/mlflow", "/spec/ports/0/name", "a-name-that-is-longer-than-fifteen"),
    ("NetworkPolicy/mlflow", "/spec/ingress/0", {}),
    ("NetworkPolicy/mlflow", "/spec/ingress/0/ports/0", {"port": "http"}),
    ("NetworkPolicy/mlflow", "/spec/ingress/0/ports/0", {"port": 5000, "endPort": 5000}),
    ("NetworkPolicy/mlflow", "/spec/egress/1/to/0/ipBlock", {"cidr": "::/0", "except": ["fe80::/10"]}),
    ("NetworkPolicy/mlflow", "/spec/egress/1/to/0", {"namespaceSelector": {}}),
    ("PodDisruptionBudget", "/spec/minAvailable", "0%"),
    ("PodDisruptionBudget", "/spec/minAvailable", 0),
    ("PersistentVolumeClaim", "/spec/accessModes", ["ReadOnlyMany", "ReadWriteOnce"]),
    ("PersistentVolumeClaim", "/spec/resources/requests/storage", "0.5Ti"),
    ("PersistentVolumeClaim", "/spec/storageClassName", ""),
    ("ConfigMap", "/data/.hidden_file-1.txt", "x"),
    ("Pod", "/spec/tolerations", [{"operator": "Exists"}]),
    ("Pod", "/spec/tolerations", [{"key": "a", "value": "b", "effect": ""}]),
    ("Pod", "/spec/volumes/0", {"name": "results", "emptyDir": {"medium": "Memory", "sizeLimit": "0"}}),
    ("Pod", "/spec/containers/0/volumeMounts/0/readOnly", True),
    ("Pod", "/spec/activeDeadlineSeconds", 1),
    ("Pod", "/spec/affinity", {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["-5"]}]}]}}}),
    *[("CronJob", "/spec/schedule", value) for value in ("*/5 0-6 1,15 jan-jun MON", "@hourly", "? 3 * * 0")],
    ("Job", "/spec/completions", 0),
    ("RoleBinding", "/roleRef/apiGroup", ...),
    ("StatefulSet", "/spec/serviceName", ...),
    ("Namespace", "/metadata/labels/pod-security.kubernetes.io~1enforce-version", "v1.34"),
    ("ClusterQueue", "/spec/cohortName", "team-a.example"),
    ("ClusterQueue", "/spec/resourceGroups", []),
    ("ClusterQueue", "/spec/fairSharing", {"weight": "1.5"}),
    ("ClusterQueue", "/spec/flavorFungibility", {"whenCanBorrow": "TryNextFlavor", "preference": "BorrowingOverPreemption"}),
    ("ClusterQueue", "/spec/preemption", {"withinClusterQueue": "LowerPriority"}),
    ("ClusterQueue", f"{QUOTA}/0/nominalQuota", 40),
    ("ResourceFlavor", "/spec", {"nodeLabels": {"a": "b"}, "topologyName": "default", "tolerations": [{"operator": "Exists"}]}),
    ("ResourceFlavor", "/spec", {}),
    ("LocalQueue", "/spec/stopPolicy", "HoldAndDrain"),
    ("RayJob", "/spec/rayClusterSpec/headGroupSpec/labels", {"a": "b"}),
]  # fmt: skip
