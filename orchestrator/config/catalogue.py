"""Prompt suites of the literature by name: where they are, which columns they have, under which licence. Data only; nothing is read here.

A name is compared without case, spaces and signs, so `AdvBench`, `advbench` and `adv-bench` are one. `resolve` gives the entries behind a
name: one, or the several of a set. Local copies go before the hub (`find_local`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from orchestrator.storage import paths

Kind = Literal["harmful", "benign", "choice"]

VARIABLE = "SAFEBASIN_DATA"
"""Environment variable with folders, separated as in PATH, that hold local copies."""


@dataclass(frozen=True)
class Entry:
    """One suite."""

    name: str
    kind: Kind
    hub: str
    """`owner/name`, `owner/name:configuration` or `owner/name::folder`, as the `datasets` library knows it."""
    split: str
    column: str | tuple[str, ...]
    """Column with the prompt: on the hub, then in local copies of other origin."""
    group: str | tuple[str, ...] | None
    rows: int
    """Prompts that remain after `where`, as published; what is loaded is counted anew."""
    licence: str
    about: str
    source: str
    """Paper."""
    files: tuple[str, ...] = ()
    """Names of local copies, best first."""
    where: dict[str, str] = field(default_factory=dict)
    local_where: dict[str, str] = field(default_factory=dict)
    """Of local copies, where they have the column: what the hub's configuration leaves out."""
    gated: bool = False
    """Whether the hub asks for an account (HF_TOKEN)."""


_OR = "bench-llm/or-bench"
_JBB = "JailbreakBench/JBB-Behaviors:behaviors"
_BEHAVIOUR = ("prompt", "Goal", "goal", "Behavior")

ENTRIES: tuple[Entry, ...] = (
    Entry("advbench", "harmful", "walledai/AdvBench", "train", ("prompt", "goal"), None, 520, "MIT", "harmful instructions (GCG)",
          "arXiv 2307.15043", ("advbench_harmful_behaviors.csv", "harmful_behaviors.csv", "advbench.csv", "advbench.jsonl"), gated=True),
    Entry("harmbench", "harmful", "walledai/HarmBench:standard", "train", ("prompt", "Behavior"), ("category", "SemanticCategory"), 200, "MIT",
          "harmful behaviours of seven categories, the standard ones (no context, no copyright)", "arXiv 2402.04249",
          ("harmbench_behaviors_text_test.csv", "harmbench_behaviors_text_all.csv", "harmbench_behaviors_text_val.csv"),
          local_where={"FunctionalCategory": "standard"}, gated=True),
    Entry("strongreject", "harmful", "walledai/StrongREJECT", "train", ("prompt", "forbidden_prompt"), "category", 313, "MIT",
          "forbidden prompts of six categories", "arXiv 2402.10260", ("strongreject_dataset.csv", "strongreject.csv"), gated=True),
    Entry("jailbreakbench", "harmful", _JBB, "harmful", _BEHAVIOUR, "Category", 100, "MIT", "misuse behaviours of ten categories",
          "arXiv 2404.01318", ("harmful-behaviors.csv", "jbb_harmful.csv", "jailbreakbench.csv")),
    Entry("jailbreakbench_benign", "benign", _JBB, "benign", _BEHAVIOUR, "Category", 100, "MIT", "harmless counterparts of jailbreakbench",
          "arXiv 2404.01318", ("benign-behaviors.csv", "jbb_benign.csv")),
    Entry("maliciousinstruct", "harmful", "walledai/MaliciousInstruct", "train", ("prompt", "text", "instruction"), None, 100,
          "CC-BY-SA-4.0", "malicious instructions of ten intents", "arXiv 2310.06987",
          ("MaliciousInstruct.txt", "maliciousinstruct.csv", "malicious_instruct.txt")),
    Entry("directharm4", "harmful", "vfleaking/DirectHarm4", "test", ("instruction", "prompt"), "category", 400, "not stated",
          "imperative harmful requests of four categories (PTST)", "arXiv 2402.18540", ("DirectHarm4.jsonl", "directharm4.csv")),
    Entry("xstest", "benign", "Paul/XSTest", "train", "prompt", "type", 250, "CC-BY-4.0", "safe prompts that look unsafe (the safe half)",
          "arXiv 2308.01263", ("xstest_prompts.csv", "xstest_v2_prompts.csv", "xstest.csv"), {"label": "safe"}),
    Entry("xstest_unsafe", "harmful", "Paul/XSTest", "train", "prompt", "type", 200, "CC-BY-4.0", "unsafe contrasts of xstest",
          "arXiv 2308.01263", ("xstest_prompts.csv", "xstest_v2_prompts.csv", "xstest.csv"), {"label": "unsafe"}),
    Entry("or_bench", "benign", f"{_OR}:or-bench-hard-1k", "train", "prompt", "category", 1319, "CC-BY-4.0",
          "hard seemingly toxic prompts (OR-Bench-Hard)", "arXiv 2405.20947", ("or-bench-hard-1k.csv",)),
    Entry("or_bench_toxic", "harmful", f"{_OR}:or-bench-toxic", "train", "prompt", "category", 655, "CC-BY-4.0", "toxic prompts of OR-Bench",
          "arXiv 2405.20947", ("or-bench-toxic.csv",)),
    Entry("llm_lat_harmful", "harmful", "LLM-LAT/harmful-dataset", "train", "prompt", None, 4948, "not stated",
          "prompts with refusal and harmful answer", "arXiv 2407.15549", ("llm_lat_harmful.jsonl", "harmful-dataset.jsonl", "llm_lat_harmful.csv")),
    Entry("llm_lat_benign", "benign", "LLM-LAT/benign-dataset", "train", "prompt", None, 165298, "not stated",
          "ordinary prompts; set a limit, it is large", "arXiv 2407.15549", ("llm_lat_benign.jsonl", "benign-dataset.jsonl", "llm_lat_benign.csv")),
    Entry("beavertails", "harmful", "PKU-Alignment/BeaverTails-Evaluation", "test", "prompt", "category", 700, "CC-BY-NC-4.0",
          "evaluation prompts of fourteen categories", "arXiv 2307.04657", ("beavertails_evaluation.json", "beavertails_evaluation.jsonl")),
    Entry("salad_bench", "harmful", "OpenSafetyLab/Salad-Data:base_set", "train", ("question", "prompt"), "1-category", 21318, "Apache-2.0",
          "base questions of six domains; set a limit, it is large", "arXiv 2402.05044", ("base_set.json", "salad_bench.jsonl")),
    Entry("safetybench", "choice", "thu-coai/SafetyBench:dev", "en", "question", "category", 35, "MIT",
          "multiple choice of seven categories: the development rows, as the test rows' answers are not published", "arXiv 2309.07045",
          ("dev_en.json", "safetybench_dev_en.jsonl", "safetybench.jsonl")),
    Entry("simple_safety_tests", "harmful", "Bertievidgen/SimpleSafetyTests", "test", ("prompt", "counter_prompt"), "harm_area", 100, "CC-BY-2.0",
          "critical prompts of five harm areas", "arXiv 2311.08370", ("simple_safety_tests.csv", "sst_prompts.csv")),
    Entry("anthropic_red_team", "harmful", "Anthropic/hh-rlhf::red-team-attempts", "train", ("prompt", "transcript"), None, 38961, "MIT",
          "first turns of red-team transcripts; set a limit, it is large", "arXiv 2209.07858",
          ("red_team_attempts.jsonl", "anthropic_red_team.jsonl")),
    Entry("bbq", "choice", "Elfsong/BBQ", "+".join(("age", "disability_status", "gender_identity", "nationality", "physical_appearance",
          "race_ethnicity", "race_x_gender", "race_x_ses", "religion", "ses", "sexual_orientation")), "question", "category", 58492, "CC-BY-4.0",
          "multiple choice on social bias; set a limit, it is large", "arXiv 2110.08193", ("bbq.jsonl",)),
    Entry("catqa", "harmful", "declare-lab/CategoricalHarmfulQA", "en", ("Question", "prompt"), ("Category", "category"), 550, "Apache-2.0",
          "harmful questions of eleven categories", "arXiv 2402.11746", ("catqa_english.jsonl", "catqa_english.json")),
)  # fmt: skip

SETS: dict[str, tuple[str, ...]] = {
    "helm_safety": ("xstest", "anthropic_red_team", "simple_safety_tests", "harmbench", "bbq"),
}
"""Names that stand for several suites. HELM Safety: the scenarios of its `run_entries_safety.conf`."""

ALIASES: dict[str, str] = {
    "safebench": "salad_bench", "jbb": "jailbreakbench", "jbbbehaviors": "jailbreakbench", "orbenchhard": "or_bench",
    "orbenchhard1k": "or_bench", "saladdata": "salad_bench", "salad": "salad_bench", "helm": "helm_safety",
    "llmlatharmfuldataset": "llm_lat_harmful", "llmlatbenigndataset": "llm_lat_benign", "beavertailsevaluation": "beavertails",
    "xstestsafe": "xstest",
}  # fmt: skip
"""Other names. No published benchmark for language models is called "SafeBench": SALAD-Bench is taken, since it asks open harmful
questions that attack success can be measured on; SafetyBench, the nearer name, is multiple choice without published test answers."""


def squash(name: str) -> str:
    """Lower case, letters and digits only."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


_BY_NAME = {squash(entry.name): entry for entry in ENTRIES}
_SETS = {squash(name): tuple(_BY_NAME[squash(member)] for member in members) for name, members in SETS.items()}


def entry(name: str) -> Entry | None:
    """The suite of this name, None where there is none (a file, another data set, or a set)."""
    key = squash(name)
    return _BY_NAME.get(squash(ALIASES[key])) if key in ALIASES else _BY_NAME.get(key)


def members(name: str) -> tuple[Entry, ...]:
    """The suites of the set of this name; empty where it is no set."""
    key = squash(name)
    return _SETS.get(squash(ALIASES.get(key, key)), ())


def folders(*more: str | Path) -> list[Path]:
    """Where local copies are looked for: SAFEBASIN_DATA's folders, then `more`."""
    named = [part for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]
    return [paths.expanded(folder) for folder in [*named, *more]]


def in_hub_cache(entry: Entry) -> bool:
    """Whether the `datasets` library has prepared this suite here before, so that it needs no network."""
    name = entry.hub.partition(":")[0].replace("/", "___")
    root = os.environ.get("HF_DATASETS_CACHE") or Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "datasets"
    return any((Path(root) / name).glob("*/*/*")) or any((Path(root) / name.lower()).glob("*/*/*"))


def find_local(entry: Entry, where: Iterable[Path]) -> Path | None:
    """The first local copy of a suite by its file names: in each folder itself, in its folder `data`, and one level below both."""
    for folder in where:
        for name in entry.files:
            for pattern in (name, f"data/{name}", f"*/{name}", f"data/*/{name}"):
                found = next(iter(sorted(path for path in folder.glob(pattern) if paths.is_file(path))), None)
                if found is not None:
                    return found.resolve()
    return None
