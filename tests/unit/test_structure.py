"""The arrows of the architecture, held by walking the imports: every module on a floor, one vendor one door, no circle, nothing private
of another."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("orchestrator", "strategies", "search_spaces")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

FLOORS = (
    {"errors", "redaction", "records", "faults", "texts", "peers"},
    {"storage"},
    {"terminal"},
    {"config", "pocket"},
    {"data", "models", "decision"},
    {"evaluation", "lanes"},
    {"report", "trial", "search"},
    {"tracking"},
    {"experiment"},
    {"verbs"},
    {"cli", "api", "__main__"},
)
"""Folders and files of orchestrator/, low to high: one may import its own floor and lower ones."""

DOORS = {
    "ray": ("orchestrator/lanes/", "orchestrator/search/tune.py", "orchestrator/verbs/submit.py"),
    "deepspeed": ("orchestrator/trial/engine/",),
    "vllm": ("orchestrator/evaluation/generate_vllm.py",),
    "mlflow": ("orchestrator/tracking/mlflow.py",),
    "pyarrow": ("orchestrator/storage/buckets.py",),
    "optuna": ("orchestrator/search/", "search_spaces/"),
}
"""vendor -> files that may import it; a name ending in / is a folder."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path) -> list[str]:
    """Dotted names that a file imports anywhere, `from a import b` as `a.b`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def target(name: str) -> str | None:
    """The module of ours that an imported name lies in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


ARROWS = {module: {one for name in imports(path) if (one := target(name)) not in (None, module)} for module, path in MODULES.items()}


def place(module: str) -> str:
    """The folder or file of orchestrator/ that a module lies in."""
    return module.split(".")[1]


def test_every_module_stands_on_a_floor():
    placed = set().union(*FLOORS)
    assert sum(map(len, FLOORS)) == len(placed)
    found = {place(module) for module in MODULES if module.startswith("orchestrator.")}
    assert found == placed


def test_arrows_lead_down():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    for module, targets in ARROWS.items():
        if not module.startswith("orchestrator."):
            continue
        for one in targets:
            if one.startswith("orchestrator."):
                assert floor[place(one)] <= floor[place(module)], f"{module} imports {one}, which stands higher"


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups that can be reached from themselves."""
    reached = {name: set(targets) for name, targets in arrows.items()}
    changed = True
    while changed:
        changed = False
        for targets in reached.values():
            more = set().union(*(reached.get(one, set()) for one in targets)) - targets
            if more:
                targets |= more
                changed = True
    return sorted({tuple(sorted(other for other in reached[name] if name in reached.get(other, ()))) for name in arrows if name in reached[name]})


def test_no_two_files_import_each_other():
    assert circles(ARROWS) == []


def test_no_two_folders_import_each_other():
    folders: dict[str, set[str]] = {}
    for module, targets in ARROWS.items():
        if module.startswith("orchestrator."):
            own = folders.setdefault(place(module), set())
            own |= {place(one) for one in targets if one.startswith("orchestrator.")} - {place(module)}
    assert circles(folders) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_one_vendor_one_door(path):
    name = path.relative_to(ROOT).as_posix()
    for imported in imports(path):
        doors = DOORS.get(imported.split(".")[0])
        assert doors is None or any(name == door or (door.endswith("/") and name.startswith(door)) for door in doors), f"{name} imports {imported}"


def test_strategies_and_spaces_know_nothing_of_ours():
    allowed = {"strategies": {"strategies"}, "search_spaces": {"search_spaces"}}
    for module, targets in ARROWS.items():
        package = module.split(".")[0]
        if package in allowed:
            assert {one.split(".")[0] for one in targets} <= allowed[package], module


def test_a_strategy_imports_no_other_strategy():
    import strategies

    for name in strategies.STRATEGIES:
        for one in ARROWS[f"strategies.{name}"]:
            assert one.removeprefix("strategies.") not in strategies.STRATEGIES, f"{name} imports {one}"


def test_nothing_private_is_taken_from_another_file():
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        names = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    assert not (target(full) and alias.name.startswith("_") and not alias.name.startswith("__")), f"{module} imports {full}"
                    if full in MODULES:
                        names[alias.asname or alias.name] = full
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                assert not private, f"{module}:{node.lineno} takes {names[node.value.id]}.{node.attr}"


@pytest.mark.parametrize("module", ["orchestrator", *(f"orchestrator.{name}" for name in ("cli", "config", "records", "errors", "pocket"))])
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
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_no_file_is_longer_than_400_lines():
    long = {module: count for module, path in MODULES.items() if (count := len(path.read_text().splitlines())) > 400}
    assert not long
