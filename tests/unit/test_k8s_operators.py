"""What operators and a second apply do to the manifests: field ownership, names that several overlays share, disks, rights, components together."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import config
from orchestrator.errors import ConfigError
from orchestrator.verbs import kustomize, render
from tests import k8s_checks as checks
from tests import k8s_custom
from tests.k8s_checks import ADMIN, BUILT, K8S, OVERLAYS, PINS, ROOT, all_pods, containers, job, quantity

COMPONENTS = sorted(path.parent.name for path in K8S.glob("components/*/kustomization.yaml"))
EXAMPLES = sorted(K8S.glob("examples/*.yaml"))
DOCS = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("kubernetes*.md")))
GPU = ["ray.use_gpu=true"]


def overlay_with(folder: Path, name: str, *components: str, storage: str = "storage-pvc") -> Path:
    """A copy of a shipped overlay with other storage and more components, as the docs say to make one."""
    if not (folder / "k8s").exists():
        shutil.copytree(K8S, folder / "k8s")
    file = folder / "k8s" / "overlays" / name / "kustomization.yaml"
    body = yaml.safe_load((K8S / "overlays" / name / "kustomization.yaml").read_text())
    body["components"] = [c.replace("storage-pvc", storage) for c in body.get("components", [])] + [f"../../components/{c}" for c in components]
    file.write_text(yaml.safe_dump(body))
    return file.parent


def variants(folder: Path) -> dict[str, list[checks.Document]]:
    """Every overlay as it is shipped, and those that can with results in a bucket; built."""
    found = {name: BUILT[f"overlays/{name}"] for name in OVERLAYS}
    for name in OVERLAYS[1:]:
        found[f"{name} in a bucket"] = kustomize.build(overlay_with(folder, name, storage="storage-s3"))
    return found


# a second apply


def lists_of(node: Any) -> list[Any]:
    """Every value below `node` that the operator's own types drop when they write the object back: empty texts, lists and mappings."""
    if isinstance(node, dict):
        return [found for value in node.values() for found in lists_of(value)] if node else [node]
    if isinstance(node, list):
        return [found for value in node for found in lists_of(value)] if node else [node]
    return [node] if node == "" else []


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_the_operator_writes_back_is_what_was_applied(name):
    """`workerGroupSpecs` is one value to server-side apply: whatever the operator changes in it is a conflict for the second apply."""
    for group in job(BUILT[f"overlays/{name}"])["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["scaleStrategy"] == {}, "KubeRay adds it"
        assert lists_of({key: value for key, value in group.items() if key != "scaleStrategy"}) == []
        for container in containers(group["template"]["spec"]):
            for amounts in container["resources"].values():
                for value in amounts.values():
                    assert re.fullmatch(r"[1-9][0-9]*(m|Ki|Mi|Gi|Ti)?", value) and not value.endswith("000m"), f"{value} is written back otherwise"


# names that several overlays share


def test_no_two_overlays_say_different_things_of_one_object(tmp_path):
    """What `render` calls shared is the same for every run of a namespace, and can be applied over what another overlay left."""
    seen: dict[tuple[str, str], tuple[str, checks.Document]] = {}
    for name in variants(tmp_path):
        overlay = str(tmp_path / "k8s" / "overlays" / name.split()[0])
        overlay_with(tmp_path, name.split()[0], storage="storage-s3" if "bucket" in name else "storage-pvc")
        gpu = GPU if not name.startswith("local-cpu") else []
        made = render.render(config.load(None, ["output.dir=results", *gpu]), overlay)
        for document in made.shared:
            key = document["kind"], document["metadata"]["name"]
            other, earlier = seen.setdefault(key, (name, document))
            assert list(k8s_custom.changes(earlier, document)) == []
            assert earlier == document, f"{key} differs between {other} and {name}"
    assert {kind for kind, _ in seen} == {"ServiceAccount", "PersistentVolumeClaim", "NetworkPolicy"}, "as docs/kubernetes.md lists it"


def test_a_bucket_changes_no_other_run(tmp_path):
    claims = render.render(config.load(None, ["name=first", *GPU]), "gpu-single")
    bucket = render.render(config.load(None, ["name=second", *GPU]), str(overlay_with(tmp_path, "gpu-single", storage="storage-s3")))
    read = {}
    for made in (claims, bucket):
        for where, _, spec in all_pods([job(made.run)])[1:]:
            (name,) = {reference["name"] for c in containers(spec) for reference in kustomize.config_map_references(c)}
            (found,) = [d for d in made.run if d["kind"] == "ConfigMap" and d["metadata"]["name"] == name]
            read[made.name, where] = found["data"]["SAFEBASIN_RESULTS"]
            assert name.startswith(made.name)
    assert sorted(set(read.values())) == ["/results", "s3://safebasin/results"]
    assert not [d for d in [*claims.shared, *bucket.shared] if d["kind"] == "ConfigMap"]


def test_another_image_is_another_run(tmp_path):
    first, second = (f"ghcr.io/acme/safebasin:1-ray2.60.0-cpu@sha256:{letter * 64}" for letter in "ab")
    names = [render.render(config.load(None), "local-cpu", image).name for image in (first, second, first)]
    assert names[0] == names[2] != names[1]
    light = overlay_with(tmp_path, "local-cpu", "light-submitter")
    made = render.render(config.load(None), str(light), first)
    images = {where.split()[-1]: spec["containers"][0]["image"] for where, _, spec in all_pods([job(made.run)])}
    assert images["head"] == images["workers"] == first and images["submitter"].startswith("quay.io/kuberay/submitter:")
    assert made.name == names[0], "the submitter decides no result"


# disks and memory


def disk(spec: dict[str, Any]) -> tuple[float, float, float]:
    """(emptyDirs on the node's disk, requests, limits) of a pod in bytes; no limit is infinite."""
    dirs = [v["emptyDir"] for v in spec.get("volumes", []) if "emptyDir" in v and v["emptyDir"].get("medium") != "Memory"]
    key, all_of_them = "ephemeral-storage", [c["resources"] for c in spec["containers"]]
    amounts = [(found["requests"].get(key, 0), found["limits"].get(key)) for found in all_of_them]
    limits = [float("inf") if limit is None else quantity(limit) for _, limit in amounts]
    return sum(quantity(d["sizeLimit"]) for d in dirs), sum(quantity(request) for request, _ in amounts), sum(limits)


def test_every_pod_may_fill_its_own_volumes(tmp_path):
    """A pod whose emptyDirs, logs and layers exceed its limit is evicted; 1 GiB is left for the latter two."""
    documents = [d for built in variants(tmp_path).values() for d in built] + BUILT["mlflow"] + BUILT["mlflow-dev"]
    documents += [d for path in EXAMPLES for d in kustomize.documents(path) if "spec" in d and d["kind"] in ("Job", "Deployment")]
    for number, component in enumerate(COMPONENTS):
        (tmp_path / str(number)).mkdir()
        documents += checks.on_base(tmp_path / str(number), component)
    for order in itertools.permutations(["gpu", "storage-s3", "spot"]):
        documents += checks.on_base(tmp_path, *order)
    assert len(all_pods(documents)) > 60
    for where, _, spec in all_pods(documents):
        dirs, requests, limits = disk(spec)
        assert requests <= limits and dirs + 2**30 <= limits, f"{where}: {dirs / 2**30} GiB of volumes, a limit of {limits / 2**30}"
        memory = sum(quantity(v["emptyDir"]["sizeLimit"]) for v in spec.get("volumes", []) if v.get("emptyDir", {}).get("medium") == "Memory")
        assert memory <= sum(quantity(c["resources"]["limits"]["memory"]) for c in spec["containers"]) / 2, where


def order_free(node: Any) -> Any:
    """With lists of tolerations sorted: their order says nothing."""
    if isinstance(node, dict):
        return {k: sorted(v, key=str) if k == "tolerations" else order_free(v) for k, v in node.items()}
    return [order_free(value) for value in node] if isinstance(node, list) else node


TOGETHER = [("gpu", "spot", "storage-s3"), ("gpu", "spot", "kueue"), ("gpu", "keep-head", "light-submitter"), ("gpu", "elastic", "kueue-topology")]


@pytest.mark.parametrize("together", TOGETHER, ids=" ".join)
def test_the_order_of_components_says_nothing(together, tmp_path):
    builds = [order_free(checks.on_base(tmp_path, *order)) for order in itertools.permutations(together)]
    by_name = [{(d["kind"], d["metadata"]["name"]): d for d in build} for build in builds]
    assert all(build == by_name[0] for build in by_name)
    assert {error for d in builds[0] for error in checks.errors(d)} == set()


def test_components_that_contradict_are_refused_by_name(tmp_path):
    keep = overlay_with(tmp_path, "kueue", "keep-head")
    with pytest.raises(ConfigError, match="leave out kueue or keep-head"):
        render.render(config.load(None, GPU), str(keep))
    with pytest.raises(ConfigError, match="shutdownAfterJobFinishes"):
        checks.on_base(tmp_path, "keep-head", "kueue")
    both = overlay_with(tmp_path, "gpu-single", "keep-head", "elastic")
    with pytest.raises(ConfigError, match="leave out elastic or keep-head"):
        render.render(config.load(None, GPU), str(both))
    for folder in (keep, both):
        assert any("rule" in error for d in kustomize.build(folder) for error in checks.errors(d)), "the check knows it as well"


def test_a_queued_cluster_grows_only_with_kueue_s_annotation(tmp_path):
    documents = checks.on_base(tmp_path, "kueue", "elastic")
    assert {error for d in documents for error in checks.errors(d)} == set()
    del job(documents)["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"]
    assert ["rule of Kueue's webhook" in error for error in checks.errors(job(documents))] == [True]


def test_each_new_component_does_what_it_says(tmp_path):
    base = job(BUILT["base"])["spec"]
    kept = job(checks.on_base(tmp_path, "keep-head"))["spec"]
    rules = {(r["policy"], *r["condition"].items()) for r in kept["deletionStrategy"]["deletionRules"]}
    assert "shutdownAfterJobFinishes" not in kept and len(rules) == 6
    light = job(checks.on_base(tmp_path, "light-submitter"))["spec"]["submitterPodTemplate"]["spec"]["containers"][0]
    assert light["command"] == ["/submitter"] and " ".join(light["args"]) == f"-- {base['entrypoint']}"
    scaled = checks.on_base(tmp_path, "elastic")
    head = job(scaled)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert head["automountServiceAccountToken"] is True, "the autoscaler asks the API server"
    assert ("ServiceAccount", head["serviceAccountName"]) in {(d["kind"], d["metadata"]["name"]) for d in scaled}
    assert head["serviceAccountName"] != "safebasin", "workers get none of its rights"
    group = job(scaled)["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert group["minReplicas"] <= group["replicas"] < group["maxReplicas"]
    near = job(checks.on_base(tmp_path, "kueue-topology"))["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["metadata"]["annotations"]
    topology, flavor = (next(d for d in BUILT[ADMIN[1]] if d["kind"] == kind) for kind in ("Topology", "ResourceFlavor"))
    assert near["kueue.x-k8s.io/podset-preferred-topology"] in {level["nodeLabel"] for level in topology["spec"]["levels"]}
    assert flavor["spec"]["topologyName"] == topology["metadata"]["name"]


def test_the_nightly_job_can_run(tmp_path):
    documents = checks.on_base(tmp_path, "nightly", "nightly/alert", "storage-pvc")
    assert {f"{d['kind']}: {error}" for d in documents for error in checks.errors(d)} == set()
    nightly, rule = (next(d for d in documents if d["kind"] == kind) for kind in ("RayCronJob", "PrometheusRule"))
    spec = nightly["spec"]["jobTemplate"]
    named = {(kind, name) for _, _, pod in all_pods([nightly]) for kind, name, _, _ in checks.references(pod) if kind != "Secret"}
    assert named <= {(d["kind"], d["metadata"]["name"]) for d in documents}
    arguments = spec["entrypoint"].split()
    assert arguments[:2] == ["safebasin", "evaluate"] and "--baseline" in arguments, "without a baseline there is no verdict"
    (policy,) = [d["data"]["policy.yaml"] for d in documents if d["metadata"]["name"] == "safebasin-nightly" and d["kind"] == "ConfigMap"]
    (tmp_path / "policy.yaml").write_text(policy)
    assert config.load(tmp_path / "policy.yaml", [a for a in arguments if re.match(r"\w+\.\w+=", a)]).safety.limits
    names = {r["expr"] for group in rule["spec"]["groups"] for r in group["rules"]}
    assert any(nightly["metadata"]["name"] in expression for expression in names)
    assert spec["rayClusterSpec"]["rayVersion"] == PINS["ray"]
    images = [{c["image"] for _, _, pod in all_pods(found) for c in containers(pod)} for found in ([nightly], BUILT["base"])]
    assert images[0] == images[1]


# rights, probes, names, places


def test_the_role_may_do_what_the_docs_ask_for(tmp_path):
    role = next(d for d in kustomize.documents(K8S / "role.yaml") if d["kind"] == "Role")
    assert {error for d in kustomize.documents(K8S / "role.yaml") for error in checks.errors(d)} == set()
    full = [rule for rule in role["rules"] if {"create", "patch", "delete", "get"} <= set(rule["verbs"])]
    may = {(group, kind) for rule in full for group in rule["apiGroups"] for kind in rule["resources"]}
    documents = [d for built in variants(tmp_path).values() for d in built]
    for number, component in enumerate([*COMPONENTS, "nightly/alert", "elastic/networkpolicy"]):
        (tmp_path / str(number)).mkdir()
        documents += checks.on_base(tmp_path / str(number), component)
    for document in documents:
        group = document["apiVersion"].rpartition("/")[0]
        plural = re.sub(r"y$", "ie", document["kind"].lower()) + "s"
        assert (group, plural) in may, f"nobody may make {document['kind']}"


def test_every_probe_says_how_long_it_waits():
    probes = [(where, kind, c[kind]) for built in BUILT.values() for where, _, spec in all_pods(built) for c in containers(spec)
              for kind in ("startupProbe", "readinessProbe", "livenessProbe") if kind in c]  # fmt: skip
    assert probes and not [(where, kind) for where, kind, probe in probes if probe.get("timeoutSeconds", 1) < 3], "the default is a second"


def test_every_policy_that_lets_names_be_asked_lets_the_node_s_cache_answer():
    """NodeLocal DNSCache listens on a link-local address of the node, which no namespace's label reaches."""
    policies = [d for built in (*BUILT.values(), *([d] for d in BUILT["mlflow-dev"])) for d in built if d["kind"] == "NetworkPolicy"]
    rules = [rule for d in policies for rule in d["spec"].get("egress", []) if any(port.get("port") == 53 for port in rule.get("ports", []))]
    assert rules
    for rule in rules:
        assert {"cidr": "169.254.20.10/32"} in [peer.get("ipBlock") for peer in rule["to"]]
        assert {port["protocol"] for port in rule["ports"]} == {"UDP", "TCP"}


def test_placeholders_and_programs_are_named_in_the_docs():
    images = {c["image"] for built in BUILT.values() for _, _, spec in all_pods(built) for c in containers(spec)}
    for name in {kustomize.split_image(image)[0] for image in images if image.endswith("0" * 64)}:
        assert name in DOCS, f"{name} has a placeholder for a digest, and docs/kubernetes.md does not say how to replace it"
    needs = DOCS.split("You need ", 1)[1].split("\n\n")[0]
    for program in ("kubectl", "helm", "docker"):
        assert program in needs
    assert "kustomize edit" not in DOCS


def test_the_tracking_server_of_the_docs_has_no_placeholder(tmp_path):
    """Step 4 as it is written there: the folder it makes, built."""
    text = DOCS.split("cat > k8s/my-mlflow/kustomization.yaml <<EOF\n", 1)[1].split("\nEOF\n", 1)[0]
    (tmp_path / "k8s").mkdir()
    for name in ("mlflow", "mlflow-dev"):
        (tmp_path / "k8s" / name).symlink_to(K8S / name)
    folder = tmp_path / "k8s" / "my-mlflow"
    folder.mkdir()
    (folder / "kustomization.yaml").write_text(text.replace("$REG", "ghcr.io/acme").replace("DIGEST", "ab" * 32))
    documents = kustomize.build(folder)
    images = {c["image"] for _, _, spec in all_pods(documents) for c in containers(spec)}
    assert images == {f"ghcr.io/acme/safebasin-mlflow@sha256:{'ab' * 32}", "docker.io/library/postgres:17-bookworm"}
    assert {error for d in documents for error in checks.errors(d)} == set()


def test_versions_are_said_alike():
    everything = "\n".join(path.read_text() for path in [*K8S.rglob("*.yaml"), *K8S.rglob("*.md")]) + DOCS
    assert set(re.findall(r"kuberay-operator --version (\S+)", everything)) == {"1.7.1"}
    assert set(re.findall(r"[?]ref=v(\S+?)[\"`]", everything)) == {"1.7.1"} and "kuberay/submitter:v1.7.1" in everything
    assert "1.5.1" not in DOCS and "1.6.0" in DOCS


def test_the_examples_hold_together():
    """The Job is checked as a server would; the others are of kinds whose schemas we do not have, so only what they name of ours is."""
    by_name = {path.name: kustomize.documents(path) for path in EXAMPLES}
    assert set(by_name) == {"operator-values.yaml", "argocd.yaml", "flux.yaml", "release-gate.yaml", "check.yaml"}
    assert all(name in DOCS for name in by_name)
    assert {error for d in by_name["check.yaml"] for error in checks.errors(d)} == set()
    assert {error for d in by_name["release-gate.yaml"] for error in checks.errors(d)} == set()
    policy, gate = by_name["release-gate.yaml"]
    container = gate["spec"]["template"]["spec"]["containers"][0]
    (rule,) = [r for r in gate["spec"]["podFailurePolicy"]["rules"] if r["action"] == "FailJob"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2, 3]}
    assert container["image"] == job(BUILT["base"])["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
    assert config.from_dict(yaml.safe_load(policy["data"]["policy.yaml"])).safety.limits
    (application,) = by_name["argocd.yaml"]
    assert {d["kind"] for d in application["spec"]["ignoreDifferences"]} <= {d["kind"] for built in BUILT.values() for d in built}
    annotations = job(BUILT["base"])["metadata"]["annotations"]
    assert int(annotations["argocd.argoproj.io/sync-wave"]) > 0, "after what its pods read, which bears none"
    assert by_name["operator-values.yaml"][0]["env"] == [{"name": "RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS", "value": "1800"}]
