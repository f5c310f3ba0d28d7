"""What the API server refuses in a pod's spec, beyond its structure: references within the pod, enums, ranges, amounts."""

from __future__ import annotations

import re
from typing import Any

from tests import k8s_values as values
from tests.k8s_values import INT32, Errors, among, amount, at_least, named, unique

SOURCES = {
    "emptyDir", "configMap", "secret", "persistentVolumeClaim", "projected", "downwardAPI", "hostPath", "nfs", "csi", "ephemeral", "image", "iscsi",
    "fc", "glusterfs", "rbd", "cephfs", "cinder", "flexVolume", "gcePersistentDisk", "awsElasticBlockStore", "azureDisk", "azureFile",
    "vsphereVolume", "quobyte", "portworxVolume", "scaleIO", "storageos", "photonPersistentDisk", "gitRepo", "flocker",
}  # fmt: skip
STANDARD = {"cpu", "memory", "ephemeral-storage"}
HANDLERS = {"exec", "httpGet", "tcpSocket", "grpc"}
EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")


def template(at: str, found: dict[str, Any], restart: tuple[str, ...] = (), claims: tuple[str, ...] = ()) -> Errors:
    """A pod template; `restart` names the restart policies that its owner takes, `claims` volumes that come from elsewhere."""
    yield from values.metadata(f"{at}.metadata", found.get("metadata") or {})
    spec = found.get("spec") or {}
    if restart and (spec.get("restartPolicy") or "Always") not in restart:
        yield f"{at}.spec.restartPolicy: {spec.get('restartPolicy') or 'Always (the default)'} is not supported here; use {' or '.join(restart)}"
    yield from pod(f"{at}.spec", spec, claims)


def pod(at: str, spec: dict[str, Any], claims: tuple[str, ...] = ()) -> Errors:
    yield from among(f"{at}.restartPolicy", spec.get("restartPolicy"), "Always", "OnFailure", "Never")
    yield from among(f"{at}.dnsPolicy", spec.get("dnsPolicy"), "ClusterFirst", "ClusterFirstWithHostNet", "Default", "None")
    yield from among(f"{at}.preemptionPolicy", spec.get("preemptionPolicy"), "PreemptLowerPriority", "Never")
    yield from at_least(f"{at}.terminationGracePeriodSeconds", spec.get("terminationGracePeriodSeconds"))
    yield from at_least(f"{at}.activeDeadlineSeconds", spec.get("activeDeadlineSeconds"), 1)
    for key in ("serviceAccountName", "nodeName", "priorityClassName", "runtimeClassName"):
        if spec.get(key):
            yield from named(f"{at}.{key}", spec[key])
    for key in ("hostname", "subdomain"):
        if spec.get(key):
            yield from named(f"{at}.{key}", spec[key], values.LABEL, 63)
    yield from values.labels(f"{at}.nodeSelector", spec.get("nodeSelector"))
    if spec.get("dnsPolicy") == "None" and not (spec.get("dnsConfig") or {}).get("nameservers"):
        yield f"{at}.dnsConfig.nameservers: dnsPolicy None needs one"
    for i, alias in enumerate(spec.get("hostAliases") or []):
        if not values.address(alias.get("ip")):
            yield f"{at}.hostAliases[{i}].ip: {alias.get('ip')!r} is no address"
    yield from _security(f"{at}.securityContext", spec.get("securityContext") or {})
    volumes = spec.get("volumes") or []
    for i, volume in enumerate(volumes):
        yield from _volume(f"{at}.volumes[{i}]", volume)
    known = [volume.get("name") for volume in volumes]
    yield from unique(f"{at}.volumes", known, "volume")
    groups = {key: spec.get(key) or [] for key in ("initContainers", "containers")}
    if not groups["containers"]:
        yield f"{at}.containers: a pod needs a container"
    yield from unique(at, [c.get("name") for group in groups.values() for c in group], "container")
    for key, group in groups.items():
        for i, container in enumerate(group):
            yield from _container(f"{at}.{key}[{i}]", container, {*known, *claims}, init=key == "initContainers")
            if spec.get("hostNetwork"):
                for p in container.get("ports") or []:
                    if p.get("hostPort", p.get("containerPort")) != p.get("containerPort"):
                        yield f"{at}.{key}[{i}].ports: with hostNetwork a hostPort equals its containerPort"
    for i, toleration in enumerate(spec.get("tolerations") or []):
        yield from tolerates(f"{at}.tolerations[{i}]", toleration)
    yield from _affinity(f"{at}.affinity", spec.get("affinity") or {})
    yield from _spread(f"{at}.topologySpreadConstraints", spec.get("topologySpreadConstraints") or [])


def _security(at: str, found: dict[str, Any], *, container: bool = False) -> Errors:
    for key in ("runAsUser", "runAsGroup", "fsGroup"):
        if isinstance(found.get(key), int) and not 0 <= found[key] <= INT32:
            yield f"{at}.{key}: {found[key]} is not within 0 to {INT32}"
    for group in found.get("supplementalGroups") or []:
        if not 0 <= group <= INT32:
            yield f"{at}.supplementalGroups: {group} is not within 0 to {INT32}"
    yield from among(f"{at}.fsGroupChangePolicy", found.get("fsGroupChangePolicy"), "Always", "OnRootMismatch")
    yield from among(f"{at}.procMount", found.get("procMount"), "Default", "Unmasked")
    for key in ("seccompProfile", "appArmorProfile"):
        if (profile := found.get(key)) is not None:
            yield from among(f"{at}.{key}.type", profile.get("type") or "", "RuntimeDefault", "Unconfined", "Localhost")
            if (profile.get("type") == "Localhost") != bool(profile.get("localhostProfile")):
                yield f"{at}.{key}.localhostProfile: goes with type Localhost, and only with it"
    if container and found.get("allowPrivilegeEscalation") is False:
        added = {str(name).removeprefix("CAP_") for name in (found.get("capabilities") or {}).get("add") or []}
        if found.get("privileged") or "SYS_ADMIN" in added:
            yield f"{at}.allowPrivilegeEscalation: false contradicts privileged and CAP_SYS_ADMIN"


def _volume(at: str, volume: dict[str, Any]) -> Errors:
    yield from named(f"{at}.name", volume.get("name"), values.LABEL, 63)
    sources = sorted(key for key in SOURCES if volume.get(key) is not None)
    if len(sources) != 1:
        yield f"{at}: a volume has exactly one source, not {', '.join(sources) or 'none'}"
    if (size := (volume.get("emptyDir") or {}).get("sizeLimit")) is not None:
        yield from values.quantity(f"{at}.emptyDir.sizeLimit", size)
    for key, field in (("configMap", "name"), ("secret", "secretName"), ("persistentVolumeClaim", "claimName")):
        if (source := volume.get(key)) is not None:
            if not source.get(field):
                yield f"{at}.{key}.{field}: is missing"
            if not 0 <= (source.get("defaultMode") or 0) <= 0o777:
                yield f"{at}.{key}.defaultMode: {source['defaultMode']} is not within 0 to 0777"
            for item in source.get("items") or []:
                if not item.get("key") or not item.get("path") or str(item["path"]).startswith("/") or ".." in str(item["path"]).split("/"):
                    yield f"{at}.{key}.items: {item!r} needs a key and a relative path without '..'"
                if not 0 <= (item.get("mode") or 0) <= 0o777:
                    yield f"{at}.{key}.items: mode {item['mode']} is not within 0 to 0777"


def _container(at: str, found: dict[str, Any], volumes: set[Any], *, init: bool) -> Errors:
    yield from named(f"{at}.name", found.get("name"), values.LABEL, 63)
    image = found.get("image")
    if not image or image != str(image).strip():
        yield f"{at}.image: {image!r} is missing, or has a space at an end"
    yield from among(f"{at}.imagePullPolicy", found.get("imagePullPolicy"), "Always", "IfNotPresent", "Never")
    yield from among(f"{at}.terminationMessagePolicy", found.get("terminationMessagePolicy"), "File", "FallbackToLogsOnError")
    yield from _security(f"{at}.securityContext", found.get("securityContext") or {}, container=True)
    yield from resources(f"{at}.resources", found.get("resources") or {})
    ports = found.get("ports") or []
    for i, port in enumerate(ports):
        yield from values.port(f"{at}.ports[{i}].containerPort", port.get("containerPort"))
        if port.get("hostPort"):
            yield from values.port(f"{at}.ports[{i}].hostPort", port["hostPort"])
        if port.get("name"):
            yield from values.port_name(f"{at}.ports[{i}].name", port["name"])
        yield from among(f"{at}.ports[{i}].protocol", port.get("protocol"), "TCP", "UDP", "SCTP")
    yield from unique(f"{at}.ports", [port.get("name") for port in ports], "port's name")
    pairs = [(port.get("containerPort"), port.get("protocol") or "TCP") for port in ports]
    twice = [*unique(f"{at}.ports", pairs, "port"), *unique(f"{at}.env", [variable.get("name") for variable in found.get("env") or []], "variable")]
    yield from (f"{error} (rule of server-side apply)" for error in twice)
    yield from _environment(at, found)
    yield from _mounts(f"{at}.volumeMounts", found.get("volumeMounts") or [], volumes)
    sidecar = init and found.get("restartPolicy") == "Always"
    for key in ("livenessProbe", "readinessProbe", "startupProbe"):
        if (one := found.get(key)) is not None:
            if init and not sidecar:
                yield f"{at}.{key}: an init container has no probes"
            yield from _probe(f"{at}.{key}", one, readiness=key == "readinessProbe")
    if (hooks := found.get("lifecycle")) is not None:
        for key in ("postStart", "preStop"):
            if hooks.get(key) is not None and sum(hooks[key].get(h) is not None for h in ("exec", "httpGet", "tcpSocket", "sleep")) != 1:
                yield f"{at}.lifecycle.{key}: has exactly one of exec, httpGet, tcpSocket, sleep"


def resources(at: str, found: dict[str, Any]) -> Errors:
    requests, limits = found.get("requests") or {}, found.get("limits") or {}
    for kind, amounts in (("requests", requests), ("limits", limits)):
        for name, value in amounts.items():
            yield from values.quantity(f"{at}.{kind}.{name}", value)
            yield from values.qualified(f"{at}.{kind}", name)
            if "/" not in str(name) and name not in STANDARD and not str(name).startswith("hugepages-"):
                yield f"{at}.{kind}.{name}: is no resource of Kubernetes; others have a prefix, as nvidia.com/gpu"
            extended = "/" in str(name) and not str(name).startswith("kubernetes.io/")
            if extended and amount(value) is not None and amount(value) % 1:
                yield f"{at}.{kind}.{name}: {value!r} must be a whole number"
    for name, value in requests.items():
        limit = limits.get(name)
        whole = "/" in str(name) or str(name).startswith("hugepages-")
        if limit is None and whole:
            yield f"{at}.limits.{name}: is missing; a resource with a prefix is limited to what it requests"
        if amount(value) is None or amount(limit) is None:
            continue
        if amount(value) > amount(limit):
            yield f"{at}.requests.{name}: {value} is more than the limit {limit}"
        elif whole and amount(value) != amount(limit):
            yield f"{at}.requests.{name}: {value} differs from the limit {limit}; a resource with a prefix is never overcommitted"


def _environment(at: str, found: dict[str, Any]) -> Errors:
    for i, variable in enumerate(found.get("env") or []):
        here, name, source = f"{at}.env[{i}]", variable.get("name"), variable.get("valueFrom")
        if not isinstance(name, str) or not re.fullmatch(r"[ -<>-~]+", name):
            yield f"{here}.name: {name!r} must be printable ASCII without ="
        if source is not None:
            kinds = sorted(k for k in ("secretKeyRef", "configMapKeyRef", "fieldRef", "resourceFieldRef", "fileKeyRef") if source.get(k) is not None)
            if variable.get("value"):
                yield f"{here}: has both value and valueFrom; keep one"
            if len(kinds) != 1:
                yield f"{here}.valueFrom: has exactly one source, not {', '.join(kinds) or 'none'}"
            yield from _field(here, source)
            for kind in ("secretKeyRef", "configMapKeyRef"):
                if kind in source and not source[kind].get("name"):
                    yield f"{here}.valueFrom.{kind}.name: is missing"
                key = (source.get(kind) or {"key": "x"}).get("key")
                if not isinstance(key, str) or not values.CONFIG_KEY.fullmatch(key) or key in (".", "..") or len(key) > 253:
                    yield f"{here}.valueFrom.{kind}.key: {key!r} is no key of A-Z, a-z, 0-9, -, _ and ."
    for i, source in enumerate(found.get("envFrom") or []):
        kinds = [kind for kind in ("secretRef", "configMapRef") if source.get(kind) is not None]
        if len(kinds) != 1:
            yield f"{at}.envFrom[{i}]: has exactly one of secretRef and configMapRef"
        for kind in kinds:
            yield from named(f"{at}.envFrom[{i}].{kind}.name", source[kind].get("name"))


def _field(at: str, source: dict[str, Any]) -> Errors:
    """What the downward API gives."""
    path = (source.get("fieldRef") or {"fieldPath": "metadata.name"}).get("fieldPath")
    if not re.fullmatch(r"metadata\.(name|namespace|uid)|metadata\.(labels|annotations)\['.+'\]|spec\.(nodeName|serviceAccountName)"
                        r"|status\.(hostIPs?|podIPs?)", str(path)):  # fmt: skip
        yield f"{at}.valueFrom.fieldRef.fieldPath: {path!r} is no field that a variable can have"
    resource = (source.get("resourceFieldRef") or {"resource": "limits.cpu"}).get("resource")
    if not re.fullmatch(r"(limits|requests)\.(cpu|memory|ephemeral-storage|hugepages-.+)", str(resource)):
        yield f"{at}.valueFrom.resourceFieldRef.resource: {resource!r} is no resource that a variable can have"


def _mounts(at: str, mounts: list[dict[str, Any]], volumes: set[Any]) -> Errors:
    for i, mount in enumerate(mounts):
        if mount.get("name") not in volumes:
            yield f"{at}[{i}].name: there is no volume {mount.get('name')!r} in the pod"
        if not mount.get("mountPath"):
            yield f"{at}[{i}].mountPath: is missing"
        for key in ("subPath", "subPathExpr"):
            path = str(mount.get(key) or "")
            if path.startswith("/") or ".." in path.split("/"):
                yield f"{at}[{i}].{key}: {path!r} must be relative, without '..'"
        if mount.get("subPath") and mount.get("subPathExpr"):
            yield f"{at}[{i}]: has both subPath and subPathExpr; keep one"
        yield from among(f"{at}[{i}].mountPropagation", mount.get("mountPropagation"), "None", "HostToContainer", "Bidirectional")
    yield from unique(at, [mount.get("mountPath") for mount in mounts], "mountPath")


def _probe(at: str, found: dict[str, Any], *, readiness: bool) -> Errors:
    handlers = sorted(key for key in HANDLERS if found.get(key) is not None)
    if len(handlers) != 1:
        yield f"{at}: has exactly one of {', '.join(sorted(HANDLERS))}, not {', '.join(handlers) or 'none'}"
    for key in ("httpGet", "tcpSocket"):
        if (handler := found.get(key)) is not None:
            yield from values.port(f"{at}.{key}.port", handler.get("port"), name=True)
            yield from among(f"{at}.{key}.scheme", handler.get("scheme"), "HTTP", "HTTPS")
    if (grpc := found.get("grpc")) is not None:
        yield from values.port(f"{at}.grpc.port", grpc.get("port"))
    if found.get("exec") is not None and not found["exec"].get("command"):
        yield f"{at}.exec.command: is missing"
    for key in ("initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"):
        yield from at_least(f"{at}.{key}", found.get(key))
    if not readiness and found.get("successThreshold") not in (None, 0, 1):
        yield f"{at}.successThreshold: must be 1 but in a readiness probe"
    if (grace := found.get("terminationGracePeriodSeconds")) is not None:
        if readiness:
            yield f"{at}.terminationGracePeriodSeconds: a readiness probe ends nothing"
        else:
            yield from at_least(f"{at}.terminationGracePeriodSeconds", grace, 1)


def tolerates(at: str, found: dict[str, Any]) -> Errors:
    operator = found.get("operator") or "Equal"
    yield from among(f"{at}.operator", operator, "Exists", "Equal")
    yield from among(f"{at}.effect", found.get("effect") or None, *EFFECTS)
    if found.get("key"):
        yield from values.qualified(f"{at}.key", found["key"])
    elif operator != "Exists":
        yield f"{at}.operator: must be Exists where there is no key"
    if operator == "Exists" and found.get("value"):
        yield f"{at}.value: must be empty where operator is Exists"
    elif found.get("value"):
        yield from values.label_value(f"{at}.value", found["value"])
    if found.get("tolerationSeconds") is not None and found.get("effect") != "NoExecute":
        yield f"{at}.tolerationSeconds: goes with effect NoExecute only"


def _affinity(at: str, found: dict[str, Any]) -> Errors:
    node = found.get("nodeAffinity") or {}
    required = node.get("requiredDuringSchedulingIgnoredDuringExecution")
    terms = (required or {}).get("nodeSelectorTerms") or []
    if required is not None and not terms:
        yield f"{at}.nodeAffinity: nodeSelectorTerms needs a term"
    preferred = node.get("preferredDuringSchedulingIgnoredDuringExecution") or []
    for term in [*terms, *(p.get("preference") for p in preferred)]:
        yield from values.selector(f"{at}.nodeAffinity", {"matchExpressions": (term or {}).get("matchExpressions")}, node=True)
    weighted = list(preferred)
    for key in ("podAffinity", "podAntiAffinity"):
        pods = found.get(key) or {}
        soft = pods.get("preferredDuringSchedulingIgnoredDuringExecution") or []
        weighted += soft
        for term in [*(pods.get("requiredDuringSchedulingIgnoredDuringExecution") or []), *(s.get("podAffinityTerm") or {} for s in soft)]:
            yield from values.qualified(f"{at}.{key}.topologyKey", term.get("topologyKey") or "")
            yield from values.selector(f"{at}.{key}.labelSelector", term.get("labelSelector"))
    for one in weighted:
        if not 1 <= (one.get("weight") or 0) <= 100:
            yield f"{at}: weight {one.get('weight')} is not within 1 to 100"


def _spread(at: str, found: list[dict[str, Any]]) -> Errors:
    for i, one in enumerate(found):
        yield from at_least(f"{at}[{i}].maxSkew", one.get("maxSkew") or 0, 1)
        yield from values.qualified(f"{at}[{i}].topologyKey", one.get("topologyKey") or "")
        yield from among(f"{at}[{i}].whenUnsatisfiable", one.get("whenUnsatisfiable") or "", "DoNotSchedule", "ScheduleAnyway")
        yield from values.selector(f"{at}[{i}].labelSelector", one.get("labelSelector"))
        if one.get("minDomains") is not None and one.get("whenUnsatisfiable") != "DoNotSchedule":
            yield f"{at}[{i}].minDomains: goes with DoNotSchedule only"
        for key in ("nodeAffinityPolicy", "nodeTaintsPolicy"):
            yield from among(f"{at}[{i}].{key}", one.get(key), "Honor", "Ignore")
    yield from unique(at, [(one.get("topologyKey"), one.get("whenUnsatisfiable")) for one in found], "constraint")
