"""Files of a run: atomic, free of NaN, and honest when the disk is full or closed."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import StorageError
from orchestrator.records import TaskResult, TrialResult
from orchestrator.report import table
from orchestrator.storage import files


@dataclass(frozen=True)
class FakeEstimate:
    value: float
    lower: float
    upper: float


@dataclass(frozen=True)
class FakeJudgement:
    verdict: str
    asr: float | None
    over_refusal: float | None
    degradation: FakeEstimate | None
    over_refusal_rise: FakeEstimate | None


def result(**changes) -> TrialResult:
    fields = {"trial_id": "t0001", "recipe": "lora", "params": {"learning_rate": 1e-3, "lora.lora_r": 8}, "seed": 0, "phase": "search"}
    fields |= {"state": "complete", "task": TaskResult("exact_match", 0.75, [1.0, 0.5], ["a", "b"]), "seconds": {"total": 12.5}}
    return TrialResult(**(fields | changes))


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_trials_csv_has_the_documented_columns_then_params(tmp_path):
    judged = FakeJudgement("undecided", 0.06, 0.1, FakeEstimate(0.04, -0.01, 0.09), FakeEstimate(0.0, -0.02, 0.02))
    failed = result(trial_id="t0002", recipe="full", params={"learning_rate": 1e-2}, state="failed", task=None, seconds={})
    path = table.write_trials_csv(tmp_path / "trials.csv", [table.trial_row(result(), judged), table.trial_row(failed, None)])
    header = path.read_text().splitlines()[0].split(",")
    assert header == [*table.TRIAL_COLUMNS, "params.learning_rate", "params.lora.lora_r"]
    first, second = read(path)
    assert (first["degradation"], first["degradation_lower"], first["degradation_upper"]) == ("0.04", "-0.01", "0.09")
    assert first["params.lora.lora_r"] == "8" and first["verdict"] == "undecided" and first["seconds"] == "12.5"
    # what was not measured stays empty: no zero may look like "no degradation"
    assert second["task_score"] == second["asr"] == second["degradation"] == second["params.lora.lora_r"] == ""


def test_trials_csv_without_rows_is_its_header(tmp_path):
    assert table.write_trials_csv(tmp_path / "t.csv", []).read_text() == ",".join(table.TRIAL_COLUMNS) + "\n"


def test_trials_csv_refuses_a_column_nobody_documented(tmp_path):
    with pytest.raises(ValueError, match="no column 'oops'"):
        table.write_trials_csv(tmp_path / "t.csv", [{"trial_id": "t1", "oops": 1}])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=15,
)


@given(json_values)
def test_plain_json_is_strict_and_keeps_everything_finite(value):
    def reject(name):
        raise AssertionError(f"{name} in JSON")

    back = json.loads(json.dumps(files.plain(value)), parse_constant=reject)

    def same(a, b):
        if isinstance(a, float):
            return (b is None) if (a != a or abs(a) == float("inf")) else a == b
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        return a == b

    assert same(value, back)


def test_plain_unfolds_records_and_names_what_it_cannot(tmp_path):
    assert files.plain(result())["task"]["score"] == 0.75
    assert files.plain({"p": tmp_path, "t": (1, float("nan"))}) == {"p": str(tmp_path), "t": [1, None]}
    with pytest.raises(TypeError, match="object has no JSON form"):
        files.plain(object())


def test_read_json_roundtrip_missing_and_broken(tmp_path):
    path = files.write_json(tmp_path / "deep" / "x.json", {"a": [1.5, None]})
    assert files.read_json(path) == {"a": [1.5, None]}
    assert files.read_json(tmp_path / "none.json") is None
    path.write_text("{")
    with pytest.raises(StorageError, match="x.json"):
        files.read_json(path)


def test_mode_is_the_umask_or_the_one_asked_for(tmp_path):
    assert files.write_text(tmp_path / "secret", "x", mode=0o600).stat().st_mode & 0o777 == 0o600
    before = os.umask(0o027)
    try:
        assert files.write_text(tmp_path / "open", "x").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path):
    """A real failing write: a file-size limit in a child process, where the disk is the same as in a real run."""
    path = files.write_text(tmp_path / "trials.csv", "old\n")
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from orchestrator.storage import files as outputs
from orchestrator.errors import StorageError
try:
    outputs.write_text({str(path)!r}, "x" * 100_000)
except StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert str(path) in done.stdout and "output.dir" in done.stdout
    assert path.read_text() == "old\n" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_with_its_remedy():
    """/dev/full gives the kernel's own ENOSPC."""
    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")
    error = files.storage_error(Path("outputs/pocket/trials.csv"), caught.value)
    assert isinstance(error, StorageError)
    assert "outputs/pocket/trials.csv" in str(error) and "disk is full" in str(error) and "output.dir" in str(error)


def test_a_full_file_system_for_real(tmp_path):
    """A tmpfs of 64 KiB, mounted in a user namespace of its own; where the kernel forbids that, /dev/full above is the proof."""
    (tmp_path.parent / "write.py").write_text(f"""
from orchestrator.storage import files as outputs
try:
    outputs.write_bytes('{tmp_path}/big.json', b'x' * 1_000_000)
except Exception as error:
    print(type(error).__name__, error)
""")
    script = f"mount -t tmpfs -o size=64k tmpfs {tmp_path} && {sys.executable} {tmp_path.parent / 'write.py'} && ls -A {tmp_path}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode != 0:
        assert "mount" in done.stderr or "unshare" in done.stderr, done.stderr
        return
    assert done.stdout.startswith("StorageError") and "disk is full" in done.stdout
    assert len(done.stdout.splitlines()) == 1, "a temporary file was left behind"


def test_a_path_through_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="output.dir"):
        files.write_text(tmp_path / "file" / "x.json", "x")
