"""How a model can be asked: found out by asking it, whatever its family is called.

A few rows of random tokens go through plain passes, each row alone, without a cache and without padding: that is what the model says. Each way
to compute the same faster (`decoding.MODES`) is held against it over several tokens, with rows of unlike lengths, a shared beginning and a row
that leaves the batch; the first that agrees is taken. Where a small copy of the architecture can be made from its config alone, that copy is
asked, in float32, with windows narrower than the rows: no weight is needed, and what is found holds in every lane.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import ModelError
from orchestrator.evaluation import decoding, small_copy

if TYPE_CHECKING:
    import torch
    from torch import nn

LENGTHS = (22, 31, 17, 31, 26)
"""Tokens of the rows; two are equally long, so that rows without padding meet too."""
COMMON = 14
"""Tokens that all rows begin with; the shared prefix."""
STEPS = 5
LEAVES_AT = 3
"""The step after which one row leaves the batch."""
TOLERANCE = {"float32": 5e-5, "float64": 5e-5, "bfloat16": 8e-2, "float16": 2e-2}
"""Largest difference of a logit, in standard deviations of the logits, that counts as round-off, by type of the weights."""
NOISE = 10.0
"""The same, in multiples of what the model differs by where one row is asked alone and among equals: experts chosen by a hair, fast kernels."""


@dataclass(frozen=True)
class Capability:
    """How a model is asked."""

    mode: decoding.Mode
    why: str
    """What the next faster way did; empty where there is none."""
    probed: str
    """`small copy`, `model`, or `not probed`."""

    @property
    def sentence(self) -> str:
        """For users where answers take longer than they would with a cache; else empty."""
        if self.mode.cache:
            return ""
        rows = "" if self.mode.padding else ", and only prompts of one length go together"
        return (
            f"answers are generated without a key-value cache{rows}, because {self.why}; every token reads the whole text again, so asking this "
            "model takes longer"
        )


_KNOWN: dict[str, Capability] = {}
_OF: weakref.WeakKeyDictionary[Any, Capability] = weakref.WeakKeyDictionary()


def of(model: nn.Module) -> Capability:
    """How `model` is to be asked; found once per architecture and process. Raises ModelError for one that cannot be asked right.

    A model that is sharded over workers is not asked itself, since the others would wait.
    """
    core = decoding.inner(model)
    if core not in _OF:
        found = of_config(core.config, type(core))
        if found is None:
            sharded = any(hasattr(parameter, "ds_id") for parameter in core.parameters())
            found = Capability(_default(core.config), "", "not probed") if sharded else probed(model, "model")
        _OF[core] = found
    return _OF[core]


def of_config(config: Any, cls: type | None = None) -> Capability | None:
    """The same before a device is taken, from a config alone; None where no small copy can be made, so that only the model itself can tell.

    cls: the class that would be loaded; without it the one transformers takes for a causal language model. Raises ModelError as `of`.
    """
    key = f"{cls}{hashlib.sha256(config.to_json_string(use_diff=False).encode()).hexdigest()}"
    if key not in _KNOWN:
        copy = small_copy.of(config, cls)
        if copy is None:
            return None
        _KNOWN[key] = probed(copy, "small copy")
    return _KNOWN[key]


def _default(config: Any) -> decoding.Mode:
    return decoding.MODES[1] if decoding.windowed(config.get_text_config()) else decoding.MODES[0]


def probed(model: nn.Module, what: str) -> Capability:
    """Ask `model` and compare. Raises ModelError where later tokens change what was said of earlier ones, and where no way agrees."""
    import torch

    with decoding.inference(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rows = _rows(model)
        calls = decoding.Calls(model)
        reference = _reference(calls, rows)
        _check_causal(calls, rows[0], reference[0])
        allowed = max(_allowed(calls, row, alone) for row, alone in zip(rows, reference, strict=True))
        _check_generate(calls, rows[0][: -STEPS], allowed)
        why = ""
        for mode in decoding.MODES:
            if mode.prefix and decoding.windowed(calls.text_config):
                continue  # never taken for such a model; not because of this probe
            trouble = _trouble(calls, mode, rows, reference, allowed)
            if trouble is None:
                return Capability(mode, why, what)
            why = trouble if mode.cache or not why else why
    raise ModelError(
        f"{type(decoding.inner(model)).__name__} answers otherwise in a batch than alone, even without a cache ({why}), so what it is asked here "
        "would not be what it says elsewhere; take another model"
    )


def _rows(model: nn.Module) -> list[list[int]]:
    """Random rows of `LENGTHS` + `STEPS` tokens with a common beginning, without tokens that mean something to the model."""
    import torch

    from strategies import trying

    count = model.get_input_embeddings().weight.shape[0]
    special = trying.special_tokens(model.config)
    usual = [i for i in range(min(count, 30_000)) if i not in special] or list(range(count))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = limit if isinstance(limit, int) and limit > 0 else 10**6
    shrink = min(1.0, (room - STEPS) / max(LENGTHS))
    if shrink < 0.2:
        raise ModelError(f"the model's context holds {room} tokens, too few to ask it anything; take another model")
    lengths = [max(3, int(length * shrink)) for length in LENGTHS]
    common = min(int(COMMON * shrink), min(lengths) - 2)
    draw = torch.randint(len(usual), (len(lengths), max(lengths) + STEPS))
    draw[:, :common] = draw[0, :common]
    return [[usual[i] for i in row[: length + STEPS].tolist()] for row, length in zip(draw, lengths, strict=True)]


def _reference(calls: decoding.Calls, rows: list[list[int]]) -> list[torch.Tensor]:
    """What the model says of each row, in one plain pass each. Raises ModelError where it cannot be asked even that."""
    try:
        return [_alone(calls, row) for row in rows]
    except Exception as error:  # whatever a model's code raises: it cannot be asked a plain row of tokens
        said = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{type(decoding.inner(calls.model)).__name__} cannot be asked a plain row of {len(rows[0])} tokens ({type(error).__name__}: {said}); "
            "it needs other input, or this version of transformers cannot run it; take another model"
        ) from error


def _alone(calls: decoding.Calls, row: Sequence[int]) -> torch.Tensor:
    """(tokens, vocabulary) float32 logits of one row in one plain pass."""
    import torch

    ids = torch.tensor([list(row)], device=next(calls.model.parameters()).device)
    return calls(ids, last=False)[0].float()


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, in standard deviations of `other`; infinite where something is not finite."""
    scale = float(other.std())
    found = float((one.float() - other.float()).abs().max()) / max(scale, 1e-12)
    return found if found == found else float("inf")


def _check_causal(calls: decoding.Calls, row: Sequence[int], whole: torch.Tensor) -> None:
    import torch

    if not bool(torch.isfinite(whole).all()):
        name = type(decoding.inner(calls.model)).__name__
        raise ModelError(f"{name} gives logits that are NaN or infinite for plain tokens; its weights are broken")
    half = len(row) // 2
    found = _difference(_alone(calls, row[:half]), whole[:half])
    if found > max(TOLERANCE[_type(calls.model)], 0.05):
        raise ModelError(
            f"{type(decoding.inner(calls.model)).__name__} is no causal language model: what it says of the first {half} tokens changes by "
            f"{found:.2g} standard deviations when later tokens follow; give a model that writes from left to right"
        )


def _check_generate(calls: decoding.Calls, row: Sequence[int], allowed: float) -> None:
    """What the model's own `generate` says of the next tokens is what plain passes say, which is what training teaches. Raises ModelError for a model
    that gives itself other positions or other tokens there: it would answer otherwise wherever it is used. One whose `generate` does not run is
    taken: nobody can ask it that way."""
    import torch
    from transformers import GenerationConfig

    core = decoding.inner(calls.model)
    ids = torch.tensor([list(row)], device=next(core.parameters()).device)
    plain = GenerationConfig(max_new_tokens=STEPS, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    own = core.generation_config
    try:
        core.generation_config = GenerationConfig(pad_token_id=0)  # without penalties and ends of the model's own
        said = core.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)
    except Exception:  # whatever its code raises
        return
    finally:
        core.generation_config = own
    wanted = _alone(calls, said.sequences[0].tolist())[len(row) - 1 : -1]
    found = _difference(torch.cat(said.logits)[: len(wanted)], wanted)
    if found > max(allowed, 0.05):
        raise ModelError(
            f"{type(core).__name__}: the model's own generate answers otherwise than its plain forward, by {found:.2g} standard deviations (it gives "
            "itself other positions or tokens), so what training teaches is not what it would say; give another causal language model"
        )


def _type(model: nn.Module) -> str:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return str(dtype).removeprefix("torch.") if str(dtype).removeprefix("torch.") in TOLERANCE else "bfloat16"


def _allowed(calls: decoding.Calls, row: Sequence[int], alone: torch.Tensor) -> float:
    """What counts as round-off: by the type, or by what a row differs by alone and among copies of itself."""
    import torch

    ids = torch.tensor([list(row)] * 3, device=next(calls.model.parameters()).device)
    noise = _difference(calls(ids, last=False)[1], alone)
    return max(TOLERANCE[_type(calls.model)], min(NOISE * noise, 0.3))


def _trouble(calls: decoding.Calls, mode: decoding.Mode, rows: list[list[int]], reference: list[torch.Tensor], allowed: float) -> str | None:
    """What is wrong with a mode; None where it agrees."""
    if mode.cache and calls.cache_name not in calls.takes:
        return "it takes none"
    worst = 0.0
    batches = [list(range(len(rows))), [1, 3]]  # unlike lengths, which are padded; like ones, which are not
    try:
        for members in batches:
            worst = max(worst, _followed(calls, mode, [rows[i] for i in members], [reference[i] for i in members]))
    except Exception as error:  # a cache of another kind, an argument it does not take: any class, and always the same answer
        return f"{mode.name} fails ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    return f"{mode.name} differs from plain passes by {worst:.2g} standard deviations of the logits" if worst > allowed else None


def _followed(calls: decoding.Calls, mode: decoding.Mode, rows: list[list[int]], reference: list[torch.Tensor]) -> float:
    """Largest difference while the rows are gone through with their own next tokens."""
    import torch

    common = next(i for i in range(min(map(len, rows)) + 1) if i == min(map(len, rows)) or len({row[i] for row in rows}) > 1)
    cut = min(common, min(map(len, rows)) - STEPS - 1) if mode.prefix else 0
    going = decoding.Rows(calls, mode, [row[cut : len(row) - STEPS] for row in rows], 0, rows[0][:cut])
    alive, worst = list(range(len(rows))), 0.0
    for step in range(STEPS):
        logits = going.logits()
        wanted = torch.stack([reference[i][len(rows[i]) - STEPS + step - 1] for i in alive])
        worst = max(worst, _difference(logits, wanted))
        if mode.leaving and step == LEAVES_AT and len(alive) > 2:
            going.keep(torch.tensor([0, *range(2, len(alive))], device=going.device))
            alive = [alive[0], *alive[2:]]
        going.append(torch.tensor([rows[i][len(rows[i]) - STEPS + step] for i in alive], device=going.device))
    return worst
