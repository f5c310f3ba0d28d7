"""The names that safebasin makes in a folder, by kind of folder, and the forms of what workers, Ray and MLflow put into them."""

from __future__ import annotations

import re

_PICTURES = ("plots/",)
_CHANGES = ("transitions.csv", "flipped.csv", "categories.csv")
_RUN = (
    ".running.lock", "run.json", "config.resolved.yaml", "baseline.json", "trials.csv", "trials/", "trained/", "ray/", "model/", ".model.partial/",
    "best.json", "best.yaml", "report.html", "report.md", "tables/", "study.journal", "study.journal.lock", "tracking.json",
    "tracking.spool.jsonl", "tracking.spool.rejected.jsonl", "tracking.spool.old.jsonl",
    "tracking.spool.skipped", "tracking.spool.old.skipped", "reproduction.json", *_CHANGES, *_PICTURES,
)  # fmt: skip
LAYOUT: dict[str, tuple[str, ...]] = {
    "run": _RUN,
    "mirror": (*_RUN, "workers/", ".mirror.json", ".theirs/", "mlflow.db", "mlflow.db.lock", "mlartifacts/", "*"),
    "evaluation": (
        "evaluation.json", "evaluation.html", "rates.csv", "generations.jsonl", "generations-baseline.jsonl", *_CHANGES, *_PICTURES,
    ),
    "comparison": ("comparison.csv", "comparison.html", *_PICTURES),
    "basin": ("basin.json", "basin.html", *_PICTURES),
    "check": ("evidence.json",),
    "report": ("report.html", "report.md", "tables/", *_CHANGES, *_PICTURES),
    "render": ("shared.yaml", "run.yaml"),
    "locate": ("safety_layers.json", "safety_layers.png"),
    "model": ("*",),
    "pocket": ("report.json", "model/", "unaligned/", "suites/", "data/"),
}  # fmt: skip
"""Kind of a folder -> the names a command may make in it, a folder's with a slash at its end. "*": any."""

WORKERS = ("trials/", "trained/", "workers/")
"""What workers make in this machine's copy of an address, also while the driver, and its list, is on another machine."""
LINKS = ("study.journal.lock",)
"""Names of ours that are made as links."""
MODEL = "model/"
"""Of a run; has a list of its own, so that a model which somebody puts in its place is not taken for ours."""
_TRIAL = r"((?:workers/rank-\d+/)?trials/[^/]+/)"
_MODEL = (
    r"(?:(?:config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|preprocessor_config|safebasin)"
    r"\.json|(?:adapter_)?model[\w.-]*\.safetensors(?:\.index\.json)?|merges\.txt|vocab\.txt|spiece\.model|tokenizer\.model|sentencepiece[\w.]*"
    r"|chat_template\.(?:jinja|json)|README\.md|\.safebasin\.model\.json)"
)
SHAPES = tuple(
    re.compile(pattern)
    for pattern in (
        _TRIAL + r"(?:spec\.json|result\.json|result\.failed-\d+\.json|generations\.jsonl)",
        _TRIAL + r"(?:checkpoint|good|model)/",
        _TRIAL + r"(?:checkpoint|good)/\.?(?:latest|previous)[^/]*",
        _TRIAL + r"(?:checkpoint|good)/\.?step-\d+[^/]*/(?:.*)",
        _TRIAL + r"\.?model(?:\.partial)?/" + _MODEL + "?",
        r"(workers/)rank-\d+/(?:.*)",
        r"((?:workers/rank-\d+/)?trained/)[0-9a-f]{16}/(?:weights\.safetensors|facts\.json|\.weights\.\d+)?",
        r"(ray/)(?:search|lane-\d+)(?:-[^/]*)?/(?:.*)",
        r"(ray/)\.validate_storage_marker",
        r"(mlartifacts/)(?:.*)",
        r"(\.model\.partial/)(?:.*)",
        r"(\.theirs/)config\.resolved\.yaml",
    )
)
"""Forms of what workers, Ray and MLflow put below folders of a run; the first group is the folder that must be on the list."""
ADDRESS_SHAPES = (*SHAPES, re.compile(_TRIAL + r"model/(?:.*)"))
"""The same below an address, where a model has no list of its own."""


def marker_name(kind: str) -> str:
    return ".safebasin.json" if kind in ("run", "mirror") else f".safebasin.{kind}.json"


def known(kind: str, name: str) -> bool:
    """Whether a command of this kind may make a name (a folder's ends in a slash)."""
    layout = LAYOUT[kind]
    if "*" in layout:
        return True
    top, slash, _ = name.partition("/")
    return top + slash in layout
