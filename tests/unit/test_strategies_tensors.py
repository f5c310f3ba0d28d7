"""The methods' pure functions refuse what would be nonsense in silence: tensors of unlike shapes, NaN, infinity."""

from __future__ import annotations

import math

import pytest
import torch

from strategies import enchtable, lox, resta, safemerge, spard

GOOD = torch.arange(6.0).reshape(2, 3)
NAN, INFINITE, OTHER = GOOD.clone(), GOOD.clone(), torch.ones(3, 2)
NAN[0, 1], INFINITE[1, 2] = math.nan, math.inf
CALLS = {
    "safemerge": lambda bad: safemerge.merge(GOOD, bad, GOOD + 1, GOOD),
    "resta": lambda bad: resta.merge(GOOD, bad, 0.5),
    "lox": lambda bad: lox.extrapolate(GOOD, bad),
    "enchtable": lambda bad: enchtable.merge({"w": GOOD}, {"w": bad}),
    "spard": lambda bad: spard.correct({"w": GOOD}, {"w": bad}, 2.0, 1.0),
}


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize(("bad", "said"), [(NAN, "NaN or infinity"), (INFINITE, "NaN or infinity"), (OTHER, "one shape")])
def test_nonsense_is_refused_by_name(method, bad, said):
    CALLS[method](GOOD * 2)
    with pytest.raises(ValueError, match=f"{method}.*{said}"):
        CALLS[method](bad)


def test_a_loss_that_is_no_number_corrects_nothing():
    with pytest.raises(ValueError, match="the safety loss is nan"):
        spard.correct({"w": GOOD}, {"w": GOOD}, math.nan, 1.0)
