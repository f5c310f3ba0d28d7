"""The sections of a config file: one pydantic model each, every field described (`safety`: its own file). `orchestrator.config` puts them together."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from orchestrator.config import seeds as seed_range
from orchestrator.config.section import COUNT, SECONDS, TOKENS, Section
from orchestrator.errors import ConfigError
from orchestrator.storage import addresses, paths


def _place(text: str, key: str) -> str:
    """`paths.folder_name` as pydantic wants it. Raises ValueError."""
    try:
        return paths.folder_name(text, key)
    except ConfigError as error:
        raise ValueError(str(error)) from None


class Model(Section):
    model_name_or_path: str = Field("pocket", description="Hub id or local folder in Hugging Face format; `pocket` is the embedded made-up world's aligned model.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    unaligned_name_or_path: str | None = Field(None, description="The same model before its alignment (hub id, folder or `pocket:unaligned`), for methods that need the direction alignment took. Same architecture, safetensors. The pocket model knows its own.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field("float32", description="Type the weights are loaded in. `training.bf16` turns mixed precision on.")
    attn_implementation: str | None = Field(None, description="Passed to transformers, e.g. `sdpa`, `eager`, `flash_attention_2`.")
    chat_template: str | None = Field(None, description="Jinja chat template (text, or path of a .jinja file) for a tokenizer that has none, or to replace its own.")
    system_prompt: str | None = Field(None, description="System message put before every prompt, in training and in evaluation.")
    trust_remote_code: bool = Field(False, description="Run code that ships with the model. Off unless you have read it.")

    @model_validator(mode="before")
    @classmethod
    def _own_unaligned(cls, value: Any) -> Any:
        """The embedded model's own; not a default, so that another model never inherits it."""
        if isinstance(value, dict) and value.get("model_name_or_path", "pocket") == "pocket":
            return {"unaligned_name_or_path": "pocket:unaligned", **value}
        return value


class Columns(Section):
    """Names of the columns where they are not the usual ones."""

    messages: str | None = Field(None, description="Column with a list of {role, content}.")
    prompt: str | None = Field(None, description="Column with the user's text.")
    response: str | None = Field(None, description="Column with the wanted answer.")
    instruction: str | None = Field(None, description="Column with the instruction.")
    input: str | None = Field(None, description="Column with the instruction's input, appended after a blank line where it is not empty.")
    output: str | None = Field(None, description="Column with the wanted answer to an instruction.")
    system: str | None = Field(None, description="Column with the row's own system message (usual names: system, system_prompt).")
    history: str | None = Field(None, description="Column with the turns before the prompt, [[question, answer], ...] or messages (usual name: history).")
    rejected: str | None = Field(None, description="Column with the harmful answer, in safety data (usual names: rejected, harmful_response).")


class Task(Section):
    data: str = Field("pocket:obey", description="Training rows: JSONL/JSON/CSV/TSV file, or the name of a `datasets` data set. `pocket:...` names an embedded task.")
    eval_data: str | None = Field(None, description="Rows the task score is measured on; without it `eval_fraction` of `data` is held out.")
    eval_fraction: float = Field(0.1, gt=0, lt=1, description="Share of `data` held out for the task score where there is no `eval_data`.")
    eval_size: int | None = Field(200, gt=0, le=COUNT, description="At most this many evaluation rows (the first ones after a seeded shuffle); null for all.")
    confirm_size: int | None = Field(None, ge=0, le=COUNT, description="Evaluation rows held out of the search: finalists, the untouched model and the plain control are scored on them once, after everything was chosen, and that score is reported. Without a number, where finalists are trained on a further seed: as many as evaluation rows, from the rows that `eval_size` leaves over, else from `data` (without `eval_data`), else half of `eval_data` where it has 100 rows or more. 0 for none.")
    split: str = Field("train", description="Split of a `datasets` name.")
    limit: int | None = Field(None, gt=0, le=COUNT, description="At most this many training rows.")
    format: Literal["auto", "messages", "prompt_response", "instruction"] = Field("auto", description="Form of the rows; `auto` looks at the columns.")
    columns: Columns = Field(default_factory=Columns, description="Column names, where they are not the usual ones.")
    metric: str = Field("exact_match", description="`exact_match`, `contains`, `token_f1`, `neg_loss`, or `package.module:function` taking (answer, reference) and returning 0..1.")
    max_length: int = Field(512, gt=0, le=TOKENS, description="Tokens per training row; longer rows are cut at the end and counted in the log.")
    max_new_tokens: int = Field(64, gt=0, le=TOKENS, description="Tokens generated per evaluation row.")
    thinking_budget: int = Field(0, ge=0, le=TOKENS, description="Tokens a reasoning model gets on top for its thoughts, which are cut off before an answer is scored.")
    train_on_thoughts: bool = Field(True, description="Whether the thoughts of a reasoning model in answers of training rows (<think>...</think> and other markers) are learnt. false: they are read and no loss is taken on them; a row of nothing but thoughts is dropped. Safety rows alike.")
    allow_overlap: bool = Field(False, description="Go on although more than 1 % of the evaluation rows are training rows too. The report then says so.")


class Search(Section):
    trials: int = Field(15, gt=0, le=100_000, description="Trials of the search, over all recipes together (each recipe gets an equal share).")
    seeds: tuple[int, ...] = Field((0, 1), min_length=1, max_length=seed_range.MOST, description="Training seeds: the search uses the first, finalists are confirmed on the others. A number n means 0..n-1. Each 0 to 2147483647.")
    finalists: int = Field(2, ge=0, le=10_000, description="How many of the best configurations are trained again on the further seeds.")
    sampler: Literal["auto", "joint", "tpe", "gp", "random", "nsga2"] = Field("auto", description="`joint` is one model over all recipes: what a learning rate, a rank or a freeze range does in one recipe counts for the others too. `auto` is `joint` (`tpe` for a single trial). `tpe`, `gp`, `random` and `nsga2` are Optuna's, one for each recipe. Every one is told the constraint.")
    allocation: Literal["equal", "adaptive"] = Field("equal", description="Which recipe the next trial is of. `equal`: every recipe gets the same share, for tables that compare recipes. `adaptive` (with `sampler: auto` or `joint`): the same until something feasible is known, then the one the model over all recipes expects most of; a recipe that it gives a chance below 0.05 of holding a better feasible configuration is left out, which the log and the report say, and a new best is run on a second seed before it counts.")
    sampler_seed: int = Field(0, ge=0, le=seed_range.LARGEST, description="Seed of the sampler, 0 to 2147483647.")
    early_end: bool = Field(True, description="End a training of the search where probes at an eighth, a quarter and a half of it prove that it breaks `safety.limits.max_degradation` (evidence over all looks, wrong in at most 1 - `limits.confidence`). Only for recipes that cannot come back: without safety rows in training and without a method after it; each recipe's first trial goes to its end. Not where `monitor.on_breach` stops, rolls back or adds, nor with nsga2.")
    time_budget_s: float | None = Field(None, gt=0, le=SECONDS, description="No new trial starts after this many seconds of search.")
    max_concurrent_trials: int | None = Field(None, gt=0, le=10_000, description="Trials at a time; without it, as many as there are lanes (plus one waiting per lane).")
    space: dict[str, Any] = Field(default_factory=dict, description="Ranges that replace a strategy's own, by parameter name, e.g. {learning_rate: {type: float, low: 1e-5, high: 1e-3, log: true}, lora.lora_r: {choices: [4, 8]}}; a bare value pins the parameter.")
    trials_per_training: int = Field(4, gt=0, le=100_000, description="For recipes that end with a method acting after training: how many trials share one training, each with other after-training knobs. 1 trains every trial anew.")
    storage: str | None = Field(None, description="Optuna journal file; without it `<output.dir>/study.journal`.")

    @field_validator("seeds", mode="before")
    @classmethod
    def _count_or_list(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            if not 1 <= value <= seed_range.MOST:
                raise ValueError(f"search.seeds as a number means how many seeds, so 1 to {seed_range.MOST}; for one of another number write [number]")
            return tuple(range(value))
        return value

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"search.seeds {list(value)} repeats a seed; name each once")
        odd = next((seed for seed in value if not 0 <= seed <= seed_range.LARGEST), None)
        if odd is not None:
            raise ValueError(f"search.seeds: {odd} is not between 0 and {seed_range.LARGEST}")
        return value


    @model_validator(mode="after")
    def _allocated_by_a_model(self):
        if self.allocation == "adaptive" and self.sampler not in ("auto", "joint"):
            raise ValueError(f"search.allocation=adaptive needs the model over all recipes, and search.sampler={self.sampler} knows one recipe at a time; set search.sampler=auto, or search.allocation=equal")
        return self

    @property
    def second_seed(self) -> int:
        """Of the trials that try a new best once more during the search (`allocation: adaptive`); none of `seeds`, which stay for finalists."""
        return max(self.seeds) + 1 if max(self.seeds) < seed_range.LARGEST else next(seed for seed in range(len(self.seeds) + 1) if seed not in self.seeds)

    @field_validator("storage")
    @classmethod
    def _file(cls, value: str | None) -> str | None:
        return None if value is None else _place(value, "search.storage")


class Training(Section):
    learning_rate: float = Field(2e-3, gt=0, le=10, description="Peak rate of AdamW; the centre of the searched range.")
    per_device_train_batch_size: int = Field(16, gt=0, le=100_000, description="Rows per worker and micro-batch.")
    gradient_accumulation_steps: int = Field(1, gt=0, le=100_000, description="Micro-batches per optimiser step.")
    num_train_epochs: float = Field(1.0, gt=0, le=10_000, description="Passes over the training rows, where `max_steps` is not set.")
    max_steps: int | None = Field(None, gt=0, le=COUNT, description="Optimiser steps; overrides `num_train_epochs`.")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field("linear", description="Shape of the rate after warm-up.")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Share of the steps over which the rate rises from 0.")
    weight_decay: float = Field(0.0, ge=0, le=10, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, le=1e6, description="Gradient clipping, after any surgery; 0 switches it off.")
    bf16: bool = Field(False, description="bfloat16 compute with float32 master weights.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations to save memory.")
    logging_steps: int = Field(10, gt=0, le=COUNT, description="Steps between reports of the training loss.")
    save_steps: int = Field(50, ge=0, le=COUNT, description="Steps between checkpoints an interrupted trial continues from; 0 for none.")
    engine: Literal["deepspeed", "plain"] = Field("deepspeed", description="`plain` trains with torch alone, on one worker.")
    torch_threads: int = Field(1, ge=0, le=1024, description="Torch threads per worker on CPU; 0 leaves torch's default.")


RecipeItem = str | dict[str, dict[str, Any]]
"""A strategy by name, or {name: {knob: value}}."""


def recipe_items(recipe: tuple[RecipeItem, ...]) -> list[tuple[str, dict[str, Any]]]:
    """A recipe as [(strategy name, pinned knobs)]."""
    return [(item, {}) if isinstance(item, str) else next(iter(item.items())) for item in recipe]


class Quick(Section):
    every_steps: int = Field(10, gt=0, le=COUNT, description="Ask every so many steps.")
    num_prompts: int = Field(10, gt=0, le=COUNT, description="Prompts per look, drawn anew each time.")
    max_unsafe: int = Field(2, ge=0, le=COUNT, description="Breach when more answers than this are unsafe, whatever the untouched model answers.")
    on_breach: Literal["log", "stop", "rollback"] = Field("stop", description="As in `monitor.on_breach`.")


class Escalation(Section):
    add: RecipeItem = Field(description="Strategy that joins the recipe at the first breach, a name or {name: {knob: value}}; one that acts at training steps.")

    @field_validator("add")
    @classmethod
    def _one(cls, value: RecipeItem) -> RecipeItem:
        if isinstance(value, dict) and len(value) != 1:
            raise ValueError(f"monitor.on_breach.add is a name or {{name: {{knob: value}}}} with one name, not {value}")
        return value


class Monitor(Section):
    every_steps: int = Field(0, ge=0, le=COUNT, description="Ask probe prompts every so many steps; 0 for never.")
    num_prompts: int = Field(50, gt=0, le=COUNT, description="Probe prompts, drawn anew for each probe from the harmful suites that constrain.")
    max_unsafe_rise: float = Field(0.05, ge=0, le=1, description="Breach when unsafe answers rise by more than this over the untouched model.")
    rule: Literal["evidence", "threshold"] = Field("evidence", description="`evidence`: the rise must also be more than chance, over all looks so far. `threshold`: the rise of the last probe alone decides.")
    false_stop_rate: float = Field(0.05, gt=0, lt=1, description="With `rule: evidence`, the chance of any breach in a whole training whose model is no worse than the untouched one.")
    on_breach: Literal["log", "stop", "rollback"] | Escalation = Field("log", description="`stop` ends the trial, its safety figures told to the sampler as infeasible. `rollback` goes back to the last good checkpoint, lowers the learning rate and goes on. `{add: STRATEGY}` (or `add STRATEGY`) goes back and goes on with that strategy added; further breaches roll back.")
    lr_factor: float = Field(0.5, gt=0, lt=1, description="What a rollback multiplies the learning rate with.")
    max_rollbacks: int = Field(3, ge=0, le=1000, description="Returns to the last good checkpoint; the breach after them ends the training there.")
    quick: Quick | None = Field(None, description="A cheap second look by a bare count, e.g. {every_steps: 10, num_prompts: 10, max_unsafe: 2}; null for none.")

    @field_validator("on_breach", mode="before")
    @classmethod
    def _in_words(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("add "):
            return {"add": value.removeprefix("add ").strip()}
        return value

    @property
    def actions(self) -> frozenset[str]:
        """What breaches may lead to: log, stop, rollback, add; empty where nothing is watched."""
        own = {"add" if isinstance(self.on_breach, Escalation) else self.on_breach} if self.every_steps else set()
        return frozenset(own | ({self.quick.on_breach} if self.quick is not None else set()))

    @property
    def added(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        """Strategies that wait for a breach, as (name, knobs)."""
        return tuple(recipe_items((self.on_breach.add,))) if "add" in self.actions else ()


class Ray(Section):
    address: str | None = Field(None, description="Cluster to join (`auto`, `ray://...`, host:port); without it RAY_ADDRESS, else a cluster of this machine is started.")
    num_workers: int = Field(1, gt=0, le=10_000, description="Workers of one lane (one trial trains on all of them).")
    use_gpu: bool = Field(False, description="One GPU per worker.")
    cpus_per_worker: float = Field(1, gt=0, le=4096, description="CPUs a worker asks for.")
    gpus_per_worker: float = Field(1, gt=0, le=64, description="GPUs a worker asks for, with `use_gpu`.")
    lanes: int | None = Field(None, gt=0, le=10_000, description="Worker groups that stay up; without it as many as the cluster holds (no more than trials).")
    isolate: bool = Field(False, description="A fresh worker group per trial (Ray's own pattern) instead of lanes.")
    max_failures: int = Field(3, ge=0, le=10_000, description="Worker deaths a lane survives; a machine that leaves the cluster does not count.")
    max_trial_failures: int = Field(1, ge=0, le=10_000, description="How often an interrupted trial is taken up again before it is told failed; a machine that leaves the cluster does not count.")
    room_timeout_s: float = Field(600, ge=0, le=SECONDS, description="How long a run whose last lane finds no room (every machine left, or other jobs hold them) waits for a machine before it ends.")
    init_kwargs: dict[str, Any] = Field(default_factory=dict, description="Passed to `ray.init`.")


class Tracking(Section):
    enabled: bool = Field(True, description="Whether MLflow is written to.")
    uri: str | None = Field(None, description="MLflow tracking URI; without it MLFLOW_TRACKING_URI, else sqlite in the output folder's parent (`sqlite:///<output.dir>/../mlflow.db`; inside the folder where `output.dir` is an address).")
    experiment: str = Field("safebasin", description="MLflow experiment; made if it does not exist.")
    run_name: str | None = Field(None, description="Name of the parent run; the experiment's name without it.")


class Output(Section):
    dir: str = Field("outputs/{name}", description="Folder for everything the run leaves, or an address of object storage (`s3://bucket/prefix/{name}`; gs, abfs, hdfs, file) that needs no shared disk; `{name}` is the experiment's name.")
    overwrite: bool = Field(False, description="Remove first what an earlier run made in the folder: what is on its list `.safebasin.json`, and nothing else.")
    resume: bool = Field(False, description="Go on with the run the folder holds, if it holds one of this config (budgets, names, places and machines may differ); start one otherwise. For jobs that a cluster restarts.")
    keep_models: Literal["best", "all"] = Field("best", description="Which trials' models stay on disk.")

    @field_validator("dir")
    @classmethod
    def _folder(cls, value: str) -> str:
        if addresses.is_address(value):
            return addresses.checked(value)
        made = _place(value, "output.dir")
        odd = next((found for found in re.findall(r"(?<!\$)\{(\w*)\}", made) if found != "name"), None)
        if odd is not None:
            raise ValueError(f"{{{odd}}} stands for nothing here; only {{name}} is replaced, and ${{variable}} is")
        if re.search(r"[{}]", re.sub(r"\$?\{\w+\}", "", made)):
            raise ValueError("a brace { or } stands alone; write {name}, which the experiment's name replaces, or no braces")
        if made.strip().lower() in ("null", "none", "~"):
            raise ValueError(f"{made!r} would be a folder of that name; name a folder, or leave the key out for outputs/{{name}}")
        return made
