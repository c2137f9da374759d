"""Preference records in the forms of TRL, LLaVA-RLHF, RLAIF-V, RLHF-V and our own."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_ray.chat.conversation import Turn
from llava_ray.data.chunks import make_chunks
from llava_ray.data.records import RawRecord, Record
from llava_ray.data.validation import read_record
from llava_ray.errors import RecordError

ASKED = {"role": "user", "content": "<image>\nWhat is it?"}
CAT, DOG = ({"role": "assistant", "content": f"A {animal}."} for animal in ("cat", "dog"))


def read(values: dict[str, Any], **others: Any) -> Record:
    return read_record(RawRecord("p7", "data.jsonl:7", values, **others), "/images", pairs=True)


def refused(values: dict[str, Any]) -> RecordError:
    with pytest.raises(RecordError) as caught:
        read(values)
    assert str(caught.value).startswith("record 'p7' (data.jsonl:7): ")
    return caught.value


EXPECTED = ((Turn("human", "<image>\nWhat is it?"), Turn("gpt", "A cat.")), (Turn("gpt", "A dog."),))

FORMS: dict[str, dict[str, Any]] = {
    "ours": {"id": "1", "images": ["a.jpg"], "prompt": [ASKED], "chosen": [CAT], "rejected": [DOG],
             "provenance": {"weight": 0, "video": "x.mp4"}},
    "TRL, without markers": {"images": ["a.jpg"], "prompt": [{"role": "user", "content": "What is it?"}],
                             "chosen": [CAT], "rejected": [DOG]},
    "TRL, image parts": {
        "images": ["a.jpg"],
        "prompt": [{"role": "user", "content": [{"type": "image", "text": None},
                                                {"type": "text", "text": "What is it?"}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}],
    },
    "TRL, implicit prompt": {"images": ["a.jpg"], "chosen": [ASKED, CAT], "rejected": [ASKED, DOG]},
    "TRL, plain texts": {"image": "a.jpg", "prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."},
    "TRL, JSON in a table": {"images": ["a.jpg"], "prompt": json.dumps([ASKED]), "chosen": json.dumps([CAT]),
                             "rejected": json.dumps([DOG])},
    "RLAIF-V": {"ds_name": "RLAIF-V", "image": {"bytes": None, "path": "a.jpg"}, "question": "What is it?",
                "chosen": "A cat.", "rejected": "A dog.", "origin_dataset": "coco", "idx": 3},
    "RLHF-V": {"image": {"bytes": None, "path": "a.jpg"},
               "text": json.dumps({"question": "What is it?", "chosen": "A cat.", "rejected": "A dog."})},
    "RLHF-V, empty columns": {"image": {"bytes": None, "path": "a.jpg"}, "chosen": None, "rejected": None,
                              "question": None, "text": json.dumps({"question": "What is it?", "chosen": "A cat.",
                                                                    "rejected": "A dog."})},
    "LLaVA-RLHF": {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}],
                   "output_1": {"from": "llava", "value": "A dog."}, "output_2": {"from": "llava", "value": "A cat."},
                   "preference": 2, "hallucination": False},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_pair(form: str) -> None:
    record = read(FORMS[form])
    assert (record.turns, record.rejected) == EXPECTED
    assert record.images == ("/images/a.jpg",)


def test_answers_within_the_prompt_are_not_supervised() -> None:
    earlier = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    for prompt in ({"prompt": [*earlier, ASKED], "chosen": [CAT], "rejected": [DOG]},
                   {"chosen": [*earlier, ASKED, CAT], "rejected": [*earlier, ASKED, DOG]}):  # fmt: skip
        record = read({"images": ["a.jpg"], **prompt})
        assert [turn.supervised for turn in record.turns if turn.role == "gpt"] == [False, True]
        assert record.rejected == (Turn("gpt", "A dog."),)


def test_a_system_prompt_is_of_both_sides() -> None:
    record = read({"system": "Be brief.", "prompt": "Hello?", "chosen": "Hi.", "rejected": "Go away."})
    assert record.turns[0] == Turn("system", "Be brief.")
    assert record.rejected == (Turn("gpt", "Go away."),)


AGAIN, OTHER = ({"role": "user", "content": text} for text in ("Sure?", "Why?"))
PAIR = {"images": ["a.jpg"], "prompt": [ASKED], "chosen": [CAT], "rejected": [DOG]}


@pytest.mark.parametrize(
    ("values", "reason", "said"),
    [
        (PAIR | {"rejected": [CAT]}, "equal_sides", "nothing to prefer"),
        ({"images": ["a.jpg"], "chosen": [CAT], "rejected": [DOG]}, "no_prompt", "add the prompt"),
        ({"chosen": "A cat.", "rejected": "A dog."}, "no_prompt", "add the prompt"),
        ({"chosen": [ASKED, CAT], "rejected": [{"role": "user", "content": "<image>\nWhere?"}, DOG], "image": "a.jpg"},
         "no_prompt", "add the prompt"),
        ({"prompt": "What?", "chosen": "A cat."}, "no_turns", "`rejected` is missing"),
        ({"prompt": "What?", "chosen": "", "rejected": "no"}, "no_turns", "`chosen` is missing or empty"),
        (PAIR | {"images": []}, "image_count", "1 <image> marker"),
        (PAIR | {"images": ["a.jpg", "b.jpg"]}, "image_count", "2 image"),
        (PAIR | {"rejected": [{"role": "user", "content": "A dog."}]}, "alternation", ""),
        (PAIR | {"rejected": 3}, "malformed", "`rejected` is 3"),
        (PAIR | {"messages": [ASKED, CAT]}, "malformed", "has `prompt` in place of"),
        (PAIR | {"video": "a.mp4"}, "unsupported", "video"),
        (PAIR | {"rejected": [{"role": "assistant", "content": "A cat.\n "}]}, "equal_sides", "nothing to prefer"),
        (PAIR | {"chosen": [CAT, AGAIN, DOG], "rejected": [CAT]}, "equal_sides", "as far as the shorter one goes"),
        (PAIR | {"chosen": [CAT, AGAIN, DOG], "rejected": [CAT, OTHER, DOG]}, "no_prompt", "'Sure?' and 'Why?'"),
        ({"images": ["a.jpg"], "chosen": [ASKED, CAT, AGAIN, DOG], "rejected": [ASKED, CAT, OTHER, CAT]},
         "no_prompt", "the first difference between them is no answer"),
        (PAIR | {"chosen": [CAT, AGAIN], "rejected": [DOG, AGAIN]}, "roles", "does not end with an answer"),
        (PAIR | {"chosen": [CAT | {"weight": 0}, AGAIN, DOG], "rejected": [CAT, AGAIN, CAT]}, "nothing_to_learn",
         "begins with an answer that is not trained on"),
        (FORMS["RLHF-V"] | {"question": "Which?"}, "malformed", "`question` differs from that in `text`"),
        (PAIR | {"question": "Which?"}, "malformed", "`prompt` and `question` differ"),
        (FORMS["LLaVA-RLHF"] | {"preference": 0}, "malformed", "expected 1 or 2"),
        (FORMS["LLaVA-RLHF"] | {"preference": True}, "malformed", "expected 1 or 2"),
        ({"text": "no JSON", "image": "a.jpg"}, "no_turns", "no JSON object"),
        ({"conversations": [ASKED, CAT]}, "no_turns", "no preference"),
    ],
)  # fmt: skip
def test_what_is_no_preference_is_refused_by_name(values: dict[str, Any], reason: str, said: str) -> None:
    error = refused(values)
    assert error.reason == reason
    assert said in str(error)


@pytest.mark.parametrize("answer", ["None", "null", "[]", "{}"])
def test_an_answer_that_reads_like_nothing_is_an_answer(answer: str) -> None:
    record = read({"prompt": "How many?", "chosen": answer, "rejected": "Two."})
    assert record.turns[-1] == Turn("gpt", answer)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_from_a_table(form: str, tmp_path: Path) -> None:
    values = {key: value for key, value in FORMS[form].items() if key != "provenance"}
    pq.write_table(pa.Table.from_pylist([values]), tmp_path / "pairs.parquet")
    [chunk] = make_chunks("parquet", [str(tmp_path / "pairs.parquet")], 10, None)
    [record] = [read_record(raw, "/images", pairs=True) for raw in chunk.read()]
    assert (record.turns, record.rejected) == EXPECTED
    assert record.images == ("/images/a.jpg",)


def test_images_that_differ_between_the_sides_are_refused() -> None:
    sides = [
        [{"role": "user", "content": [{"type": "image", "image": name}, {"type": "text", "text": "What?"}]}, answer]
        for name, answer in (("a.jpg", CAT), ("b.jpg", DOG))
    ]
    error = refused({"chosen": sides[0], "rejected": sides[1]})
    assert error.reason == "image_mismatch"
