"""`safebasin check`: the release gate. A policy is held against measured evidence; what comes out is a verdict and a file that says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import __version__
from orchestrator.errors import ConfigError, SafebasinError
from orchestrator.experiment import places
from orchestrator.models import contents, subjects
from orchestrator.report import figures
from orchestrator.storage import files, ownership
from orchestrator.storage.paths import folder_name
from orchestrator.terminal import screen
from orchestrator.tracking import connect
from orchestrator.verbs import check_evidence, check_policy, check_rules, check_seal
from orchestrator.verbs.check_evidence import Evidence, Weights
from orchestrator.verbs.check_policy import Policy
from orchestrator.verbs.check_rules import Finding

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Request:
    """What is to be released, by which policy, and where the evidence file goes."""

    target: str
    """Folder of a run, of an evaluation, or of a model."""
    policy: str
    evidence: str | None = None
    """Folder of the evidence, where the model does not lie in it."""
    base: str | None = None
    """What an adapter is put on, where its own name of it leads nowhere here."""
    output: Path | None = None
    """Folder of the evidence file; `outputs/check-<target>` without it."""
    overwrite: bool = False
    key: bytes | None = None

    @property
    def folder(self) -> Path:
        return self.output if self.output is not None else Path("outputs") / f"check-{subjects.slug(self.target)}"


@dataclass(frozen=True)
class Checked:
    """The verdict and what it rests on."""

    policy: Policy
    found: Evidence
    now: Weights
    findings: tuple[Finding, ...]
    body: dict[str, Any]
    """Content of the evidence file."""

    @property
    def passed(self) -> bool:
        return passed(self.findings)


def passed(findings: Sequence[Finding]) -> bool:
    """Whether every rule is kept; no rules keep nothing."""
    return bool(findings) and all(one.passed for one in findings)


def check(request: Request, today: datetime | None = None) -> Checked:
    """Hold the policy against the evidence; nothing is written.

    Raises ConfigError for a policy or a folder that cannot be used, SafebasinError for evidence that is damaged or holds no model to release.
    """
    policy = check_policy.load(request.policy)
    found, model = check_evidence.find(request.target, request.evidence)
    now = check_evidence.weights(model, found, request.base)
    moment = today or datetime.now(UTC)
    made = tuple(check_rules.findings(policy, found, now, moment, check_evidence.defences(found)))
    return Checked(policy, found, now, made, check_seal.sealed(_body(policy, found, now, made, moment), request.key))


def _body(policy: Policy, found: Evidence, now: Weights, made: Sequence[Finding], moment: datetime) -> dict[str, Any]:
    return {
        "format": check_seal.FORMAT, "made_by": f"safebasin {__version__} check", "checked_at": moment.isoformat(timespec="seconds"),
        "passed": passed(made),
        "model": {"name": now.name, "sha256": now.digest, "files": now.files, "base": now.base},
        "untouched": found.untouched, "conditions": _conditions(found),
        "suites": {name: _suite(suite) for name, suite in found.own.suites.items()},
        "measured_at": {one.trial_id: _iso(check_evidence.taken_at(one)) for one in found.measured},
        "records": found.records, "policy": {**policy.plain, "sha256": policy.digest}, "rules": [asdict(one) for one in made],
    }  # fmt: skip


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


def _conditions(found: Evidence) -> dict[str, Any]:
    """Under which the figures hold."""
    template = found.own.facts.get("template") or {}
    return {
        "evidence": found.kind, "system_prompt": template.get("evaluation_system_prompt"), "template": template.get("hash"),
        "max_new_tokens": found.experiment.safety.max_new_tokens, "decoding": "greedy",
    }  # fmt: skip


def _suite(suite: Any) -> dict[str, Any]:
    return {
        "sha256": suite.source.get("sha256"), "data": suite.source.get("data"), "kind": suite.kind, "attack": suite.attack,
        "language": check_rules.language_of(suite), "prompts": len(suite.ids), "requests": suite.request_count, "judge": suite.judge,
    }  # fmt: skip


def check_output(request: Request) -> None:
    """Refuse a folder that the evidence file must not go into, before anything is read. Raises ConfigError."""
    folder_name(request.folder, "--output")
    read = [(what, path) for what, name in (("the evidence", request.evidence or request.target), ("the model", request.target))
            if (path := places.local(name)) is not None]  # fmt: skip
    try:
        places.check_output(request.folder, "check", read, field="--output", result=check_seal.FILE, overwrite=request.overwrite)
    except SafebasinError as error:
        raise type(error)(str(error).replace("output.overwrite=true", "--overwrite")) from None


def write(made: Checked, folder: Path) -> Path:
    """Write `evidence.json`; its path. Raises StorageError."""
    with ownership.active(folder, "check"):
        return files.write_text(folder / check_seal.FILE, check_seal.written(made.body))


def show(findings: Sequence[Finding], console: Console) -> None:
    """Every rule with its limit, on what it was measured, and its figure; those that failed last."""
    table = screen.Grid(box=None, padding=(0, 1), collapse_padding=True, header_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("rule", overflow="fold", max_width=38)
    table.add_column("figure", overflow="fold")
    for one in sorted(findings, key=lambda one: not one.passed):
        rule = f"{one.rule} {bound(one)}".strip() + (f"\n  {one.on}" if one.on else "")
        table.add_row(screen.styled("ok" if one.passed else "FAIL", "green" if one.passed else "bold red"), rule, said(one))
    screen.show(console, table)


def said(one: Finding) -> str:
    """A rule's figure, and why it is not kept."""
    parts = [figures.figure(one.figure, signed=one.rule.endswith(("max_rise", "max_drop")))] if one.figure is not None else []
    return "; ".join([*parts, one.text] if one.text else parts)


def bound(one: Finding) -> str:
    return "" if one.limit is None else f"{'>=' if one.least else '<='} {one.limit:g}"


def sentence(made: Checked) -> str:
    """The verdict in a sentence."""
    failed = list(dict.fromkeys(one.rule for one in made.findings if not one.passed))
    what = f"{made.now.name} by {made.policy.name}"
    if not failed:
        return f"PASSED: {what}; {len(made.findings)} rules, each kept"
    return f"FAILED: {what}; {len([one for one in made.findings if not one.passed])} of {len(made.findings)} rules are not kept: {', '.join(failed)}"


def conditions(made: Checked) -> list[str]:
    """What the figures rest on and a release must keep, a sentence each."""
    known = made.body["conditions"]
    prompt = "without a system prompt" if known["system_prompt"] is None else f"under the system prompt {known['system_prompt']!r:.120}"
    lines = [f"the figures hold {prompt}, greedy, at most {known['max_new_tokens']} tokens"]
    return lines + ([f"an adapter: release it with the base it was measured on, {made.now.base['name']}"] if made.now.base else [])


def check_register(name: str) -> None:
    """Refuse a name that MLflow's registry does not take. Raises ConfigError."""
    if not connect.REGISTERED.fullmatch(name):
        raise ConfigError(f"--register {name!r:.60} cannot be a registered model's name; give 1 to 200 characters, none of them / : . % or a quote")


def register(made: Checked, name: str, evidence: Path) -> str:
    """Point the registry's alias to the model where it passed, else leave it; a sentence on it. Raises TrackingError."""
    if not made.passed:
        return f"MLflow: the check did not pass, so {connect.SAFE_BEST} of {name} was not moved"
    if made.now.digest is None:
        raise ValueError("a model without files cannot have passed")
    folder = Path(made.now.name).expanduser()
    return connect.release(made.found.experiment, made.found.folder, connect.Release(name, folder, evidence, made.now.digest))


@dataclass(frozen=True)
class Verified:
    """What became of an evidence file."""

    body: dict[str, Any]
    trouble: tuple[str, ...]
    """Why the release is not shown, a sentence each; empty where it is."""
    notes: tuple[str, ...]


def verify(file: str, request: Request | None, model: str | None, key: bytes | None, today: datetime | None = None) -> Verified:
    """Whether an evidence file is as it was written, passed, is not too old now, and is of this model, policy and evidence where they are named.

    `request`: policy and evidence folder to compare with, either of them empty for none. Raises Broken, ConfigError.
    """
    body = check_seal.read(file, key)
    policy = check_policy.from_dict({name: value for name, value in body["policy"].items() if name != "sha256"}, f"the policy in {file}")
    moment, trouble, notes = today or datetime.now(UTC), [], []
    failed = [str(one["rule"]) for one in body["rules"] if not one["passed"]]
    if failed or not body["passed"] or not body["rules"]:
        trouble.append(f"the check did not pass ({', '.join(dict.fromkeys(failed)) or 'no rule is in it'})")
    if policy.age is not None:
        aged = check_rules.aged([_moment(one) for one in body["measured_at"].values()], policy.age.max_days, moment)
        trouble += [] if aged.passed else [f"the evidence is too old by now: {aged.text}, at most {policy.age.max_days:g} days are allowed"]
    if request is not None and request.policy and check_policy.load(request.policy).digest != policy.digest:
        trouble.append(f"it was checked by another policy than {request.policy}")
    if model is not None:
        base = (request.base if request else None) or body["model"]["base"].get("name")
        trouble += _other_model(body, check_evidence.weights(model, None, base))
    else:
        notes.append("no MODEL was named, so no weights were looked at")
    if request is not None and request.evidence:
        trouble += _other_evidence(body, policy, request, moment)
    if key is None:
        notes.append("sealed without a key: this shows damage, not forgery")
    return Verified(body, tuple(trouble), tuple(notes))


def _moment(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text))
    except ValueError:
        return None


def _other_model(body: dict[str, Any], now: Weights) -> list[str]:
    if not now.files:
        return [f"{now.name} is no folder here, so its files were not compared"]
    lines = contents.differences(body["model"]["files"], now.files)
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    told = [f"{now.name} is not the model that was checked: {', '.join(lines[:3])}{more}"] if lines else []
    if body["model"]["base"].get("hash") != now.base.get("hash"):
        told.append(now.trouble or "the adapter's base is another one than it was checked on; name the right one with --base")
    return told


def _other_evidence(body: dict[str, Any], policy: Policy, request: Request, moment: datetime) -> list[str]:
    """What differs where the figures are taken again from their records."""
    found, _ = check_evidence.find(request.evidence or "")
    lines = contents.differences(body["records"], found.records)
    if lines:
        return [f"the records in {request.evidence} are not those that were checked: {', '.join(lines[:3])}"]
    now = Weights(body["model"]["name"], body["model"]["files"], body["model"]["base"])
    again = check_rules.findings(policy, found, now, moment, check_evidence.defences(found))
    told = [one for one in map(files.plain, map(asdict, again)) if one["rule"] != "age.max_days"]
    if told == [one for one in body["rules"] if one["rule"] != "age.max_days"]:
        return []
    return ["its figures are not those that its records give now; check again with this version"]
