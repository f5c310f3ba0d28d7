"""What strategies train on: the experiment's rows, tokenised once per lane, with what a method may ask for beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.config import Experiment
from orchestrator.data import anchors, tokens
from orchestrator.models import copies, identity, weights
from orchestrator.records import LaneContext
from orchestrator.trial.materials import Materials

if TYPE_CHECKING:
    from torch import nn

    from strategies.base import Example, Tensors, TrainingData

REFUSAL_TOKENS = 24
"""Tokens generated to see whether a prompt is refused: refusals open an answer."""


def training_data(
    experiment: Experiment, tokenizer: Any, found: Materials, context: LaneContext, seed: int, sources: Mapping[str, Tensors] | None = None
) -> tuple[TrainingData, dict[str, int]]:
    """(rows of a trial as `strategies.base.TrainingData`, how many there are and how many were cut or dropped).

    `sources` are the weights methods may compare with; without them, those the experiment names.
    """
    settings = experiment.training

    def build(system_prompt: str | None) -> TrainingData:
        from strategies.base import TrainingData

        rows, _ = _tokens(experiment, tokenizer, found, context, system_prompt)
        return TrainingData(
            **rows, pad_token_id=tokenizer.pad_token_id,
            per_device_batch_size=settings.per_device_train_batch_size, accumulation_steps=settings.gradient_accumulation_steps,
            rank=context.rank, world_size=context.world_size, seed=seed, device=context.device, cache=context.cache,
            fingerprint=":".join([identity.template_hash(tokenizer), _key(experiment), found.fingerprint, repr(system_prompt)]),
            weights=sources or weight_sources(experiment, context), retemplate=build, refuses=_refuses(experiment, tokenizer),
            system_prompt=system_prompt, learning_rate=settings.learning_rate,
        )  # fmt: skip

    own = experiment.model.system_prompt
    return build(own), _tokens(experiment, tokenizer, found, context, own)[1]


def _key(experiment: Experiment) -> str:
    return experiment.digest_of("model", "task", "safety")


def _tokens(experiment: Experiment, tokenizer: Any, found: Materials, context: LaneContext, system_prompt: str | None):
    key = ("tokens", _key(experiment), found.fingerprint, system_prompt)
    if key not in context.cache:
        options = {
            "max_length": experiment.task.max_length, "system_prompt": system_prompt, "train_on_thoughts": experiment.task.train_on_thoughts,
        }  # fmt: skip
        task, report = tokens.tokenise(found.train, tokenizer, **options) if found.train else ((), None)
        rows = {"task": tuple(task), "safety": (), "harmful": ()}
        safety = list(found.safety)
        if experiment.safety.anchors is not None and safety:
            safety += anchors.made(found.safety, found.harmful, found.train, experiment.safety.anchors)
        for name, conversations, field in (("safety", safety, "safety.data"), ("harmful", found.harmful, "safety.harmful_data")):
            if conversations:
                rows[name] = tuple(tokens.tokenise(conversations, tokenizer, field=field, **options)[0])
        counts = {name: len(value) for name, value in rows.items()} | {part: getattr(report, part, 0) for part in ("cut", "dropped")}
        if not experiment.task.train_on_thoughts:
            counts["thought_tokens"] = getattr(report, "thought_tokens", 0)
        context.cache[key] = (rows, counts)
    return context.cache[key]


def weight_sources(experiment: Experiment, context: LaneContext) -> weights.Sources:
    """`aligned`: the lane's own copy of the untouched model; `unaligned`: read from its files, tensor by tensor."""
    key = ("weights", experiment.digest_of("model"))
    if key not in context.cache:
        model = experiment.model
        makers = {"aligned": lambda: weights.of_module(copies.kept(context.cache, model))}
        if model.unaligned_name_or_path is not None:
            makers["unaligned"] = lambda: weights.of_name(model.unaligned_name_or_path, model)
        context.cache[key] = weights.Sources(makers)
    return context.cache[key]


def _refuses(experiment: Experiment, tokenizer: Any):
    """Greedy answers to rows' prompts, judged by the experiment's judge."""

    def refuses(model: nn.Module, rows: Sequence[Example]) -> list[bool]:
        from orchestrator.evaluation import thinking
        from orchestrator.evaluation.generate import continue_ids
        from orchestrator.evaluation.judges.registry import get_judge

        ids = [list(row.prompt) for row in rows]
        answers = continue_ids(model, tokenizer, ids, max_new_tokens=REFUSAL_TOKENS)
        prompts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        judge = get_judge("refusal")  # phrases: any judge of content may not know these prompts
        opened = thinking.begins(tokenizer)
        said = [thinking.split(answer, opened).said for answer in answers]
        return [verdict.refused for verdict in judge.judge(prompts, said)]

    return refuses
