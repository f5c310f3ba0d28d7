"""Texts of an experiment come out of Kubernetes manifests as they went in, whatever they hold; names of runs are DNS labels."""

from __future__ import annotations

import re

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import config
from orchestrator.verbs import render

TEXTS = st.text(max_size=20) | st.sampled_from(
    ["$(HOME)", "${HOME}", "{{ x }}", "- a\n- b", "a: b", "# no", "'", '"', "---\nkind: Secret", "yes",
     "1e5", "0x1", "\x85", "\u2028x\ny", "\udcff", "\r\n", "\t"]
)  # fmt: skip


@settings(derandomize=True, deadline=None, max_examples=300, database=None)
@given(TEXTS)
def test_a_text_stays_one_text(text):
    documents = [{"kind": "ConfigMap", "data": {"experiment.yaml": text, text: f"x\n{text}\ny"}, "args": [text]}, {"kind": "RayJob"}]
    written = render.to_yaml(documents).encode(errors="backslashreplace").decode()
    assert list(yaml.safe_load_all(written)) == documents


@settings(derandomize=True, deadline=None, max_examples=50, database=None)
@given(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,80}\Z"))
def test_a_run_s_name_is_a_label(name):
    made = render.run_name(config.from_dict({"name": name}), {})
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", made) and len(made) <= render.NAME_LIMIT
