"""The support matrix: docs/models.md, generated from cells that ran.

    PYTHONPATH=.:tests:tests/families python tests/families/matrix.py > docs/models.md      # all families; about 20 minutes on a core
"""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import cells
import tiny
import torch
from cells import Cell

GROUPS = {
    "full": ("full",),
    "lora": ("lora",),
    "freezing": ("freeze_layers", "freeze_layers+lora"),
    "rows": ("safe_instruct",),
    "steps": ("safegrad", "sap", "spard", "sbr", "lisa", "constrained_sft"),
    "after": tuple(name for name in cells.RECIPES if name.partition(",")[0] in (*cells.ACTS, "one_shot_patch", "curvature_restore")),
}
"""Columns of the page."""
HEAD = """# Model families

What was tried: tiny random models of every family below, each with every recipe named in a column, through the checks of `safebasin validate`
and a whole trial (training, saving, evaluation), then loaded again by transformers and peft alone in a fresh process, with equal logits. Answers
equal `model.generate`'s, one by one, at batch 1 and 8, with and without a system prompt. This page is generated (`tests/families/matrix.py`) and
held to what the tests find. It says that the code paths are right, not that a method protects a large model of that family: see
[Which methods protect](methods_table.md).

A family that is not here is treated alike: how it may be asked, where its decoder blocks are, what is a matrix in it and which layers can be
adapted is found out by looking at the model, and `validate` says what it found on a small random copy before a device is taken.

- **asked**: `cache` with a key-value cache, `prefix` with the beginning that prompts share computed once, `plain` without a cache, `one length`
  only prompts of equal length together. The slower ways are slower only; answers are the same.
- **full**, **lora**; **freezing**: freeze_layers, alone and with lora; **rows**: safe_instruct; **steps**: safegrad, sap, spard, sbr, lisa,
  constrained_sft; **after**: safe_lora, safemerge, resta, enchtable, lssf, random_subspace, lox, one_shot_patch, curvature_restore, on adapters
  and, where it makes a difference, on whole models.
- What a method after training cannot reach of an update (heads, embeddings, norms; under enchtable's `modules=attention` all MLPs) differs by
  training, not by family: it is in every trial's record, and a warning above 10 %.

"""


def asked_as(family: str) -> str:
    """How a family's models are asked, in the words of the page."""
    from orchestrator.evaluation import capability

    mode = capability.of(tiny.model(family)).mode
    if mode.cache:
        return "cache, prefix" if mode.prefix else "cache"
    return "plain" if mode.padding else "plain, one length"


def row(family: str, asked: str, found: Sequence[Cell]) -> str:
    """One line of the table."""
    by_name = {cell.recipe: cell for cell in found}
    refused = {name: cell.notes[0] for name, cell in by_name.items() if cell.state == "refused"}
    columns = []
    for names in GROUPS.values():
        no = [name for name in names if name in refused]
        columns.append("yes" if not no else "no" if len(no) == len(names) else f"not {', '.join(no)}")
    return f"| {family} | {asked} | {' | '.join(columns)} | {'; '.join(_notes(found))} |"


def _notes(found: Sequence[Cell]) -> list[str]:
    """What users must know, once each: layers without an adapter, reasons of refusals."""
    notes: dict[str, None] = {}
    without = [m.group(1) for cell in found for note in cell.notes if (m := re.match(r"lora: (.+) of the decoder blocks gets no adapter", note))]
    if adapters := {name for names in without for name in names.split(", ")}:
        notes[f"lora leaves out {', '.join(sorted(adapters))}"] = None
    for cell in found:
        if cell.state == "refused":
            notes[f"{cell.recipe}: {cell.notes[0]}"] = None
        for note in cell.notes:
            if cell.state == "limited" and not re.match(r"lora: .+ of the decoder|answers are generated|\d+% of the update", note):
                notes[note] = None
    return list(notes)


def page(rows: Iterable[str], refused: Iterable[tuple[str, str]]) -> str:
    table = ["| family | asked | " + " | ".join(GROUPS) + " | |", "|" + "---|" * (len(GROUPS) + 3), *rows]
    no = ["| model | what `validate` says (exit 2) |", "|---|---|", *(f"| {name} | {sentence} |" for name, sentence in refused)]
    return HEAD + "\n".join(table) + "\n\n## Refused before a device is taken\n\n" + "\n".join(no) + "\n"


def refusal(folder: Path) -> str | None:
    """The sentence with which a model folder is refused; None where it is taken."""
    from orchestrator import config
    from orchestrator.errors import SafebasinError
    from orchestrator.experiment import checks_model

    try:
        checks_model.check(config.Model(model_name_or_path=str(folder)))
    except SafebasinError as error:
        return _plain(str(error).replace(repr(str(folder)), "MODEL"))
    return None


def _plain(sentence: str) -> str:
    """Without what differs between machines, and without bars that would end a cell of a table."""
    return re.sub(r"/\S+/", "", sentence).replace("|", "/")


def of_family(where: Path, family: str) -> tuple[str, list[Cell], list[Path]]:
    """(how it is asked, its cells, folders of the saved models). Raises AssertionError where a claim does not hold."""
    from orchestrator.records import LaneContext

    folder, context = cells.folder_of(where / family, family), LaneContext()
    found = [cells.cell(folder, family, name, context) for name in cells.RECIPES]
    saved = [folder / cells.place(cell.recipe) for cell in found if cell.state != "refused"]
    return asked_as(family), found, saved


def line_of(family: str) -> tuple[bool, str]:
    """(whether the family is taken, its line of the table or the sentence of its refusal); run in a process of its own."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made, contextlib.redirect_stdout(sys.stderr):
        sentence = refusal(tiny.saved(Path(made) / "look", family))
        if sentence is not None:
            return False, sentence
        asked, found, saved = of_family(Path(made), family)
        worst = max(cells.reload(saved).values(), default=0.0)
    if not worst < cells.SAME:
        raise SystemExit(f"{family}: a saved model answers otherwise in a fresh process, by {worst:.2g} of the largest logit")
    return True, row(family, asked, found)


def main() -> None:
    families = [*tiny.FAMILIES, *tiny.SHELLS]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = []
        for family, (taken, line) in zip(families, pool.imap(line_of, families), strict=True):
            found.append((family, taken, line))
            print(f"{len(found)} of {len(families)}: {family}", file=sys.stderr, flush=True)
    refused = [(family, line) for family, taken, line in found if not taken]
    with tempfile.TemporaryDirectory() as made, contextlib.redirect_stdout(sys.stderr):
        refused += [(name, refusal(tiny.saved_no_decoder(Path(made) / name, name)) or "taken") for name in tiny.NO_DECODERS]
    print(page([line for _, taken, line in found if taken], refused), end="")


if __name__ == "__main__":
    main()
