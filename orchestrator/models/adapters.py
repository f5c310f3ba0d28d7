"""PEFT adapters put on their base: checked, resized where training added tokens, and asked with the tokenizer and template they bring.

An adapter's folder often holds the tokenizer and the chat template it was trained under. They are what it is measured with; `Voice` says whose
they are, so that nobody compares figures taken under two templates without knowing.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import config
from orchestrator.errors import ModelError
from orchestrator.models import folders, loading

if TYPE_CHECKING:
    from torch import nn

PROMPTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"}
"""Kinds that put something in front of the text instead of changing weights; decoding here knows nothing of it."""
TRIED = "LORA (DoRA, rank-stabilised, with modules_to_save, biases or trained tokens too), IA3, LOHA, LOKR"


@dataclass(frozen=True)
class Voice:
    """How a model is spoken to: its tokenizer with a template, and whose they are."""

    tokenizer: Any
    facts: dict[str, Any]
    """`template_of` and `tokenizer_of` (config, adapter, base or model), `differs_from_base`, `added_tokens`."""
    notes: tuple[str, ...] = ()
    """What a user should know, in sentences; empty for a model that is asked under its own."""


def check(folder: Path) -> dict[str, Any]:
    """The adapter's settings (adapter_config.json), its files sound. Raises ModelError, also for kinds that are not supported."""
    folders.check_adapter(folder)
    settings = folders.read_object(folder / "adapter_config.json")
    kind, task = str(settings.get("peft_type", "")).upper(), settings.get("task_type")
    if kind in PROMPTS:
        raise ModelError(
            f"the adapter in {folder} is of the kind {kind}, which puts trained prompts in front of the text instead of changing weights; that is "
            f"not supported: give one of {TRIED}"
        )
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if kind not in {str(getattr(k, "value", k)) for k in PEFT_TYPE_TO_CONFIG_MAPPING}:
        raise ModelError(
            f"{folder / 'adapter_config.json'} says peft_type {settings.get('peft_type')!r}, which this peft does not know; known here: {TRIED}"
        )
    if task not in (None, "CAUSAL_LM"):
        raise ModelError(f"the adapter in {folder} was trained for {task}, not to write text (task_type CAUSAL_LM); it cannot be asked anything")
    return settings


# ------------------------------------------------------------------------------------------------ tokenizer and template


def voice(folder: Path, model: config.Model) -> Voice:
    """What an adapter is asked with: the tokenizer in its folder, else the base's; the template of the config, else its own, else the base's.

    `model`: its base. Raises ModelError where none of the three has a template.
    """
    base = loading.bare_tokenizer(model)
    found = folders.examine(folder)
    words = _own_tokenizer(folder, model) if found.tokenizer else copy.deepcopy(base)
    own = (words.chat_template if found.tokenizer else None) or _loose_template(found)
    chosen, whose = (loading.template(model.chat_template), "config") if model.chat_template else (own, "adapter")
    if not chosen:
        chosen, whose = base.chat_template, "base"
    words.chat_template = chosen
    words = loading.finished(words, str(folder))
    more = sorted(set(words.get_vocab()) - set(base.get_vocab()))
    apart = _spoken(words) != _spoken(base)
    facts = {
        "template_of": whose, "tokenizer_of": "adapter" if found.tokenizer else "base", "differs_from_base": apart, "added_tokens": len(more),
    }  # fmt: skip
    return Voice(words, facts, tuple(_notes(facts, own, chosen, base, more)))


def _own_tokenizer(folder: Path, model: config.Model) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), config=loading.settings(model), trust_remote_code=model.trust_remote_code)
    except Exception as error:  # tokenizers raises bare exceptions for damaged files
        raise ModelError(f"the tokenizer of the adapter in {folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def _loose_template(found: folders.Folder) -> Any:
    """A template that lies in an adapter's folder without a tokenizer."""
    if "chat_template.jinja" in found.files:
        return folders.read_text(found.path / "chat_template.jinja")
    if "tokenizer_config.json" in found.files:
        template = folders.read_object(found.path / "tokenizer_config.json").get("chat_template")
        if isinstance(template, list):  # several of them, by name
            return {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        return template
    return None


def _spoken(words: Any) -> tuple:
    return words.chat_template, words.bos_token, words.eos_token, words.get_vocab()


def _notes(facts: dict[str, Any], own: Any, chosen: Any, base: Any, more: list[str]) -> list[str]:
    notes = []
    if facts["template_of"] == "config" and own and own != chosen:
        notes.append("asked under model.chat_template of the config, not under the chat template in the adapter's folder")
    elif facts["template_of"] == "adapter" and not base.chat_template:
        notes.append("asked under the chat template in its own folder; the base has none")
    elif facts["template_of"] == "adapter" and own != base.chat_template:
        notes.append("asked under the chat template in its own folder, which is not the base's")
    if more:
        shown = ", ".join(map(repr, more[:3]))
        notes.append(f"its tokenizer has {len(more)} token{'s' * (len(more) > 1)} that the base's lacks (e.g. {shown})")
    elif facts["tokenizer_of"] == "adapter" and facts["differs_from_base"] and not notes:
        notes.append("asked with the tokenizer in its own folder, which is not the base's")
    return notes


# ------------------------------------------------------------------------------------------------ loading


def attach(folder: Path, model: config.Model, *, device: str = "cpu") -> tuple[nn.Module, Voice]:
    """(the base with the adapter on it, unmerged, in evaluation mode; what it is asked with). Raises ModelError where they do not fit."""
    from peft import PeftModel

    settings = check(folder)
    said = voice(folder, model)
    network = loading.network(model)
    _resize(network, fit(folder, settings, network, said.tokenizer, model.model_name_or_path))
    try:
        with warnings.catch_warnings():  # tied weights are taken care of when merging, what the file lacks is an error below, unknown settings a note
            warnings.simplefilter("ignore", UserWarning)
            # peft looks among modules alone, and ranks of experts are those of parameters; a rank that does not fit is an error of sizes
            warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys", RuntimeWarning)
            network = PeftModel.from_pretrained(network, str(folder), torch_device="cpu")
    except Exception as error:  # peft raises whatever its methods' configs raise
        raise ModelError(f"the adapter in {folder} does not fit {model.model_name_or_path!r}: {' '.join(str(error).split())[:300]}") from error
    network.get_base_model().embeddings_belong_to_the_adapter = _check_loaded(folder, network, model)
    odd = _unknown(settings)
    if odd:
        note = f"its adapter_config.json has settings that this peft does not know and leaves out ({', '.join(odd)}): written by another version?"
        said = dataclasses.replace(said, notes=(*said.notes, note))
    return network.to(device).eval(), said


def _unknown(settings: dict[str, Any]) -> list[str]:
    """Settings that are switched on and that peft would pass over with a warning nobody sees."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = {str(getattr(k, "value", k)): cls for k, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    known = {f.name for f in dataclasses.fields(kinds[str(settings["peft_type"]).upper()])}
    return sorted(name for name, value in settings.items() if value and name not in known)


@dataclass(frozen=True)
class Fit:
    """What a base must be given before an adapter is put on it."""

    rows: int
    """Rows of embedding and head."""
    untie: bool
    """Whether the adapter's file has whole weights for both, which need not be equal."""


@dataclass(frozen=True)
class _End:
    """What an adapter's file has for the embedding or for the head."""

    whole: int | None
    """Rows of whole weights."""
    copied: bool
    """Whether those are of a copy that was trained (modules_to_save), and not of what the other end may share."""
    low_rank: int | None

    @classmethod
    def of(cls, name: str | None, tensors: dict[str, folders.Tensor], settings: dict[str, Any]) -> _End:
        def rows(part: str, axis: int) -> int | None:
            found = tensors.get(f"base_model.model.{name}.{part}")
            return found.shape[axis] if found is not None and len(found.shape) > axis else None

        plain, under = rows("weight", 0), rows("base_layer.weight", 0)
        copied = any(name == one or str(name).endswith(f".{one}") for one in settings.get("modules_to_save") or ())
        low = rows("lora_embedding_A", 1)
        return cls(plain if under is None else under, copied and under is None, rows("lora_B.weight", 0) if low is None else low)

    def has(self, number: int) -> bool:
        return self.whole is not None and number < self.whole


def fit(folder: Path, settings: dict[str, Any], network: nn.Module, words: Any, name: str) -> Fit:
    """How the base (`network`, of which only names and shapes are read) is to be resized. Raises ModelError for an adapter whose file lacks
    weights of tokens that training added; a pad token alone needs none."""
    tensors = folders.header(folder / folders.ADAPTER_WEIGHTS)
    modules = (network.get_input_embeddings(), network.get_output_embeddings())
    ends = [_End.of(_name_of(network, module), tensors, settings) for module in modules]
    rows, sizes = modules[0].weight.shape[0], {n for end in ends for n in (end.whole, end.low_rank) if n is not None}
    if len(sizes) > 1:
        raise ModelError(f"the adapter in {folder} has {' and '.join(map(str, sorted(sizes)))} rows for embedding and head; its file is damaged")
    wanted = next(iter(sizes), rows)
    trained = _trained_tokens(settings, network)
    added = {number for number in words.get_vocab().values() if number >= wanted}
    missing = sorted({n for n in range(rows, wanted) if not _covered(ends, settings, network, n)} | added)
    missing = [number for number in missing if number not in trained and number != words.pad_token_id]
    if missing:
        raise ModelError(
            f"the adapter in {folder} was trained with {len(missing)} tokens more than the {rows} of {name!r} (e.g. "
            f"{words.convert_ids_to_tokens(missing[0])!r}), and its file has no weights for them; save it again with modules_to_save=[embed_tokens, "
            "lm_head] or trainable_token_indices, or merge it where it was trained"
        )
    return Fit(max([wanted, *(number + 1 for number in added)]), all(end.whole is not None for end in ends))


def _name_of(network: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in network.named_modules() if module is wanted), None) if wanted is not None else None


def _covered(ends: list[_End], settings: dict[str, Any], network: nn.Module, number: int) -> bool:
    """Whether the adapter's file has a row for a new token at both ends; where they share their weights, one whole tensor is both."""
    from strategies import merging

    if all(end.has(number) for end in ends):
        return True
    shared = any(end.has(number) and (not end.copied or settings.get("ensure_weight_tying")) for end in ends)
    return shared and merging.tied(network)


def _trained_tokens(settings: dict[str, Any], network: nn.Module) -> set[int]:
    """Tokens whose rows were trained one by one: those of embedding and head, where the head has rows of its own."""
    from strategies import merging

    found = settings.get("trainable_token_indices") or []
    groups = [set(map(int, one)) for one in (found.values() if isinstance(found, dict) else [found])]
    if merging.tied(network):
        return set().union(*groups)
    return set.intersection(*groups) if len(groups) > 1 else set()


def _resize(network: nn.Module, wanted: Fit) -> None:
    """Embedding and head of so many rows; new ones are the mean of the others, the same every time."""
    import torch

    from strategies import merging

    if wanted.untie:
        merging.untie(network)
    before = network.get_input_embeddings().weight.shape[0]
    if wanted.rows == before:
        return
    network.resize_token_embeddings(wanted.rows, mean_resizing=False)
    with torch.no_grad():
        for end in (network.get_input_embeddings(), network.get_output_embeddings()):
            if end is not None and wanted.rows > before:
                end.weight[before:] = end.weight[:before].float().mean(dim=0).to(end.weight.dtype)


def _check_loaded(folder: Path, network: nn.Module, model: config.Model) -> bool:
    """Whether the file holds the base's embeddings beside what was trained, and that the model is what the file says. Raises ModelError.

    peft passes over weights for layers the model lacks, and starts those the file lacks at random; both are refused, and every tensor of
    the file must be in the model, bit for bit in its type."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / folders.ADAPTER_WEIGHTS, framework="pt") as file:
        there = get_peft_model_state_dict(network, save_embedding_layers=False)
        whole = bool(set(file.keys()) - set(there))
        there = get_peft_model_state_dict(network, save_embedding_layers=True) if whole else there
        odd = sorted(set(file.keys()) ^ set(there))
        odd += [] if odd else [name for name in file.keys() if not torch.equal(file.get_tensor(name).to(there[name]), there[name])]  # noqa: SIM118
    if odd:
        raise ModelError(
            f"the adapter in {folder} does not fit {model.model_name_or_path!r}: {len(odd)} tensors have no counterpart, e.g. {odd[0]}; name the "
            "base it was trained on"
        )
    return whole
