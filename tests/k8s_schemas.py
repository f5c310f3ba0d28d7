"""What the custom kinds of `k8s/` may hold: strict schemas, from the published CRDs of KubeRay 1.7, Kueue 0.19 and the Prometheus operator 0.93.

Anything that is not listed is refused, as a strict API server would. Pod templates are left open here and checked as core Pods. What we ask for
beyond the CRDs (a Ray version, token authentication) stands in `tests.k8s_custom` and names itself as our rule.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT = {"type": "string", "minLength": 1}
WORD = {"type": "string"}
FLAG = {"type": "boolean"}
INT32 = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
POSITIVE = {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}
LARGE = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
OPEN = {"type": "object"}
QUANTITY = {
    "anyOf": [
        {"type": "integer"},
        {"type": "string", "pattern": r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+))?$"},
    ]
}
SUBDOMAIN = {"type": "string", "maxLength": 253, "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"}
LABELS = {"type": "object", "additionalProperties": {"type": "string"}}


def record(required: str = "", **fields: Schema) -> Schema:
    """An object with exactly these fields; `required` names some of them."""
    return {"type": "object", "additionalProperties": False, "properties": fields, "required": required.split()}


def rows(item: Schema, least: int = 1, most: int = 10**6) -> Schema:
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


def among(*values: str) -> Schema:
    return {"enum": list(values)}


START_PARAMS = {"type": "object", "additionalProperties": {"type": "string"}}
SELECTOR = record(matchLabels=LABELS, matchExpressions=rows(record("key operator", key=WORD, operator=WORD, values=rows(WORD, 0)), 0))
MANAGED = among("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")

RAY_CLUSTER = record(
    "headGroupSpec",
    rayVersion=WORD,
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=record(
        args=rows(WORD, 0), command=rows(WORD, 0), env=rows(OPEN, 0), envFrom=rows(OPEN, 0), image=WORD, imagePullPolicy=WORD,
        idleTimeoutSeconds=INT32, resources=OPEN, securityContext=OPEN, volumeMounts=rows(OPEN, 0),
        upscalingMode=among("Default", "Aggressive", "Conservative"), version=among("v1", "v2"),
    ),
    authOptions=record(mode=among("token", "disabled"), secretName=WORD, enableK8sTokenAuth=FLAG),
    headGroupSpec=record(
        "template", rayStartParams=START_PARAMS, template=OPEN, serviceType=WORD, headService=OPEN, enableIngress=FLAG, ingressOptions=OPEN,
        labels=LABELS, resources=LABELS,
    ),
    workerGroupSpecs=rows(
        record(
            "groupName template",
            groupName=WORD, replicas=INT32, minReplicas=INT32, maxReplicas=INT32, numOfHosts=INT32, idleTimeoutSeconds=INT32, suspend=FLAG,
            priority=INT32, rayStartParams=START_PARAMS, template=OPEN, labels=LABELS, resources=LABELS,
            scaleStrategy=record(workersToDelete=rows(WORD, 0)),
        ),
        0,
    ),
    suspend=FLAG, managedBy=MANAGED, headServiceAnnotations=LABELS, gcsFaultToleranceOptions=OPEN, historyServerOptions=OPEN, networkPolicy=OPEN,
    tlsOptions=OPEN, upgradeStrategy=OPEN,
)  # fmt: skip

POLICIES = among("DeleteWorkers", "DeleteCluster", "DeleteSelf", "DeleteNone")
RAY_JOB = record(
    entrypoint=WORD,
    entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"}, entrypointResources=WORD,
    submissionMode=WORD,
    submitterConfig=record(backoffLimit=INT32),
    submitterPodTemplate=OPEN,
    backoffLimit=INT32, activeDeadlineSeconds=INT32, preRunningDeadlineSeconds=POSITIVE, ttlSecondsAfterFinished=INT32,
    shutdownAfterJobFinishes=FLAG, suspend=FLAG, jobId=WORD, runtimeEnvYAML=WORD, metadata=LABELS, clusterSelector=LABELS,
    managedBy=MANAGED,
    deletionStrategy=record(
        onSuccess=record(policy=POLICIES), onFailure=record(policy=POLICIES),
        deletionRules=rows(
            record(
                "policy condition",
                policy=POLICIES,
                condition=record(jobStatus=among("SUCCEEDED", "FAILED"), jobDeploymentStatus=among("Failed"), ttlSeconds=COUNT),
            )
        ),
    ),
    rayClusterSpec=RAY_CLUSTER,
)  # fmt: skip
RAY_CRON_JOB = record("jobTemplate schedule", jobTemplate=RAY_JOB, schedule=WORD, timeZone=TEXT, suspend=FLAG)

QUOTA = record("name nominalQuota", name=WORD, nominalQuota=QUANTITY, borrowingLimit=QUANTITY, lendingLimit=QUANTITY)
FAIR_SHARING = record(weight=QUANTITY)
STOP = among("None", "Hold", "HoldAndDrain")
CLUSTER_QUEUE = record(
    namespaceSelector=SELECTOR,
    cohortName=SUBDOMAIN,
    queueingStrategy=among("StrictFIFO", "BestEffortFIFO"),
    stopPolicy=STOP,
    fairSharing=FAIR_SHARING,
    admissionScope=record("admissionMode", admissionMode=among("UsageBasedAdmissionFairSharing", "NoAdmissionFairSharing")),
    concurrentAdmissionPolicy=record(
        "migration",
        migration=record(
            "mode", mode=among("TryPreferredFlavors", "RetainFirstAdmission"), constraints=record(lastAcceptableFlavorName=SUBDOMAIN)
        ),
    ),
    flavorFungibility=record(
        preference=among("BorrowingOverPreemption", "PreemptionOverBorrowing"),
        whenCanBorrow=among("MayStopSearch", "TryNextFlavor"), whenCanPreempt=among("MayStopSearch", "TryNextFlavor"),
    ),
    preemption=record(
        borrowWithinCohort=record(policy=among("Never", "LowerPriority"), maxPriorityThreshold=INT32),
        reclaimWithinCohort=among("Never", "LowerPriority", "Any"),
        withinClusterQueue=among("Never", "LowerPriority", "LowerOrNewerEqualPriority"),
    ),
    admissionChecksStrategy=record(
        "admissionChecks", admissionChecks=rows(record("name", name={**TEXT, "maxLength": 316}, onFlavors=rows(SUBDOMAIN, 0, 64)), 1, 64)
    ),
    resourceGroups=rows(
        record(
            "coveredResources flavors",
            coveredResources=rows(WORD, 1, 64),
            flavors=rows(record("name resources", name=SUBDOMAIN, resources=rows(QUOTA, 1, 64)), 1, 64),
        ),
        0, 16,
    ),
)  # fmt: skip
TOLERATION = record(key=WORD, operator=WORD, value=WORD, effect=WORD, tolerationSeconds={"type": "integer"})
FLAVOR = record(
    nodeLabels={**LABELS, "maxProperties": 8},
    nodeTaints=rows(record("key effect", key=WORD, value=WORD, effect=WORD, timeAdded=WORD), 0, 8),
    tolerations=rows(TOLERATION, 0, 8),
    topologyName=SUBDOMAIN,
)
LEVEL_KEY = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]$"
LEVEL = {"type": "string", "minLength": 1, "maxLength": 316, "pattern": LEVEL_KEY}

ACTIONS = "replace keep drop hashmod labelmap labeldrop labelkeep lowercase uppercase keepequal dropequal".split()
CAMEL = "Replace Keep Drop HashMod LabelMap LabelDrop LabelKeep Lowercase Uppercase KeepEqual DropEqual".split()
DURATION = {"type": "string", "pattern": r"^(0|([0-9]+y)?([0-9]+w)?([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?([0-9]+ms)?)$"}
PROTOCOLS = among("PrometheusProto", "OpenMetricsText0.0.1", "OpenMetricsText1.0.0", "PrometheusText0.0.4", "PrometheusText1.0.0")
RELABELING = record(
    sourceLabels=rows(WORD, 0), targetLabel=WORD, regex=WORD, replacement=WORD, separator=WORD, modulus=LARGE, action=among(*ACTIONS, *CAMEL)
)
ENDPOINT = record(
    port=WORD, portNumber={"type": "integer", "minimum": 1, "maximum": 65535}, targetPort={"type": ["string", "integer"]}, path=WORD,
    scheme=among("http", "https", "HTTP", "HTTPS"), params={"type": "object", "additionalProperties": rows(WORD, 0)},
    interval=DURATION, scrapeTimeout=DURATION, relabelings=rows(RELABELING, 0), metricRelabelings=rows(RELABELING, 0),
    honorLabels=FLAG, honorTimestamps=FLAG, trackTimestampsStaleness=FLAG, enableHttp2=FLAG, filterRunning=FLAG, followRedirects=FLAG,
    authorization=OPEN, basicAuth=OPEN, bearerTokenSecret=record("key", key=WORD, name=WORD, optional=FLAG), oauth2=OPEN, tlsConfig=OPEN,
    noProxy=WORD, proxyConnectHeader=OPEN, proxyFromEnvironment=FLAG, proxyUrl={"type": "string", "pattern": "^(http|https|socks5)://.+$"},
)  # fmt: skip
POD_MONITOR = record(
    "selector",
    selector=SELECTOR, namespaceSelector=record(any=FLAG, matchNames=rows(WORD, 0)), podMetricsEndpoints=rows(ENDPOINT, 0),
    jobLabel=WORD, podTargetLabels=rows(WORD, 0), attachMetadata=record(node=FLAG), selectorMechanism=among("RelabelConfig", "RoleSelector"),
    bodySizeLimit={"type": "string", "pattern": r"(^0|([0-9]*[.])?[0-9]+((K|M|G|T|E|P)i?)?B)$"}, scrapeClass=TEXT,
    fallbackScrapeProtocol=PROTOCOLS, scrapeProtocols=rows(PROTOCOLS, 0), scrapeClassicHistograms=FLAG, scrapeNativeHistograms=FLAG,
    convertClassicHistogramsToNHCB=FLAG, nativeHistogramMinBucketFactor=QUANTITY, nativeHistogramBucketLimit=LARGE, keepDroppedTargets=LARGE,
    labelLimit=LARGE, labelNameLengthLimit=LARGE, labelValueLengthLimit=LARGE, sampleLimit=LARGE, targetLimit=LARGE,
)  # fmt: skip
RULE = record(
    "expr", alert=WORD, record=WORD, expr={"type": ["string", "integer"]}, **{"for": DURATION}, keep_firing_for={**DURATION, "minLength": 1},
    labels=LABELS, annotations=LABELS,
)  # fmt: skip
PROMETHEUS_RULE = record(
    groups=rows(
        record(
            "name", name=TEXT, interval=DURATION, query_offset=DURATION, limit={"type": "integer"}, labels=LABELS,
            partial_response_strategy={"type": "string", "pattern": "^(?i:abort|warn)?$"}, rules=rows(RULE, 0),
        ),
        0,
    )
)  # fmt: skip

SPECS: dict[tuple[str, str], Schema] = {
    ("ray.io/v1", "RayJob"): RAY_JOB,
    ("ray.io/v1", "RayCluster"): RAY_CLUSTER,
    ("ray.io/v1", "RayCronJob"): RAY_CRON_JOB,
    ("kueue.x-k8s.io/v1beta2", "ClusterQueue"): CLUSTER_QUEUE,
    ("kueue.x-k8s.io/v1beta2", "LocalQueue"): record(clusterQueue=SUBDOMAIN, stopPolicy=STOP, fairSharing=FAIR_SHARING),
    ("kueue.x-k8s.io/v1beta2", "ResourceFlavor"): FLAVOR,
    ("kueue.x-k8s.io/v1beta2", "Topology"): record("levels", levels=rows(record("nodeLabel", nodeLabel=LEVEL), 1, 16)),
    ("monitoring.coreos.com/v1", "PodMonitor"): POD_MONITOR,
    ("monitoring.coreos.com/v1", "PrometheusRule"): PROMETHEUS_RULE,
}
"""(apiVersion, kind) -> schema of `spec`."""
