"""`safebasin render`: an experiment and an overlay become Kubernetes manifests that are ready to apply.

Of the overlay's objects the RayJob, its PodDisruptionBudget and every ConfigMap that its pods read (the experiment, the environment) get the
run's name and label; the rest (claims, policies, service account) is shared by all runs. The run's name is made of the experiment's name and a
hash of what decides its results, the images included, so the same request is the same object and the same output folder, and a changed one is a
new run.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from orchestrator import config, redaction
from orchestrator.config import Experiment
from orchestrator.config.yaml_text import FLOAT
from orchestrator.errors import CapacityError, ConfigError, UnknownNameError
from orchestrator.experiment import places
from orchestrator.lanes import capacity
from orchestrator.storage import files as outputs
from orchestrator.storage import ownership, paths
from orchestrator.verbs import kustomize

EXPERIMENT = "safebasin-experiment"
"""ConfigMap of the overlays that holds the experiment; here it gets the run's name."""
MOUNT = "/etc/safebasin"
RESULTS = "${SAFEBASIN_RESULTS}"
"""Set in the pods by ConfigMap safebasin-environment: a mounted claim or a bucket."""
NAME_LIMIT = 47
"""KubeRay's for a RayJob: the names of its pods are longer."""
CONFIG_MAP_BYTES = 900_000
"""A ConfigMap holds 1 MiB with everything around it."""
PINNED = re.compile(r"sha256:[0-9a-f]{64}")
QUEUE = "kueue.x-k8s.io/queue-name"
PER_RUN = {"RayJob", "PodDisruptionBudget"}


@dataclass
class Manifests:
    """What is written."""

    name: str
    """Name of the RayJob and of the folder below the results."""
    run: list[dict[str, Any]]
    """The ConfigMaps that its pods read, its disruption budget, the RayJob: one set per run."""
    shared: list[dict[str, Any]]
    """What all runs of the namespace share."""
    warnings: list[str] = field(default_factory=list)


def root() -> Path:
    """The folder `k8s`: of the checkout, else as the wheel installed it."""
    checkout = Path(__file__).parents[2] / "k8s"
    return checkout if (checkout / "base").is_dir() else Path(sysconfig.get_path("data")) / "share" / "safebasin" / "k8s"


def overlay_folder(name: str) -> Path:
    """A shipped overlay's folder by name, or the folder itself where `name` is a path. Raises UnknownNameError."""
    known = {path.parent.name: path.parent for path in sorted(root().glob("overlays/*/kustomization.yaml"))}
    if name in known:
        return known[name]
    if paths.is_file(Path(name) / "kustomization.yaml"):
        return Path(name)
    raise UnknownNameError("overlay", name, known)


def render(experiment: Experiment, overlay: str, image: str | None = None) -> Manifests:
    """Manifests of one run. `image` replaces that of head and workers, and the submitter's where it is the same one.

    Local files that the experiment names (data, templates) travel in the run's ConfigMap. Raises ConfigError for what a pod could not
    see or a retry would destroy, CapacityError where the experiment does not fit the overlay's workers.
    """
    documents = kustomize.build(overlay_folder(overlay))
    job = _one(documents, "RayJob", overlay)
    _check(experiment)
    _check_job(job, overlay)
    images = _set_images(job, image)
    files: dict[str, str] = {}
    dump = _for_pods(experiment, _mounts(job), files)
    name = run_name(config.from_dict(dump), files, images)
    dump["output"] = dump["output"] | {"dir": f"{RESULTS}/{name}"}
    text = config.dump_yaml(config.from_dict(dump))
    if sum(len(body.encode()) for body in [text, *files.values()]) > CONFIG_MAP_BYTES:
        raise ConfigError(
            f"the local files of the experiment ({', '.join(sorted(files))}) do not fit into a ConfigMap of {CONFIG_MAP_BYTES:,} bytes; "
            "copy them to the cache volume and name them there, e.g. task.data=/cache/data/train.jsonl"
        )
    warnings = _fit(experiment, job, overlay) + _image_warnings(job)
    _experiment_map(documents, overlay)["data"] = {"experiment.yaml": text, **files}
    maps, rest = kustomize.split_maps(documents, job, {EXPERIMENT: name}, f"{name}-")
    for document in maps:
        document["metadata"].setdefault("labels", {}).update({"app": "safebasin", "safebasin-run": name})
    _rename(rest, name)
    # a RayJob last: what it reads is there when its pods come
    run = [*maps, *sorted((d for d in rest if d["kind"] in PER_RUN), key=lambda d: d["kind"])]
    return Manifests(name, run, [d for d in rest if d["kind"] not in PER_RUN], warnings)


def _one(documents: list[dict[str, Any]], kind: str, overlay: str) -> dict[str, Any]:
    found = [d for d in documents if d["kind"] == kind]
    if len(found) != 1:
        raise ConfigError(f"overlay {overlay!r} holds {len(found)} objects of kind {kind}; it needs exactly one")
    return found[0]


def _experiment_map(documents: list[dict[str, Any]], overlay: str) -> dict[str, Any]:
    for document in documents:
        if document["kind"] == "ConfigMap" and document["metadata"]["name"] == EXPERIMENT:
            return document
    raise ConfigError(f"overlay {overlay!r} has no ConfigMap {EXPERIMENT}; generate one as the shipped overlays do")


def _check_job(job: dict[str, Any], overlay: str) -> None:
    """Components that do not go together."""
    spec, labels = job["spec"], job["metadata"].get("labels", {})
    if QUEUE in labels and not spec.get("shutdownAfterJobFinishes"):
        raise ConfigError(
            f"overlay {overlay!r}: Kueue refuses a RayJob without shutdownAfterJobFinishes=true, which keep-head takes away; "
            "leave out kueue or keep-head"
        )
    elastic = spec["rayClusterSpec"].get("enableInTreeAutoscaling")
    if elastic and any(rule["policy"] == "DeleteWorkers" for rule in spec.get("deletionStrategy", {}).get("deletionRules", [])):
        raise ConfigError(f"overlay {overlay!r}: KubeRay refuses DeleteWorkers with its autoscaler; leave out elastic or keep-head")


def _check(experiment: Experiment) -> None:
    """What cannot work in a RayJob."""
    if experiment.ray.address:
        raise ConfigError(f"ray.address={experiment.ray.address}: a RayJob brings its own cluster; leave the key out, or use `ray job submit`")
    if experiment.output.overwrite:
        raise ConfigError("output.overwrite=true: every retry of the RayJob would empty what the one before left; set output.overwrite=false")
    if experiment.search.storage:
        raise ConfigError(f"search.storage={experiment.search.storage}: leave it out; the study then lies with the results, where a retry finds it")
    uri = experiment.tracking.uri
    if uri and not uri.startswith(("http://", "https://")):
        shown = redaction.redact_uri(uri)
        raise ConfigError(f"tracking.uri={shown}: pods reach MLflow over http(s) only; leave it out to use the server that the overlay names")
    text = config.dump_yaml(experiment)
    for shown, clean in zip(text.splitlines(), redaction.redact_uri(text).splitlines(), strict=True):
        if shown != clean:
            raise ConfigError(f"the experiment holds a secret, which a ConfigMap must not ({clean.strip()}); put it into a Secret (k8s/secrets)")


def _mounts(job: dict[str, Any]) -> list[str]:
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    return [mount["mountPath"] for mount in head["containers"][0]["volumeMounts"] if mount["name"] in ("results", "cache")]


def _for_pods(experiment: Experiment, mounts: list[str], files: dict[str, str]) -> dict[str, Any]:
    """The experiment as a dict with the paths that pods see; local files are read into `files` by their name in the ConfigMap."""

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {k: walk(v, f"{key}.{k}" if key else k) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v, f"{key}.{i}") for i, v in enumerate(value)]
        if not isinstance(value, str) or not _is_path(value) or any(value.startswith(f"{m}/") for m in mounts):
            return value
        return f"{MOUNT}/{_carry(Path(value), key, mounts, files)}"

    dump = experiment.model_dump(mode="json", exclude={"variables", "output"})
    return walk(dump, "") | {"output": experiment.output.model_dump(mode="json")}


def _is_path(text: str) -> bool:
    """Whether a text is meant as an absolute path: there is something of that name, or it has the form of one."""
    if not text.startswith("/") or "\n" in text or len(text) > 1000:
        return False
    return bool(re.fullmatch(r"/[^\s/]+/\S*", text)) or paths.exists(text)


def _carry(path: Path, key: str, mounts: list[str], files: dict[str, str]) -> str:
    """Read a local file into `files` and return its name there."""
    remedy = (f"copy it to a volume of the pods and name it there ({key}={mounts[-1]}/...), or " if mounts else "") + "use a name of the hub"
    if path.is_dir():
        raise ConfigError(f"{key}={path} is a folder of this machine, which pods do not see; {remedy}")
    if not path.is_file():
        volumes = ", ".join(mounts)
        raise ConfigError(f"{key}={path} is neither a file of this machine nor below a volume of the pods ({volumes}); correct it, or {remedy}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}={path} is not UTF-8 text, so a ConfigMap cannot carry it; {remedy}") from error
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", path.name)
    name = f"{hashlib.sha256(text.encode()).hexdigest()[:8]}-{stem}"[-200:]
    files[name] = text
    return name


def run_name(experiment: Experiment, files: dict[str, str], images: Iterable[str] = ()) -> str:
    """`<experiment>-<hash>`: a DNS label of at most 47 characters, the same for the same experiment, files and images."""
    body = experiment.digest() + "".join(f"{name}\0{text}\0" for name, text in sorted(files.items())) + "".join(sorted(images))
    stem = re.sub(r"[^a-z0-9]+", "-", experiment.name.lower()).strip("-")
    if not stem[:1].isalpha():
        stem = f"run-{stem}".strip("-")
    return f"{stem[: NAME_LIMIT - 9].rstrip('-')}-{hashlib.sha256(body.encode()).hexdigest()[:8]}"


def worker_nodes(job: dict[str, Any]) -> list[dict[str, float]]:
    """What each worker pod offers, in Ray's words: {"CPU": n, "GPU": n}."""
    nodes = []
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        resources = group["template"]["spec"]["containers"][0]["resources"]
        gpus = float((resources.get("limits") or {}).get("nvidia.com/gpu", 0))
        nodes += [{"CPU": float(group["rayStartParams"]["num-cpus"]), "GPU": gpus}] * group["replicas"]
    return nodes


def _fit(experiment: Experiment, job: dict[str, Any], overlay: str) -> list[str]:
    nodes = worker_nodes(job)
    try:
        capacity.plan(experiment, nodes, experiment.search.trials)
    except CapacityError as error:
        raise CapacityError(f"overlay {overlay}: {error}; or take another overlay") from error
    if any(node["GPU"] for node in nodes) and not experiment.ray.use_gpu:
        return [f"overlay {overlay} asks for GPUs that ray.use_gpu=false leaves idle"]
    return []


def _set_images(job: dict[str, Any], image: str | None) -> set[str]:
    """Put `image` wherever the head's is; returns the images that head and workers have then."""
    head = kustomize.split_image(job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"])[0]
    for container in kustomize.containers(job):
        if image is not None and kustomize.split_image(container["image"])[0] == head:
            container["image"] = image
    return {container["image"] for container in kustomize.containers(job["spec"]["rayClusterSpec"])}


def _image_warnings(job: dict[str, Any]) -> list[str]:
    found = []
    for image in sorted({container["image"] for container in kustomize.containers(job)}):
        _, _, digest = kustomize.split_image(image)
        if digest == f"sha256:{'0' * 64}":
            found.append(f"image {image} is a placeholder; build yours (k8s/Dockerfile) and pass --image NAME:TAG@sha256:...")
        elif not PINNED.fullmatch(digest):
            found.append(f"image {image} is not pinned by digest, so what ran cannot be told later; use NAME:TAG@sha256:...")
    return found


def _rename(documents: list[dict[str, Any]], name: str) -> None:
    """Give the run's objects its name, and pods and their selectors its label."""
    for document in documents:
        if document["kind"] not in PER_RUN:
            continue
        document["metadata"]["name"] = name
        document["metadata"].setdefault("labels", {})["safebasin-run"] = name
        spec = document["spec"]
        if document["kind"] == "PodDisruptionBudget":
            spec["selector"]["matchLabels"]["safebasin-run"] = name
            continue
        cluster = spec["rayClusterSpec"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        submitter = [spec["submitterPodTemplate"]] if "submitterPodTemplate" in spec else []
        for template in [*(group["template"] for group in groups), *submitter]:
            template["metadata"]["labels"]["safebasin-run"] = name


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks; texts that YAML 1.2 would read as numbers in quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: Any, text: str) -> Any:
    # PyYAML writes line breaks that YAML 1.1 knows and JSON does not (NEL, LS, PS) as they are and reads them back as others
    odd = re.search("[\r\x85\u2028\u2029\ufeff]", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if odd else "|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def to_yaml(documents: list[dict[str, Any]]) -> str:
    """The documents as one YAML stream."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, explicit_start=True, allow_unicode=True, width=150)


def write(manifests: Manifests, folder: str | Path) -> list[Path]:
    """Write `shared.yaml` and `run.yaml` into `folder`; raises StorageError."""
    parts = {"shared.yaml": manifests.shared, "run.yaml": manifests.run}
    with ownership.active(Path(folder), "render"):
        return [outputs.write_text(Path(folder) / name, to_yaml(documents)) for name, documents in parts.items()]


def check_output(folder: str | Path, experiment: Experiment) -> None:
    """Refuse a folder that is not ours to take, or that holds files of these names which `render` did not write. Raises ConfigError."""
    places.check_output(Path(folder), "render", places.inputs(experiment), field="--output")
