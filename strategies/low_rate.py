"""Plain fine-tuning at a tenth of the learning rate: the control for every method that merely trains less.

Stage: during training; it acts through the learning rate that is searched, nothing else.
Paper: Kim et al., "Rethinking Safety in LLM Fine-tuning: An Optimization Perspective", arXiv 2508.12531: hyper-parameters alone bring unsafe
    answers from 16 % to about 5 %.
Reference: none needed.
Idea: weights that move less lose less safety, and less of the task is learned. A method that keeps safety must be better than that.
Knobs: none of its own; the learning rate is searched around a tenth of training.learning_rate (of five times that beside lora).
Cost: that of plain fine-tuning.
Needs: nothing.
Limits: a control, not a defence. Where the configured rate is low already, it hardly trains: look at the task score.
Interacts: with lora, freeze_layers and any other method, as `[low_rate, lora]`. search.space.learning_rate replaces its range, and it is then the
    recipe without it. Outside a search (strategies used as a library) it changes nothing.
Deviations: the paper varies the batch size and the number of steps too; the factor of ten is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from strategies.base import Strategy


class LowRate(Strategy):
    """Trains as the rest of the recipe does; `search_spaces/low_rate.py` lowers the rate."""

    name = "low_rate"

    @dataclass(frozen=True)
    class Config:
        """No knobs."""
