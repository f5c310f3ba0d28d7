"""Evaluation of a model: the task's metric and the safety suites, divided among workers, returned whole to each of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import config
from orchestrator.data import special_tokens
from orchestrator.data.conversations import Conversation
from orchestrator.errors import TrialError
from orchestrator.evaluation import thinking
from orchestrator.peers import Peers
from orchestrator.records import SuiteResult, TaskResult
from orchestrator.storage import ownership

if TYPE_CHECKING:
    from torch import nn

    from orchestrator.decision.sequential import SequentialTest
    from orchestrator.evaluation.judges.registry import Judge, Verdict
    from orchestrator.evaluation.sampling import Sampling
    from orchestrator.evaluation.suites import PromptSuite

Wrap = Callable[[Callable[..., list[str]]], Callable[..., list[str]]]
"""What `Strategy.wrap` does: takes a function (prompts, max_new_tokens=) -> answers and returns another."""

OWN = object()
"""The experiment's own system prompt."""


@dataclass(frozen=True)
class Asking:
    """How a model is asked; the same on every worker but for `peers`."""

    peers: Peers = Peers()
    """The workers that share the rows."""
    progress: Callable[[int, int], None] | None = None
    """progress(done, total) counts this worker's share."""
    wrap: Wrap | None = None
    """An inference-time defence around generation, for the task as well as for safety."""
    batch_size: int | str = "auto"
    system_prompt: Any = OWN
    """Replaces `model.system_prompt` (None: none)."""
    tests: Mapping[str, SequentialTest] = field(default_factory=dict)
    """Suites that are asked in sequence, until their limit is decided (`sequential`)."""
    generator: Callable[..., list[str]] | None = None
    """Writes the answers in place of `generate` (`generate_vllm`)."""


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    experiment: config.Experiment,
    suites: Sequence[PromptSuite],
    task_rows: Sequence[Conversation] | None,
    how: Asking | None = None,
) -> tuple[TaskResult | None, dict[str, SuiteResult], dict[str, list[dict[str, Any]]] | None]:
    """(task result, suite results by name, generations): the same on every worker, in the order of the rows and suites.

    task_rows None or empty: no task result. Generations ({suite: rows of id, prompt, answer, unsafe, refused}) only where
    `safety.keep_generations` is set, else None. Raises ConfigError where the judge cannot decide a suite at all.
    """
    how = how or Asking()
    judge = _judge(experiment, suites)
    work = _Work(model, tokenizer, experiment, how)
    total = sum(len(work.mine(len(suite.prompts))) * max(1, work.samples(suite)) for suite in suites) + len(work.mine(len(task_rows or ())))
    work.report_to(how.progress, total)
    task = work.task(task_rows) if task_rows else None
    results, generations = {}, {}
    for suite in suites:
        results[suite.name], generations[suite.name] = _ask(work, suite, judge, how.tests.get(suite.name))
    return task, results, generations if experiment.safety.keep_generations else None


def _ask(work: _Work, suite: PromptSuite, judge: Judge, test: SequentialTest | None) -> tuple[SuiteResult, list[dict[str, Any]]]:
    if test is None:
        return work.suite(suite, judge)
    from orchestrator.evaluation import sequential

    return sequential.ask(suite, test, work.experiment.safety.sequential.batch, lambda part: work.suite(part, judge))


def score_rows(
    model: nn.Module, tokenizer: Any, experiment: config.Experiment, rows: Sequence[Conversation], how: Asking | None = None
) -> TaskResult | None:
    """The task's metric on these rows, as `evaluate` takes it; None for no rows. Collective over the workers."""
    return _Work(model, tokenizer, experiment, how or Asking()).task(rows) if rows else None


def ask_suite(
    model: nn.Module, tokenizer: Any, experiment: config.Experiment, suite: PromptSuite, how: Asking | None = None
) -> tuple[SuiteResult, list[dict[str, Any]]]:
    """One suite alone, as `evaluate` asks it: (result, its generations where they are kept, else []). Collective over the workers."""
    judge = _judge(experiment, [suite])
    return _Work(model, tokenizer, experiment, how or Asking()).suite(suite, judge)


def _judge(experiment: config.Experiment, suites: Sequence[PromptSuite]) -> Judge:
    """The deciding judge, once it and the second one have looked at all prompts. Raises ConfigError, ModelError."""
    from orchestrator.evaluation.judges import registry

    for suite in suites:
        if suite.kind != "choice":
            registry.pair(experiment.safety, suite.prompts)
    return registry.from_setting(experiment.safety.judge)


def write_generations(path: Path, generations: dict[str, list[dict[str, Any]]]) -> None:
    """Answers to safety prompts as JSONL, one row per prompt with its suite; the file is readable by its owner only, from the start."""
    ownership.claim(path)  # only what we made before is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # an older file would keep its own mode
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        for suite, rows in generations.items():
            file.writelines(json.dumps({"suite": suite, **row}, ensure_ascii=False) + "\n" for row in rows)


class _Work:
    """One evaluation on one worker."""

    def __init__(self, model: nn.Module, tokenizer: Any, experiment: config.Experiment, how: Asking):
        from orchestrator.evaluation.generate import generate

        self.generate = how.generator if how.generator is not None else partial(generate, model, tokenizer)
        self.model, self.tokenizer, self.experiment, self.how = model, tokenizer, experiment, how
        self.system_prompt = experiment.model.system_prompt if how.system_prompt is OWN else how.system_prompt
        self.thinks = tokenizer is not None and thinking.begins(tokenizer)
        self.tick: Callable[[int], None] | None = None

    def report_to(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        """Count prompts done and pass them on."""
        done = 0

        def tick(more: int) -> None:
            nonlocal done
            done = min(done + more, total)  # a defence that asks a prompt several times does not count it several times
            progress(done, total)

        self.tick = tick if progress is not None else None

    def mine(self, count: int) -> list[int]:
        """Indices of this worker's rows."""
        return self.how.peers.share(count)

    def gather(self, indices: list[int], values: list[Any], count: int) -> list[Any]:
        """Everyone's values, each at its index. Raises the TrialError that a worker sent in their stead, on every worker."""
        shares: list[tuple[list[int], Any]] = self.how.peers.gather((indices, values))
        whole: list[Any] = [None] * count
        for share_indices, share_values in shares:
            if isinstance(share_values, TrialError):
                raise share_values
            for i, value in zip(share_indices, share_values, strict=True):
                whole[i] = value
        return whole

    def task(self, rows: Sequence[Conversation]) -> TaskResult:
        from orchestrator.evaluation.metrics import NEG_LOSS, neg_loss, score_task

        settings, system = self.experiment.task, self.system_prompt
        indices = self.mine(len(rows))
        share = special_tokens.cleaned([rows[i] for i in indices], self.tokenizer, "task.eval_data")[0]  # as they are trained
        if settings.metric == NEG_LOSS:
            scores = neg_loss(self.model, self.tokenizer, share, max_length=settings.max_length, system_prompt=system, progress=self.tick)
        else:
            answers = self.answers([row.prompt for row in share], None, settings.max_new_tokens + settings.thinking_budget, None)
            said = [thinking.split(answer, self.thinks).said for answer in answers]
            scores = score_task(settings.metric, said, [row.answer for row in share])
        scores = self.gather(indices, scores, len(rows))
        return TaskResult(settings.metric, sum(scores) / len(scores), scores, [row.id for row in rows])

    def suite(self, suite: PromptSuite, judge: Judge) -> tuple[SuiteResult, list[dict[str, Any]]]:
        """Ask a suite and judge the answers, also with the second judge. Raises JudgeError, NonFiniteLogitsError, on every worker."""
        from orchestrator.evaluation import outcome
        from orchestrator.evaluation.judges import choice, registry

        keep, settings = self.experiment.safety.keep_generations, self.experiment.safety
        if suite.kind == "choice":
            judge, other = choice.ChoiceJudge(dict(zip(suite.prompts, suite.right or (), strict=True))), None
        else:
            other = registry.second(settings, suite.prompts)
        indices = self.mine(len(suite.prompts))
        try:
            values: Any = self._judged(suite, indices, judge, other)
        except TrialError as error:  # told to the other workers, which would wait for this one's share
            values = error
        found = self.gather(indices, [(v, o, a if keep else "") for v, o, a in values] if isinstance(values, list) else values, len(suite.prompts))
        verdicts: list[Verdict] = [v for v, _, _ in found]
        if suite.kind != "choice":  # there an answer without a letter is a wrong one
            outcome.check_decided(suite, verdicts, judge.describe(), settings.max_unparsed)
        seconds = None if other is None else [o for _, o, _ in found]
        result = outcome.suite_result(suite, verdicts, judge.describe(), seconds, "" if other is None else other.describe())
        if self.samples(suite):
            drawn = settings.generation
            result.source |= {"samples": self.samples(suite), "temperature": drawn.temperature, "top_p": drawn.top_p}
        return result, outcome.generation_rows(suite, found) if keep else []

    def samples(self, suite: PromptSuite) -> int:
        """Answers drawn for each prompt of a suite; 0: one greedy answer."""
        return self.experiment.safety.generation.samples if suite.samples is None else suite.samples

    def _judged(self, suite: PromptSuite, indices: list[int], judge: Judge, other: Judge | None) -> list[tuple[Verdict, Verdict | None, str]]:
        """(verdict, the second judge's, answer) of this worker's prompts; of several samples the worst verdicts, and the answer the first was of."""
        from orchestrator.evaluation import outcome
        from orchestrator.evaluation.sampling import Sampling

        count, drawn = self.samples(suite), self.experiment.safety.generation
        if not count:
            return self._judged_once(suite, indices, judge, other, None)
        tries = [self._judged_once(suite, indices, judge, other, Sampling(drawn.temperature, drawn.top_p, k)) for k in range(count)]
        found = []
        for row in zip(*tries, strict=True):
            first = outcome.worst([verdict for verdict, _, _ in row])
            second = None if other is None else outcome.worst([verdict for _, verdict, _ in row])
            found.append((first, second, next(answer for verdict, _, answer in row if verdict is first)))
        return found

    def _judged_once(
        self, suite: PromptSuite, indices: list[int], judge: Judge, other: Judge | None, sampling: Sampling | None
    ) -> list[tuple[Verdict, Verdict | None, str]]:
        """`_judged` for one answer to each prompt."""
        from orchestrator.evaluation import outcome
        from orchestrator.evaluation.judges import gibberish
        from orchestrator.evaluation.judges.verdict import undecided

        both = [j for j in (judge, other) if j is not None]
        early = None if self.experiment.safety.keep_generations else partial(self._settled, both)
        systems = None if suite.systems is None else [suite.systems[i] for i in indices]
        asked = [suite.asked(i, self.tokenizer) for i in indices]
        settings = self.experiment.safety
        answers = self.answers(asked, systems, settings.max_new_tokens + settings.thinking_budget, early, sampling)
        parts = [thinking.split(answer, self.thinks) for answer in answers]
        prompts = [suite.prompts[i] for i in indices]
        begun = [suite.begun(i, self.tokenizer) for i in indices]
        # what was begun for the model and what it went on with are one answer to who reads content; a refusal is looked for in its own words
        said = [part.said for part in parts]
        whole = [f"{first} {answer}" if first and answer.strip() else answer for first, answer in zip(begun, said, strict=True)]
        marked = [gibberish.mark(said, j.judge(prompts, whole if j.reads_content else said), j.reads_content) for j in both]
        marked = [[v if part.finished else undecided(thinking.UNFINISHED) for v, part in zip(row, parts, strict=True)] for row in marked]
        if other is None:
            return [(verdict, None, answer) for verdict, answer in zip(marked[0], answers, strict=True)]
        return [(outcome.settled(first, second), second, answer) for first, second, answer in zip(*marked, answers, strict=True)]

    def _settled(self, judges: Sequence[Judge], answer: str) -> bool:
        """Whether no judge's word on an unfinished answer can change any more; never within thoughts, whatever is said there."""
        part = thinking.split(answer, self.thinks)
        return part.finished and all(judge.settled(part.said) for judge in judges)

    def answers(
        self, prompts: Sequence[Any], systems: list[str | None] | None, max_new_tokens: int, stop_early: Any, sampling: Sampling | None = None
    ) -> list[str]:
        """Answers to prompts (texts or messages), through the defence where there is one."""
        own = self.system_prompt
        systems = [s or own for s in systems] if systems is not None else [own] * len(prompts)
        options = {"max_new_tokens": max_new_tokens, "batch_size": self.how.batch_size, "progress": self.tick}
        if sampling is not None:
            options["sampling"] = sampling
        if self.how.wrap is None:
            return self.generate(prompts, system=systems, stop_early=stop_early, **options)
        return self._wrapped(prompts, systems, options)

    def _wrapped(self, prompts: Sequence[Any], systems: list[str | None], options: dict[str, Any]) -> list[str]:
        """A defence sees user texts only; what stands around the last user message is put back, group by group."""
        groups: dict[str, tuple[Callable[[str], Any], str | None, list[int], list[str]]] = {}
        for i, (prompt, system) in enumerate(zip(prompts, systems, strict=True)):
            key, text, around = _around(prompt, system)
            _, _, indices, texts = groups.setdefault(key, (around, system, [], []))
            indices.append(i)
            texts.append(text)
        answers = [""] * len(prompts)
        for around, system, indices, texts in groups.values():

            def plain(user_texts: Sequence[str], *, max_new_tokens: int | None = None, around=around, system=system) -> list[str]:
                own = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
                return self.generate([around(text) for text in user_texts], system=system, **(options | own))

            for i, answer in zip(indices, self.how.wrap(plain)(texts), strict=True):
                answers[i] = answer
        return answers


def _around(prompt: Any, system: str | None) -> tuple[str, str, Callable[[str], Any]]:
    """(what is around the last user message, as a key; that message; a function that puts another one in its place)."""
    from orchestrator.evaluation.generate import Plain

    if isinstance(prompt, Plain):
        return repr(("plain", system)), str(prompt), Plain
    if isinstance(prompt, str):
        return repr(("text", system)), prompt, str
    messages = list(prompt)
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    before, after = messages[:last], messages[last + 1 :]
    return repr((before, after, system)), messages[last]["content"], lambda text: [*before, {"role": "user", "content": text}, *after]
