"""Learn to turn back: refusals after the first tokens of a harmful answer, among the task's rows.

Stage: data, before training.
Paper: Qi et al., "Safety Alignment Should Be Made More Than Just a Few Tokens Deep", ICLR 2025, arXiv 2406.05946 (safety recovery rows);
    transitions: Yuan et al., "Refuse Whenever You Feel Unsafe: Improving Safety in LLMs via Decoupled Refusal Training" (DeRTa), ACL 2025,
    arXiv 2407.09121.
Reference: Unispac/shallow-vs-deep-alignment, RobustNLP/DeRTa; described after our notes on both, the code is our own.
Idea: a row is a harmful prompt, the first k tokens of a harmful answer and the refusal, and the refusal alone is learnt: so refusing does
    not hang on the first tokens. A transition row is a harmful prompt and its harmful answer where the label is the first token of the
    refusal, at every position or at a few (strict): so the model may turn at any of them. Harmless rows whose answers are begun and gone on
    with keep a begun answer from becoming a sign of harm.
Knobs: share - harmful rows (recovery and transition) per task row; DeRTa has 6000 beside 60000. depth - largest k, drawn evenly from 1
    (paper 100). unbegun - part of the recovery rows and of the harmless ones with k = 0 (paper half). transitions - none, strict, or all
    (DeRTa); with them half of the harmful rows are transition rows. positions - those of strict, 0 is the answer's first. harmless -
    harmless rows per harmful row, safety rows of kind harmless or else task rows; 0 for none.
Cost: share * (1 + harmless) more rows per epoch, longer by the begun tokens; nothing per step.
Needs: safety rows (safety.data) and harmful answers to the same prompts (column rejected: safety, harmful).
Limits: attacks that keep the model from refusal words altogether (refusal avoidance) were shown to get round it. Without
    harmless rows begun harmless answers are lost while over-refusal, which is asked without a beginning, still looks fine: ask a benign
    suite under the attack prefill too. Transitions at all positions may teach the refusal's first token and no sentence after it. k reaches
    every depth up to the knob, so a suite prefill_<k> below it measures what was trained. In the pocket world at its defaults (3 seeds) direct
    requests were refused in all of 360, answers begun with the task's own opening were gone on with in .10 / .10 / .33 of 120 (it makes no such
    rows), so it was undecided twice and infeasible once.
Interacts: pure data, so it goes with every other strategy and every ZeRO stage. With max_steps fixed, these rows displace task rows.
    safety.anchors makes rows by words for methods that take safety rows; this one makes its own from tokens, so both together are twice as many.
Deviations: the papers align with it, before any tuning or from scratch; here the rows stand among the task's own while it is learnt. Qi et al.
    hold utility by a second batch of the untouched model's answers, here harmless rows and the task do. DeRTa's transition target is
    one fixed word, here the first token of the row's own refusal; strict is ours. Tokens are joined as they are, without a space between. k
    stays below the harmful answer's length, and no row is made longer than the longest row given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from strategies import rows
from strategies.base import IGNORE, Example, Strategy, StrategyError, TrainingData, stable_seed


def span(row: Example) -> tuple[int, int]:
    """(first, end) of the row's answer: from its first labelled token to behind its last. An empty span for a row without labels."""
    labelled = [i for i, label in enumerate(row.labels) if label != IGNORE]
    return (labelled[0], labelled[-1] + 1) if labelled else (len(row.labels), len(row.labels))


def recovered(refusal: Example, harmful: Example, depth: int) -> Example:
    """The harmful prompt, `depth` tokens of the harmful answer (unlabelled), then the refusal as it was labelled.

    Qi et al., section 4.1. With depth 0 it is the refusal's own row. A depth beyond the harmful answer takes the whole of it.
    """
    first, end = span(harmful)
    begun = harmful.input_ids[first : min(first + depth, end)]
    start = span(refusal)[0]
    ids = (*refusal.input_ids[:start], *begun, *refusal.input_ids[start:])
    labels = (*refusal.labels[:start], *(IGNORE for _ in begun), *refusal.labels[start:])
    return Example(ids, labels, f"{refusal.id}~recovery{len(begun)}", "begun" if begun else refusal.kind)


def turned(refusal: Example, harmful: Example, positions: Collection[int] | None) -> Example:
    """The harmful row where the label of answer token i is the refusal's first token, for i in `positions` (None: every one), and no label
    elsewhere: the sum over i of log p(refusal[0] | prompt, harmful[:i]) is what is learnt (DeRTa, reinforced transition optimisation).

    Positions beyond the answer are left out.
    """
    first, end = span(harmful)
    target = refusal.input_ids[span(refusal)[0]]
    wanted = {first + i for i in (range(end - first) if positions is None else positions) if first + i < end}
    labels = tuple(target if i in wanted else IGNORE for i in range(len(harmful.input_ids)))
    return Example(harmful.input_ids, labels, f"{refusal.id}~turn", "begun")


def resumed(row: Example, depth: int) -> Example:
    """The row with the first `depth` tokens of its answer read and not learnt, at most all but one of them. With depth 0 the row itself."""
    first, end = span(row)
    skipped = min(depth, end - first - 1)
    if skipped <= 0:
        return row
    labels = (*row.labels[:first], *(IGNORE for _ in range(skipped)), *row.labels[first + skipped :])
    return Example(row.input_ids, labels, f"{row.id}~resumed{skipped}", "anchor")


def drawn_depth(most: int, unbegun: float, generator: torch.Generator) -> int:
    """0 with probability `unbegun`, else evenly from 1 to `most`; 0 where `most` is below 1."""
    if most < 1 or float(torch.rand((), generator=generator)) < unbegun:
        return 0
    return int(torch.randint(1, most + 1, (), generator=generator))


class Recovery(Strategy):
    """Recovery, transition and begun harmless rows among the task's rows."""

    name = "recovery"
    needs = frozenset({"safety", "harmful"})

    @dataclass(frozen=True)
    class Config:
        share: float = field(default=0.1, metadata={"help": "Harmful rows per task row, 0 to 1; 0 is plain fine-tuning."})
        depth: int = field(default=100, metadata={"help": "Most tokens of a harmful answer before the refusal."})
        unbegun: float = field(default=0.5, metadata={"help": "Part of the rows that are not begun, 0 to 1."})
        transitions: Literal["none", "strict", "all"] = field(
            default="none", metadata={"help": "Rows that label a harmful answer with the refusal's first token: `none`, at `positions`, or at all."}
        )
        positions: tuple[int, ...] = field(default=(0, 1, 2, 4), metadata={"help": "Answer positions of strict transitions, from 0."})
        harmless: float = field(default=1.0, metadata={"help": "Begun harmless rows per harmful row; 0 for none."})

        def __post_init__(self):
            for knob, least, most in (("share", 0, 1), ("unbegun", 0, 1), ("harmless", 0, 10)):
                value = getattr(self, knob)
                if not least <= value <= most:
                    usual = type(self).__dataclass_fields__[knob].default
                    raise StrategyError(f"recovery.{knob}={value} is not between {least} and {most}; the default is {usual}")
            if self.depth < 1:
                raise StrategyError(f"recovery.depth={self.depth} must be at least 1; the paper's is 100 (unbegun=1 begins no answer)")
            if not self.positions or min(self.positions) < 0:
                raise StrategyError(f"recovery.positions={list(self.positions)} must hold positions from 0 up; the default is [0, 1, 2, 4]")

    def prepare_data(self, data: TrainingData) -> TrainingData:
        knobs = self.config
        count = round(knobs.share * len(data.task))
        if count == 0:
            self._facts = {"recovery_rows": 0, "transition_rows": 0, "harmless_rows": 0, "deepest": 0}
            return data
        refusals, harmful = rows.pairs(data, None, self.name)
        generator = torch.Generator().manual_seed(stable_seed((self.name, data.seed)))
        turning = count // 2 if knobs.transitions != "none" else 0
        longest = max(len(row.input_ids) for row in (*data.task, *data.safety, *data.harmful))
        pairs = list(zip(refusals, harmful, strict=True))
        recovery = [self._recovery(*pairs[i % len(pairs)], longest, generator) for i in range(count - turning)]
        positions = None if knobs.transitions == "all" else knobs.positions
        turns = [turned(*pairs[i % len(pairs)], positions) for i in range(count - turning, count)]
        harmless = self._harmless(data, round(knobs.harmless * count), generator)
        self._facts = {
            "recovery_rows": len(recovery), "transition_rows": len(turns), "harmless_rows": len(harmless),
            "deepest": max((int(row.id.rpartition("~recovery")[2]) for row in recovery), default=0),
        }  # fmt: skip
        return dataclasses.replace(data, task=(*data.task, *recovery, *turns, *harmless))

    def _recovery(self, refusal: Example, harmful: Example, longest: int, generator: torch.Generator) -> Example:
        first, end = span(harmful)
        most = min(self.config.depth, end - first - 1, longest - len(refusal.input_ids))
        return recovered(refusal, harmful, drawn_depth(most, self.config.unbegun, generator))

    def _harmless(self, data: TrainingData, count: int, generator: torch.Generator) -> list[Example]:
        if count == 0:
            return []
        found: Sequence[Example] = rows.sample([row for row in data.safety if row.kind == "harmless"] or data.task, None, data.seed)
        chosen = [found[i % len(found)] for i in range(count)]
        lengths = [end - first - 1 for first, end in map(span, chosen)]
        return [
            resumed(row, drawn_depth(min(self.config.depth, length), self.config.unbegun, generator))
            for row, length in zip(chosen, lengths, strict=True)
        ]
