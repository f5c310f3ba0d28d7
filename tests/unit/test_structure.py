"""The arrows of the architecture, held by walking the imports: one vendor, one door; nothing runs backwards."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("orchestrator", "strategies", "search_spaces")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

DOORS = {
    "ray": {
        "orchestrator/search.py", "orchestrator/lanes.py", "orchestrator/cluster.py", "orchestrator/lane_worker.py",
        "orchestrator/lane_control.py", "orchestrator/lane_pool.py", "orchestrator/submit.py",
    },
    "deepspeed": {"orchestrator/engine.py"},
    "vllm": {"orchestrator/evaluation/vllm_backend.py"},
    "mlflow": {"orchestrator/tracking_sink.py"},
    "pyarrow": {"orchestrator/storage.py"},
    "optuna": {
        "orchestrator/search.py", "orchestrator/searcher.py", "orchestrator/study_journal.py", "orchestrator/points.py", "orchestrator/ranges.py",
        "search_spaces/",
    },
}  # fmt: skip
"""vendor -> files that may import it; a name ending in / is a folder."""

# a module may import those of its own level or lower
LEVELS = (
    {"cli", "__main__"},
    {"completion", "doctor", "listing", "submit", "render", "locating", "cli_models", "config_docs"},
    {"comparing"},
    {"evaluating", "evaluating_report", "basin", "basin_report"},
    {"page"},
    {"experiment"},
    {"run_state"},
    {
        "search", "searcher", "study_journal", "trial_records", "run_identity", "report", "summary", "tracking", "tracker",
        "tracking_sink", "tracking_values", "spool", "handover", "progress", "baseline", "checks", "checks_tokens", "checks_settings",
        "resuming", "mirror", "mirror_files", "mirror_objects", "run_folder",
    },
    {"lanes", "plots_safety"},
    {"plots"},
    {"plots_monitor"},
    {"lane_pool"},
    {"broker", "lane_worker", "lane_control", "capacity", "cluster", "cluster_start", "cluster_folder", "cluster_reach", "cluster_watch"},
    {"trial"},
    {"training", "trained", "trial_files", "memory"},
    {"points"},
    {"guard", "materials", "contamination", "constraint", "summary", "ranges", "templates"},
    {"intervals"},
    {"weights", "subjects", "model_checks"},
    {"engine", "evaluation", "models", "adapters", "saved", "data"},
    {"pocket"},
    {"storage", "lease", "shared_cache"},
    {"record_check", "faults", "loading_report"},
    {"outputs", "records", "evidence", "places"},
    {"config", "config_text", "overrides", "kustomize"},
    {"config_sections"},
    {"crash", "screen"},
    {"redaction"},
    {"engine_config"},
    {"engine_keys", "field_kinds"},
    {"yaml_text", "config_words"},
    {"addresses", "hub", "model_folders", "paths", "template_limits", "template_rows"},
    {"ownership_checks", "sealing"},
    {"ownership"},
    {"atomic", "disk_space", "nofollow", "ownership_names", "folder_stamps"},
    {"cachedir", "cells", "counted", "overlap", "errors", "folding", "misspelt", "seeds", "streams", "template_child", "texts"},
)


def imports(path: Path) -> list[str]:
    """Dotted names that a file imports anywhere, `from a import b` as `a.b`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_one_vendor_one_door(path):
    name = path.relative_to(ROOT).as_posix()
    for imported in imports(path):
        doors = DOORS.get(imported.split(".")[0])
        assert doors is None or any(name == door or (door.endswith("/") and name.startswith(door)) for door in doors), f"{name} imports {imported}"


def test_strategies_and_spaces_know_nothing_of_ours():
    for path in FILES:
        package = path.relative_to(ROOT).parts[0]
        if package == "orchestrator":
            continue
        other = {"strategies": "search_spaces", "search_spaces": "strategies"}[package]
        for imported in imports(path):
            assert imported.split(".")[0] not in {"orchestrator", other}, f"{path} imports {imported}"


def test_a_strategy_imports_no_other_strategy():
    import strategies

    for name in strategies.STRATEGIES:
        for imported in imports(ROOT / "strategies" / f"{name}.py"):
            part = imported.split(".")[1] if imported.startswith("strategies.") else ""
            assert part not in strategies.STRATEGIES, f"{name} imports {imported}"


def test_arrows_run_one_way():
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] != "orchestrator":
            continue
        own = level.get(parts[1])
        for imported in imports(path):
            target = imported.split(".")[1] if imported.startswith("orchestrator.") else None
            if own is not None and target in level:
                assert level[target] >= own, f"{'/'.join(parts)} (level {own}) imports {imported} (level {level[target]})"


@pytest.mark.parametrize("module", ["orchestrator.cli", "orchestrator.config", "orchestrator.records", "orchestrator.errors", "orchestrator.pocket"])
def test_light_modules_stay_light(module):
    heavy = "torch ray mlflow deepspeed transformers peft optuna datasets scipy matplotlib".split()
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_no_file_swallows_errors():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                assert not all(isinstance(line, ast.Pass) for line in node.body), f"{path}:{node.lineno} swallows an exception"


def test_every_module_says_what_it_is():
    for path in FILES:
        if path.stat().st_size:
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
