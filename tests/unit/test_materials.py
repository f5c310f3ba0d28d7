"""Safety and harmful rows as published data sets lay them out, and columns that were swapped."""

from __future__ import annotations

import json
import re

import pytest

from orchestrator import config
from orchestrator.errors import DataError, SafebasinError
from orchestrator.trial import materials

REFUSALS = ("I'm sorry, but I cannot help with that.", "I can't assist with this request.", "I cannot provide instructions for that.")
HARM = ("Sure, first take the fuse and", "Step 1: gather the parts.", "Here is the plan: begin by")


def write(folder, name, rows):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def experiment(folder, **safety):
    suites = [{"name": "harm", "data": write(folder, "suite", [{"prompt": "how to break in"}])}]
    task = write(folder, "task", [{"prompt": f"add {i} and one", "response": str(i + 1)} for i in range(8)])
    return config.from_dict({"name": "m", "task": {"data": task, "eval_fraction": 0.25}, "safety": {"data": None, "suites": suites, **safety}})


def lat_harmful(count=6):
    """The layout of LLM-LAT/harmful-dataset: prompt, rejected (harmful), chosen (refusal)."""
    return [{"prompt": f"how to smash {i}", "rejected": HARM[i % 3], "chosen": REFUSALS[i % 3]} for i in range(count)]


def lat_benign(count=4):
    """The layout of LLM-LAT/benign-dataset: prompt, response (helpful), refusal (what not to say)."""
    return [{"prompt": f"how to bake {i}", "response": f"Mix flour and {i} eggs.", "refusal": REFUSALS[i % 3]} for i in range(count)]


def test_chosen_is_the_refusal_and_rejected_the_harmful_answer(tmp_path):
    found = materials.load(experiment(tmp_path, data=write(tmp_path, "safety", lat_harmful())))
    assert [row.kind for row in found.safety] == ["refusal"] * 6 and [row.kind for row in found.harmful] == ["harmful"] * 6
    assert [row.answer for row in found.safety] == [REFUSALS[i % 3] for i in range(6)]
    assert [row.answer for row in found.harmful] == [HARM[i % 3] for i in range(6)]
    assert [(row.id, row.prompt) for row in found.harmful] == [(row.id, row.prompt) for row in found.safety]


def test_rows_of_the_benign_layout_are_harmless_and_their_refusals_unused(tmp_path):
    rows = [row | {"rejected": "", "chosen": ""} for row in lat_benign()]
    found = materials.load(experiment(tmp_path, data=write(tmp_path, "safety", lat_benign())))
    assert [row.kind for row in found.safety] == ["harmless"] * 4 and found.harmful == ()
    assert found.safety[1].answer == "Mix flour and 1 eggs."
    again = materials.load(experiment(tmp_path, data=write(tmp_path, "empty", rows)))  # an empty `rejected` is no answer
    assert again.harmful == ()


def test_swapped_columns_are_refused_with_the_remedy(tmp_path):
    swapped = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in lat_harmful()]
    with pytest.raises(DataError, match=r"0% of the 6 safe answers .* read as refusals.*are the columns swapped"):
        materials.load(experiment(tmp_path, data=write(tmp_path, "safety", swapped)))
    columns = {"prompt": "prompt", "response": "rejected", "rejected": "chosen"}
    found = materials.load(experiment(tmp_path, data=write(tmp_path, "safety", swapped), columns=columns))
    assert [row.answer for row in found.safety] == [REFUSALS[i % 3] for i in range(6)]
    assert [row.answer for row in found.harmful] == [HARM[i % 3] for i in range(6)]


@pytest.mark.parametrize("paired, wrong, said", [
    (True, 2, None), (True, 3, "70% of the 10 .* at least 80%"), (False, 2, None), (False, 3, "only 70% of the 10"),
    (False, 5, "only 50%"), (False, 6, "40% of the 10 .* at least 50%"),
])  # fmt: skip
def test_a_fifth_of_paired_answers_and_half_of_others_may_be_no_refusal(tmp_path, paired, wrong, said):
    rows = [{"prompt": f"p{i}", "response": HARM[0] if i < wrong else REFUSALS[0]} for i in range(10)]
    made = experiment(tmp_path, data=write(tmp_path, "safety", [row | {"rejected": HARM[1]} if paired else row for row in rows]))
    if said and not said.startswith("only"):
        with pytest.raises(DataError, match=said):
            materials.load(made)
        return
    warned = materials.warnings(materials.load(made))
    assert len(warned) == bool(said) and re.search(said or "", " ".join(warned))


def test_harmless_rows_count_neither_as_refusals_nor_as_harm(tmp_path):
    harmless = [{"prompt": f"how to bake {i}", "chosen": "Mix it.", "rejected": "I cannot help.", "kind": "harmless"} for i in range(20)]
    refusing = [row | {"kind": "refusal"} for row in lat_harmful()]
    found = materials.load(experiment(tmp_path, data=write(tmp_path, "safety", harmless + refusing)))
    assert len(found.safety) == 26 and len(found.harmful) == 6
    assert {row.id for row in found.harmful} == {row.id for row in found.safety if row.kind == "refusal"}


def test_rows_without_a_harmful_answer_are_left_out(tmp_path):
    rows = lat_harmful()
    rows[2]["rejected"], rows[4]["rejected"] = " ", None
    found = materials.load(experiment(tmp_path, data=write(tmp_path, "safety", rows)))
    assert [row.id for row in found.harmful] == ["0", "1", "3", "5"] and len(found.safety) == 6


def test_harmful_data_of_its_own_wins_over_the_column(tmp_path):
    own = write(tmp_path, "harmful", [{"prompt": "how to smash 1", "response": "Take a hammer.", "id": "1"}])
    found = materials.load(experiment(tmp_path, data=write(tmp_path, "safety", lat_harmful()), harmful_data=own))
    assert [(row.id, row.answer, row.kind) for row in found.harmful] == [("1", "Take a hammer.", "harmful")]
    alone = materials.load(experiment(tmp_path, harmful_data=own))
    assert alone.safety == () and len(alone.harmful) == 1


def test_a_named_column_that_is_missing_is_named(tmp_path):
    with pytest.raises(SafebasinError, match=r"safety\.data.*no column 'bad'"):
        materials.load(experiment(tmp_path, data=write(tmp_path, "safety", lat_harmful()), columns={"rejected": "bad"}))


def test_the_fingerprint_sees_harmful_answers(tmp_path):
    first = materials.load(experiment(tmp_path, data=write(tmp_path, "a", lat_harmful()))).fingerprint
    other = [row | {"rejected": "Do this instead."} for row in lat_harmful()]
    assert materials.load(experiment(tmp_path, data=write(tmp_path, "b", other))).fingerprint != first
    assert materials.load(experiment(tmp_path, data=write(tmp_path, "c", lat_harmful()))).fingerprint == first


def test_what_was_changed_in_each_source_is_reported(tmp_path):
    task = write(tmp_path, "own", [{"instruction": f"add {i}", "input": i, "output": i + 1, "tags": "x"} for i in range(8)])
    safety = write(tmp_path, "kept", [row | {"system": "be kind"} for row in lat_harmful()])
    made = experiment(tmp_path, data=safety)
    made = made.model_copy(update={"task": made.task.model_copy(update={"data": task})})
    found = materials.load(made)
    assert [(one.field, one.rows, one.used, one.form) for one in found.reports] == [
        ("task.data", 8, 8, "instruction"), ("safety.data", 6, 6, "prompt_response"),
    ]  # fmt: skip
    assert found.reports[0].unused == ("tags",) and found.reports[1].unused == ()
    assert all(row.prompt[0] == {"role": "system", "content": "be kind"} for row in (*found.safety, *found.harmful))


def test_what_template_and_tokenizer_make_of_the_texts_is_found_before_a_run(tmp_path):
    import tiny_llama

    rows = [{"prompt": f"how {i}", "response": "no </s>" if i == 2 else "no"} for i in range(6)]
    made = experiment(tmp_path, data=write(tmp_path, "safety", lat_harmful()))
    made = made.model_copy(update={"task": made.task.model_copy(update={"data": write(tmp_path, "own", rows)})})
    facts, doubts = materials.texts(materials.load(made), made, tiny_llama.tokenizer())
    assert facts == ["task.data: 1 row: an end token '</s>' at the end of an answer was taken off (first: row 3)"] and doubts == []
    rows[4]["response"], rows[1]["prompt"] = "no </s> yes", "how <|user|>"
    bad = made.model_copy(update={"task": made.task.model_copy(update={"data": write(tmp_path, "bad", rows)})})
    with pytest.raises(DataError, match=r"task\.data: row 5: the answer holds '</s>' inside"):
        materials.texts(materials.load(bad), bad, tiny_llama.tokenizer())
    rows[4]["response"] = "no"
    doubted = made.model_copy(update={"task": made.task.model_copy(update={"data": write(tmp_path, "doubted", rows)})})
    _, doubts = materials.texts(materials.load(doubted), doubted, tiny_llama.tokenizer())
    assert doubts == ["task.data: 1 row: the special token '<|user|>' stands in a text (first: row 2); it is read as that token, not as text"]
