"""Plain fine-tuning of every weight: the yardstick every other recipe is compared with.

Stage: during training.
Paper: none; the baseline of every paper on this subject. "Rethinking Safety in LLM Fine-tuning: an Optimization Perspective"
    (arXiv 2508.12531) shows that the learning rate and the batch size alone decide much of what is lost.
Reference: none needed.
Idea: change nothing. Its learning rate is searched like everybody's, so that no method wins merely because the baseline was badly
    tuned.
Knobs: none of its own.
Cost: one forward and backward per micro-batch; gradients and two AdamW moments for every weight.
Needs: nothing.
Limits: drags the model out of its safety basin even on harmless data.
Interacts: naming it beside another strategy changes nothing; beside lora it is refused, since adapters leave the weights alone.
Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass

from strategies.base import Strategy


class Full(Strategy):
    """Every weight is trained on the task's rows."""

    name = "full"

    @dataclass(frozen=True)
    class Config:
        """No knobs."""
