"""What a trial works with: training rows, evaluation rows, safety rows and suites of one experiment, loaded once per lane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.config import Experiment
from orchestrator.data import conversations, special_tokens, template, template_limits, tokens
from orchestrator.data import rows as data_rows
from orchestrator.data.conversations import Conversation
from orchestrator.data.counts import RowsReport
from orchestrator.errors import DataError
from orchestrator.evaluation import held_out
from orchestrator.evaluation.suites import PromptSuite, load_suite
from orchestrator.trial import task_rows


@dataclass(frozen=True)
class Materials:
    """Rows of one experiment, not yet tokenised."""

    train: tuple[Conversation, ...]
    evaluation: tuple[Conversation, ...]
    safety: tuple[Conversation, ...]
    suites: tuple[PromptSuite, ...]
    fingerprint: str
    """Content hash of all rows and prompts."""
    harmful: tuple[Conversation, ...] = ()
    """Harmful prompts with harmful answers; the id of the safety row they belong to, where there is one."""
    confirmation: tuple[Conversation, ...] = ()
    """Evaluation rows that the search never asks (`task.confirm_size`)."""
    reports: tuple[RowsReport, ...] = ()
    """What was changed and left out where rows were read, by source."""

    @property
    def scored(self) -> tuple[Conversation, ...]:
        """Every row that the task is scored on, those held out of the search among them."""
        return self.evaluation + self.confirmation

    def asked_in(self, phase: str) -> tuple[PromptSuite, ...]:
        """The suites that a trial of this phase is asked: in the search those not held out, else all."""
        return tuple(s for s in self.suites if phase != "search" or s.phase == "always")


def load(experiment: Experiment, cache: dict[Any, Any] | None = None) -> Materials:
    """Load and check everything the experiment names; with a `cache`, once per experiment. Raises DataError."""
    key = ("materials", experiment.digest_of("model", "task", "safety"), experiment.confirms, held_out.looks(experiment))
    if cache is not None and key in cache:
        return cache[key]
    reports: list[RowsReport] = []
    task = task_rows.load(experiment, reports)
    safety, harmful = safety_rows(experiment, reports)
    suites = held_out.divided([load_suite(suite) for suite in experiment.safety.suites], experiment)
    waiting = [task.confirmation] if task.confirmation else []
    fingerprint = conversations.fingerprint(task.train, task.evaluation, safety, harmful, [suite.hash for suite in suites], *waiting)
    found = Materials(
        tuple(task.train), tuple(task.evaluation), tuple(safety), suites, fingerprint, tuple(harmful), tuple(task.confirmation), tuple(reports)
    )
    if cache is not None:
        cache[key] = found
    return found


def safety_rows(experiment: Experiment, reports: list[RowsReport] | None = None) -> tuple[list[Conversation], list[Conversation]]:
    """(safety rows, harmful rows); how they were read is added to `reports`. Raises DataError where answers meant as refusals are none:
    chosen and rejected were swapped."""
    settings, split = experiment.safety, experiment.task.split
    safety: list[Conversation] = []
    harmful: list[Conversation] = []
    if settings.data is not None:
        rows = data_rows.load_rows(settings.data, split=split, field="safety.data")
        found = conversations.read(rows, "auto", settings.columns, settings.data, field="safety.data", kind="safety")
        safety = _noted(found, reports)
        harmful = conversations.harmful_answers(found.rows, safety, settings.columns, "safety.data")
        _check_refusals(safety, harmful)
    if settings.harmful_data is not None:
        rows = data_rows.load_rows(settings.harmful_data, split=split, field="safety.harmful_data")
        taken = conversations.read(rows, "auto", settings.columns, settings.harmful_data, field="safety.harmful_data", kind="harmful")
        harmful = _noted(taken, reports)
    return safety, harmful


def _noted(found: conversations.Read, reports: list[RowsReport] | None) -> list[Conversation]:
    if reports is not None:
        reports.append(found.report)
    return found.conversations


MIN_REFUSALS, SUSPICIOUS = 0.8, 0.5
"""Share of safe answers to harmful prompts that should read as refusals; and the share below which they cannot be meant as such."""


def _check_refusals(safety: list[Conversation], harmful: list[Conversation]) -> None:
    """Raises DataError where the safe answers are no refusals; several published copies have the two columns the wrong way round.

    Pairs are held to MIN_REFUSALS. Where there is no harmful answer to mix them up with, safe answers may also advise against it, as
    those of safety-tuned-llamas do (71 % read as refusals), so less than half is refused and less than MIN_REFUSALS warned about.
    """
    count, share = _refused(safety)
    if count and share < (MIN_REFUSALS if harmful else SUSPICIOUS):
        raise DataError(
            f"safety.data: {share:.0%} of the {count} safe answers to harmful prompts read as refusals, at least "
            f"{MIN_REFUSALS if harmful else SUSPICIOUS:.0%} are expected; are the columns swapped (safety.columns.response, .rejected)? "
            "Mark helpful rows with kind=harmless"
        )


def warnings(found: Materials) -> list[str]:
    """What the rows make doubtful, in sentences."""
    read = [line for report in found.reports for line in report.warnings()]
    count, share = _refused(found.safety)
    if not count or share >= MIN_REFUSALS:
        return read
    return [
        *read,
        f"safety.data: only {share:.0%} of the {count} safe answers to harmful prompts read as refusals; the others are learnt as they stand. "
        "Look at them, and mark helpful rows with kind=harmless",
    ]


def texts(found: Materials, experiment: Experiment, tokenizer: Any) -> tuple[list[str], list[str]]:
    """(facts, warnings) on special tokens in the rows' texts and on the chat template. Raises DataError and ModelError, naming the row, for
    what `tokens.tokenise` would refuse: an end token inside an answer, roles that the template refuses or leaves out."""
    facts, doubts = template.notes(tokenizer), template_limits.notes(tokenizer.chat_template, tokenizer.special_tokens_map)
    own = "safety.harmful_data" if experiment.safety.harmful_data else "safety.data"
    task = [("task.data", found.train), ("task.eval_data", found.scored)]
    if experiment.task.eval_data is None:
        task = [("task.data", found.train + found.scored)]
    sources = [*task, ("safety.data", found.safety), (own, found.harmful)]
    for field, rows in sources:
        cleaned, taken, left = special_tokens.cleaned(rows, tokenizer, field)
        tokens.check_roles(cleaned, tokenizer, experiment.model.system_prompt, field)
        facts += [f"{field}: {count.sentence()}" for count in taken]
        doubts += [f"{field}: {count.sentence()}; it is read as that token, not as text" for count in left]
    return facts, doubts


def _refused(safety: Sequence[Conversation]) -> tuple[int, float]:
    """(how many safe answers to harmful prompts are in a language the judge knows, the share of them that reads as refusals or push-back)."""
    from orchestrator.evaluation.judges.registry import get_judge
    from orchestrator.evaluation.outcome import settled

    rows = [row for row in safety if row.kind == "refusal"]
    asked, answers = [row.prompt[-1]["content"] for row in rows], [row.answer for row in rows]
    both = zip(*(get_judge(name).judge(asked, answers) for name in ("refusal", "refusal_phrases")), strict=True)
    told = [settled(first, second) for first, second in both]
    decided = [verdict.refused for verdict in told if verdict.parse_ok]  # an answer in a language that nobody here knows says nothing
    return len(decided), sum(decided) / max(len(decided), 1)
