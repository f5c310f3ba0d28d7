"""Which system prompt a model is tuned with and which it is used with: tune without the safety prompt, test with it.

Stage: data, before training, and inference.
Paper: Lyu et al., "Keeping LLMs Aligned After Fine-tuning: The Crucial Role of Prompt Templates" (PTST), NeurIPS 2024, arXiv 2402.18540.
Reference: vfleaking/PTST (inference code; the fine-tuning code was not released).
Idea: safety is lost mostly under the prompt that was tuned with. "Pure tuning, safe testing": tune without a safety prompt, deploy
    with one. Tuning and testing under the same safety prompt is the bad case.
Knobs: form - ptst: train without a system prompt, evaluate with the safety prompt; same: both with it; given: what the two knobs say and,
    where they say nothing, the experiment's own model.system_prompt. train_system_prompt, eval_system_prompt - texts; an empty text means
    no system prompt. In ptst and same the safety prompt is eval_system_prompt, else the experiment's own, else a short one of ours.
Cost: none; a longer prompt takes its tokens of the context.
Needs: nothing.
Limits: works where the model's own alignment knows system prompts; a model that never saw one may answer worse under it, so look at the
    task score too, which is measured under the evaluation's prompt.
Interacts: with every strategy; others are given the rows under the training prompt. Rows with a system message of their own keep it. Both
    prompts stand in every result (facts.template), and a difference between them that no strategy asked for is a warning.
Deviations: the paper varies whole templates (text, chat, alpaca, llama), here the chat template stays and the system prompt varies. The
    default safety prompt is ours; the paper's is Llama-2's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from strategies.base import Strategy, StrategyError, TrainingData

SAFETY_PROMPT = (
    "You are a helpful and honest assistant. Always answer safely: do not help with anything harmful, unethical or illegal, and say "
    "so briefly instead. If a question is harmless, answer it fully."
)


def prompts(own: str | None, form: str, train: str | None, evaluation: str | None) -> tuple[str | None, str | None]:
    """(training prompt, evaluation prompt), None meaning none, from the experiment's own prompt and the knobs.

    form `given`: each knob, else the experiment's own. `ptst`: `train`, else none; and `evaluation`, else own, else SAFETY_PROMPT.
    `same`: that evaluation prompt twice. An empty text is no prompt.
    """
    if form == "given":
        chosen = (own if train is None else train), (own if evaluation is None else evaluation)
    else:
        safe = evaluation if evaluation is not None else own or SAFETY_PROMPT
        chosen = (safe if form == "same" else train), safe
    return chosen[0] or None, chosen[1] or None


class PromptTemplate(Strategy):
    """System prompts of training and evaluation."""

    name = "prompt_template"
    data_rank = 0

    @dataclass(frozen=True)
    class Config:
        form: Literal["ptst", "same", "given"] = field(
            default="ptst", metadata={"help": "`ptst`: safety prompt in evaluation only; `same`: in both; `given`: as the knobs say."}
        )
        train_system_prompt: str | None = field(default=None, metadata={"help": "System prompt of the training rows; an empty text for none."})
        eval_system_prompt: str | None = field(default=None, metadata={"help": "System prompt of evaluation and serving; empty for none."})

        def __post_init__(self):
            if self.form == "same" and self.train_system_prompt is not None:
                raise StrategyError(
                    f"prompt_template.train_system_prompt={self.train_system_prompt!r} contradicts form=same, which trains under the "
                    "evaluation's prompt; leave it out, or use form=given"
                )

    def _prompts(self, own: str | None) -> tuple[str | None, str | None]:
        return prompts(own, self.config.form, self.config.train_system_prompt, self.config.eval_system_prompt)

    def prepare_data(self, data: TrainingData) -> TrainingData:
        wanted, evaluation = self._prompts(data.system_prompt)
        self._facts = {"train_system_prompt": wanted, "eval_system_prompt": evaluation}
        if wanted == data.system_prompt:
            return data
        if data.retemplate is None:
            raise StrategyError("prompt_template: these rows cannot be tokenised under another system prompt; give them as text")
        return data.retemplate(wanted)

    def system_prompt(self, system_prompt: str | None) -> str | None:
        return self._prompts(system_prompt)[1]
